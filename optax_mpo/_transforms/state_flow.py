"""Reads from the program of a transformation how it uses its state: which state may be rounded, and how.

Why: 8 bits do no harm to a momentum. They ruin a second moment that rounds to zero and is divided by, a variance that
is the small difference of two large numbers, a matrix that is inverted, and weights that are kept as state. For the
states of Optax, names tell which is which (`state_kinds`). For other transformations they do not.

How: `init` and `update` are traced, and each value is described by what is proven about it.

- *Sign.* Additions, subtractions and multiplications by constants make a value a sum of others with known factors:
  `v + 0.001 * (g * g - v)` is `0.999 * v + 0.001 * g * g`. The sum is never negative if no factor is, and each of the
  others is a square, a magnitude or the like. First every leaf of the state that starts non-negative is assumed to stay
  so. Leaves whose new value is not proven non-negative are dropped, until nothing changes: the rest is an invariant.
- *Quotients.* State that is divided by, element by element, must not round to zero: unless proven non-negative, it is
  wide. State that is divided by it needs small values and zeros, and is wide too. A sum over elements ends this: it
  does not become zero when one of them does. State that is divided by something that can be smaller than any code, such
  as the gradient, is not rounded: the smallest code would be large relative to it.
- *Differences.* If two values that come from stored state are subtracted, and the result is rooted or divided by, no
  rounding of that state is safe. Nor is it if linear algebra (an inverse, a decomposition) reads the state.
- *Weights.* State that starts as a function of the params holds weights, and is not rounded. Nor is state that becomes
  a function of params and no gradients, or an average of params and itself: the params of the previous step, whose
  difference from the current ones is smaller than any code, or a moving average of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_mpo._core.annotations import PyTree
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Program
from optax_mpo._transforms.state_kinds import Kind
from optax_mpo._transforms.value_flow import LOW, OTHER, STATE, Flow, Value


def kinds(
  inner: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree, wanted: Sequence[bool]
) -> list[Kind]:
  """Returns for each leaf of `inner`'s state how it may be stored.

  Args:
    inner: the transformation.
    params: arrays or ShapeDtypeStructs.
    state: what `inner.init(params)` makes, as arrays or ShapeDtypeStructs.
    wanted: which leaves of the state are candidates; what is returned for the others has no meaning.

  Returns:
    In the order of the leaves: False for a leaf that must not be rounded; "nonnegative" if that is proven and the leaf
    is not divided; "signed" if it is not part of a quotient; and "wide" for the rest, whose small values matter. If the
    update does not trace, that is all leaves except weights.
  """
  params, state = jax.tree.map(_struct, (params, state))
  count = len(wanted)
  starts = _starts(inner, params, count)
  program = _update(inner, params, state)
  if program is None:
    return [False if start is None else "wide" for start in starts]
  rest, leaves = program.inputs[: len(program.inputs) - count], program.inputs[len(program.inputs) - count :]

  def other(var: int) -> int:
    return OTHER if program.aval(var).shape else 0

  bits = [4 << j if want else other(var) for j, (var, want) in enumerate(zip(leaves, wanted, strict=True))]
  believed = [start is not None and start.nonnegative for start in starts]
  while True:
    flow = Flow()
    given = [Value(stored=other(var), above=other(var)) for var in rest]
    given += [Value(sign, b, above=b, floored=want) for sign, b, want in zip(believed, bits, wanted, strict=True)]
    new = flow.run(program, given)[len(program.outputs) - count :]
    proven = [sign and value.nonnegative for sign, value in zip(believed, new, strict=True)]
    if proven == believed:
      break
    believed = proven
  divisors, small, exact = _closed(flow, list(zip(bits, new, strict=True)))
  held = _hold_weights(program, given, new, len(jax.tree.leaves(params)))

  def kind(bit: int, start: Value | None, sign: bool, weights: bool) -> Kind:
    if start is None or weights or exact & bit:
      return False
    if sign and not small & bit:  # these codes have no zero: a divided zero would become nonzero
      return "nonnegative"
    return "wide" if (divisors | small) & bit else "signed"

  return [kind(*leaf) for leaf in zip(bits, starts, believed, held, strict=True)]


def _hold_weights(program: Program, given: Sequence[Value], new: Sequence[Value], leaves: int) -> list[bool]:
  """Whether the new value of each leaf of the state depends on params and no gradients, or averages params and itself.

  Args:
    program: an update; its inputs are the gradients, as many params, other arguments, and the state.
    given: what is known of its inputs.
    new: what is proven about each leaf of the new state.
    leaves: how many params there are.
  """
  grads, params, first = 1, 2, len(given) - len(new)
  bits = [grads] * leaves + [params] * leaves + [0] * (len(given) - 2 * leaves)
  made = dataflow.output_bits(program, dataflow.dependencies(program, bits))[-len(new) :] if new else []
  weights = given[leaves : 2 * leaves]

  def is_average(value: Value, old: Value) -> bool:
    factors = dict(value.parts)
    of_params = sum(factors.get(w, 0.0) for w in weights)
    return of_params > 0 and abs(of_params + factors.get(old, 0.0) - 1) < 1e-6

  return [b == params or is_average(v, old) for b, v, old in zip(made, new, given[first:], strict=True)]


def _closed(flow: Flow, new: Sequence[tuple[int, Value]]) -> tuple[int, int, int]:
  """Extends what a program does with the state in one step to any number of steps.

  Args:
    flow: what it does in one step.
    new: each leaf of the state, as a bit, and its new value.

  Returns:
    Bit sets of the leaves that are divisors, of those that are divided, and of those that must not be rounded.
  """
  divisors, small, exact = flow.divisors & STATE, 0, flow.exact & STATE
  while True:
    before = divisors, small, exact
    for above, below in flow.quotients:
      if below & (exact | LOW):
        exact |= above & STATE
      else:
        small |= above & STATE
    for bit, value in new:  # a divisor of the next step is computed from state of this one
      if divisors & bit:
        divisors |= value.stored & STATE
        exact |= value.differs & STATE
      if exact & bit:
        exact |= value.stored & STATE
    if (divisors, small, exact) == before:
      return before


def owners(inner: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree) -> list[int | None]:
  """Returns for each leaf of `inner`'s state the index of the param whose gradient it is computed from.

  None if it depends on no gradient or on several, or if the update does not trace.
  """
  params, state = jax.tree.map(_struct, (params, state))
  leaves, count = len(jax.tree.leaves(params)), len(jax.tree.leaves(state))
  program = _update(inner, params, state)
  if program is None:
    return [None] * count
  bits = [1 << i for i in range(leaves)] + [0] * (len(program.inputs) - leaves)
  new = dataflow.output_bits(program, dataflow.dependencies(program, bits))[len(program.outputs) - count :]
  return [b.bit_length() - 1 if b and not b & (b - 1) else None for b in new]


def _struct(leaf: ArrayLike) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _starts(inner: optax.GradientTransformation, params: PyTree, count: int) -> list[Value | None]:
  """What is proven about each leaf of a new state; None for a leaf that is computed from the values of the params."""
  try:
    program, _ = jax_forms.trace(inner.init, params)
  except Exception:  # an `init` that reads concrete values may raise anything
    return [Value() for _ in range(count)]
  values = [Value(stored=OTHER) for _ in program.inputs]  # a leaf computed from elements of a param gets this bit
  found = Flow().run(program, values)
  return [None if value.stored and value.constant is None else value for value in found]


def _update(inner: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree) -> Program | None:
  """The program of an update, whose last inputs and outputs are the state; None if it does not trace."""

  def update(grads: PyTree, params: PyTree, extra: dict[str, PyTree], state: PyTree) -> tuple[PyTree, PyTree]:
    return inner.update(grads, state, params, **extra)

  for extra in ({}, {"value": jax.ShapeDtypeStruct((), jnp.float32)}):
    try:
      program, (_, new) = jax_forms.trace(update, params, params, extra, state)
    except Exception:  # an update that lacks arguments or reads concrete values may raise anything
      continue
    return program if len(jax.tree.leaves(new)) == len(jax.tree.leaves(state)) else None
  return None
