"""Finds the products that run in f32 because a low-precision weight meets an f32 input.

Why: JAX promotes, and so does Flax with `dtype=None`: the product of a bf16 weight and an f32 input silently runs in
f32, at a fraction of the speed and with twice the memory for its result.

How: follow weights through the program of a loss function, its loops, branches and calls, to the products that use
them. A product counts if the weight was converted on the way, or if the other operand has more bits. A product of bf16
operands that accumulates in f32 (`preferred_element_type`) does not count. Its derivative has an f32 operand, so only
the program of the loss is searched.
"""

from collections.abc import Mapping
from typing import NamedTuple

from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Program

_PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"))
# A weight is followed through these: they move or convert its elements.
_MOVES = frozenset(
  """convert_element_type reshape transpose broadcast_in_dim squeeze expand_dims slice dynamic_slice rev copy copy_p pad
  optimization_barrier sharding_constraint reduce_precision name""".split()
)


class _Weight(NamedTuple):
  """A variable that is the weight of this leaf, perhaps converted to more bits."""

  leaf: int
  converted: bool


def products(program: Program, low: Mapping[int, int]) -> dict[int, str]:
  """Returns, for each weight in a product of more bits than its own, the operation and line of code of the first one.

  Args:
    program: the program of a loss function, without its derivative.
    low: the low-precision weights: the variable of an input -> the index of its leaf.
  """
  found: dict[int, str] = {}
  _follow(program, {variable: _Weight(i, False) for variable, i in low.items()}, found)
  return found


def _follow(program: Program, known: dict[int, _Weight], found: dict[int, str]) -> list[_Weight | None]:
  """Follows the weights known among the inputs, and returns those known among the outputs."""

  def weight(atom: Atom) -> _Weight | None:
    return known.get(atom) if isinstance(atom, int) else None

  for operation in program.operations:
    weights = [weight(a) for a in operation.inputs]
    if not any(weights):
      continue
    if operation.name in _PRODUCTS:
      widest = max(_bits(program, a) for a in operation.inputs[:2])
      for w, operand in zip(weights, operation.inputs, strict=True):
        if w is not None and (w.converted or _bits(program, operand) < widest):
          found.setdefault(w.leaf, jax_forms.where(operation))
    elif operation.name in _MOVES:
      for w, before, after in zip(weights, operation.inputs, operation.outputs, strict=False):
        if w is not None and after >= 0:
          bits, new_bits = _bits(program, before), _bits(program, after)
          known[after] = _Weight(w.leaf, new_bits > bits or (w.converted and new_bits == bits))
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


def _bits(program: Program, atom: Atom) -> int:
  return program.aval(atom).dtype.itemsize
