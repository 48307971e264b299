"""Finds pairs of products, such as both gradients of a product, of which one frees more memory than it takes.

Why: attention multiplies values by weights of [batch, heads, context, context]. Its backward pass makes the gradient of
the weights and that of the values, which reads the weights for the last time. JAX writes one after the other, so that
the weights could be freed at once. XLA:GPU makes the gradient of the values later, after the backward pass of the
softmax in f32, and keeps the weights until then.

Measured: `benchmarks/peak_memory.py --models lm-1.3b-4x2048 --modes mpo-16-auto`, compiled by JAX 0.10.2 for H200. The
temporaries took 3.46 GiB, and take 2.63 where both products of a pair are made before either is used. It goes when XLA
does that itself.
"""

import math
from collections.abc import Container, Mapping

from optax_mpo._program.program import MOVES, PRODUCTS, Program


def find(program: Program, last_use: Mapping[int, int], skipped: Container[int]) -> dict[int, tuple[int, int]]:
  """Returns the results of both products, by the index of the second.

  Args:
    program: any program.
    last_use: the last operation that reads a variable.
    skipped: operations that do not run.
  """
  found: dict[int, tuple[int, int]] = {}
  operands: set[int] = set()  # of the product before
  result, is_freeing = -1, False  # its result, or what has been moved of it; whether it frees more than it takes
  for i, operation in enumerate(program.operations):
    if i in skipped:
      continue
    read = {a for a in operation.inputs if isinstance(a, int)}
    if operation.name in PRODUCTS:
      shared, first, did_free = operands & read, result, is_freeing
      operands, result, is_freeing = read, operation.outputs[0], _frees(program, i, read, last_use)
      if shared and (did_free or is_freeing) and last_use.get(first, -1) > i and last_use.get(result, -1) >= i:
        found[i] = first, result
    elif result in read:
      result = operation.outputs[0] if operation.name in MOVES and last_use.get(result) == i else -1
  return found


def _frees(program: Program, i: int, read: set[int], last_use: Mapping[int, int]) -> bool:
  """Whether an operation is the last to read an array, made in the program, that is larger than its result."""
  last = [_bytes(program, v) for v in read & program.makers.keys() if last_use.get(v) == i]
  return max(last, default=0) > _bytes(program, program.operations[i].outputs[0])


def _bytes(program: Program, v: int) -> int:
  aval = program.aval(v)
  return math.prod(aval.shape) * aval.dtype.itemsize
