"""The base of all other folders: trees and their names, buffers, array types, primitives, hints for XLA."""
