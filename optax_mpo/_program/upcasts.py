"""Finds the products that run in f32 because a low-precision weight meets an f32 input.

Why: JAX promotes, and so does Flax with `dtype=None`: the product of a bf16 weight and an f32 input silently runs in
f32, at a fraction of the speed and with twice the memory for its result.

How: follow weights through the program of a loss function, its loops, branches and calls, to the products that use
them. A product counts if one of its operands is as wide as f32. A product of bf16 operands that accumulates in f32
(`preferred_element_type`) does not count. Its derivative has an f32 operand, so only the program of the loss is
searched.
"""

from collections.abc import Mapping

from optax_mpo._program import jax_forms
from optax_mpo._program.program import PRODUCTS, Atom, Program

# A weight is followed through these: they move or convert its elements.
_MOVES = frozenset(
  """convert_element_type reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice rev copy copy_p pad
  optimization_barrier sharding_constraint reduce_precision name""".split()
)


def products(program: Program, low: Mapping[int, int]) -> dict[int, str]:
  """Returns, for each weight in a product that runs in f32, the operation and line of code of the first one.

  Args:
    program: the program of a loss function, without its derivative.
    low: the low-precision weights: the variable of an input -> the index of its leaf.
  """
  found: dict[int, str] = {}
  _follow(program, {**low}, found)
  return found


def _follow(program: Program, known: dict[int, int], found: dict[int, str]) -> list[int | None]:
  """Follows the weights known among the inputs, by their leaves, and returns those known among the outputs."""

  def weight(atom: Atom) -> int | None:
    return known.get(atom) if isinstance(atom, int) else None

  for operation in program.operations:
    weights = [weight(a) for a in operation.inputs]
    if all(w is None for w in weights):
      continue
    if operation.name in PRODUCTS:
      if any(program.aval(a).dtype.itemsize >= 4 for a in operation.inputs[:2]):
        found.update((w, jax_forms.where(operation)) for w in weights if w is not None and w not in found)
    elif operation.name in _MOVES:
      results = zip(operation.outputs, weights, strict=False)
      known.update((v, w) for v, w in results if v >= 0 and w is not None)
    else:
      for body in jax_forms.bodies(operation):
        if len(body.inputs) > len(weights):
          continue
        # The body of a loop or a branch takes the last operands, that of a call all of them.
        given = weights[len(weights) - len(body.inputs) :]
        inside = {v: w for v, w in zip(body.inputs, given, strict=True) if w is not None}
        results = _follow(body, inside, found)
        if operation.name in jax_forms.CALLS:
          known.update((v, w) for v, w in zip(operation.outputs, results, strict=True) if v >= 0 and w is not None)
  return [weight(a) for a in program.outputs]
