"""What the rest stands on: trees and their names, buffers, types of arrays, primitives, hints for XLA."""
