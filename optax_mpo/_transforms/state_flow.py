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

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._transforms.state_kinds import Kind

PyTree = Any

# Operations whose results are non-negative if all operands are.
_KEEPS_SIGN = frozenset(
  """mul div max min add add_any sqrt cbrt rsqrt convert_element_type broadcast_in_dim reshape transpose squeeze
  expand_dims concatenate pad rev copy copy_p stop_gradient sharding_constraint reduce_precision real reduce_sum
  reduce_max reduce_min reduce_prod cumsum cumprod cummax cummin dot_general sign floor ceil round tanh sinh asinh atan
  erf expm1 log1p psum pmax pmin pvary sort held laid_out row_major rem""".split()
)
_NEVER_NEGATIVE = frozenset("abs exp exp2 logistic cosh square is_finite iota eq ne lt le gt ge random_bits".split())
_INDEXED = frozenset("gather slice dynamic_slice pow".split())  # results have the sign of the first operand
# Results computed from many elements: they do not become zero if one of these is rounded to zero.
_SUMS = frozenset("reduce_sum reduce_max dot_general cumsum cummax psum pmax conv_general_dilated".split())
_COMPARISONS = frozenset("sign eq ne lt le gt ge is_finite argmax argmin reduce_and reduce_or".split())
_LINEAR_ALGEBRA = frozenset(
  """cholesky cholesky_update eigh eig lu qr geqrf geqp3 householder_product svd schur triangular_solve tridiagonal
  tridiagonal_solve hessenberg custom_linear_solve""".split()
)
_POLES = frozenset("rsqrt log acos acosh atanh erf_inv digamma lgamma tan".split())  # with poles, like divisions
_ROOTS = frozenset("sqrt rsqrt log".split())  # not defined below zero
_OTHERS = frozenset(
  "sub neg sin cos imag and or xor not clamp select_n integer_pow dynamic_update_slice atan2 nextafter".split()
)
_KNOWN = _KEEPS_SIGN | _NEVER_NEGATIVE | _INDEXED | _SUMS | _COMPARISONS | _POLES | _OTHERS
_OTHER, _LOW = 1, 2  # bits: an array that is not stored; a divisor that can be smaller than any code
_STATE = ~(_OTHER | _LOW)
_SAME = frozenset("convert_element_type copy copy_p stop_gradient held laid_out row_major".split())
_FLOORED = _SAME | frozenset(
  """abs neg sqrt cbrt square integer_pow pow broadcast_in_dim reshape squeeze expand_dims transpose slice dynamic_slice
  gather rev sharding_constraint reduce_precision""".split()
)
_SPREAD = frozenset("broadcast_in_dim reshape squeeze expand_dims".split())


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
  """What is proven about a value.

  Attributes:
    nonnegative: whether no element is negative.
    stored: the leaves of the state that it is computed from, element by element, as a bit set; `_OTHER` stands for
      arrays that are not stored.
    differs: the leaves in `stored` of which it may be a small difference.
    above: the leaves in `stored` that are in its numerators.
    below: the leaves in its denominators, and `_LOW`.
    floored: whether it is at least about as large as a stored leaf. State that is divided by never rounds to zero.
    terms: the values whose sum it is, with their factors. None: the value is itself a term.
    number: a constant added to the terms.
  """

  nonnegative: bool = False
  stored: int = 0
  differs: int = 0
  above: int = 0
  below: int = 0
  floored: bool = False
  terms: tuple[tuple["_Value", float], ...] | None = None
  number: float = 0.0

  @property
  def parts(self) -> tuple[tuple["_Value", float], ...]:
    """The values and factors whose sum it is, without `number`."""
    return ((self, 1.0),) if self.terms is None else self.terms

  @property
  def known(self) -> tuple[Any, ...]:
    """All that is proven about it, except `terms` and `number`."""
    return self.nonnegative, self.stored, self.differs, self.above, self.below, self.floored

  @property
  def constant(self) -> float | None:
    """The value of all its elements, if it is one known number."""
    return self.number if self.terms == () else None


def _sum(terms: Sequence[tuple[_Value, float]]) -> tuple[tuple[tuple[_Value, float], ...], float]:
  """Adds values with factors. Returns the terms whose factor is not zero, and a constant."""
  factors: dict[_Value, float] = {}
  number = 0.0
  for value, factor in terms:
    number += factor * value.number if value.terms is not None else 0.0
    for part, inner in value.parts:
      factors[part] = factors.get(part, 0.0) + factor * inner
  return tuple((v, f) for v, f in factors.items() if f), number


def _constant(value: Any) -> _Value:
  """What is known of a literal, or of an array that the program closes over."""
  if isinstance(value, Tracer):
    return _Value()
  try:
    array = np.asarray(value).astype(np.float64)
  except (TypeError, ValueError):  # random keys, for example
    return _Value()
  if array.size and array.min() == array.max():
    return _Value(bool(array.min() >= 0), terms=(), number=float(array.min()))
  return _Value(bool((array >= 0).all()))


class _Flow:
  """Follows values through programs.

  Attributes:
    divisors: the leaves of the state that something is divided by, element by element, as a bit set.
    exact: the leaves for which no rounding is safe.
    quotients: for each division of state the leaves above and below, as bit sets.
  """

  def __init__(self) -> None:
    self.divisors = self.exact = 0
    self.quotients: set[tuple[int, int]] = set()

  def run(self, program: Program, inputs: Sequence[_Value]) -> dict[int, _Value]:
    """Returns what is proven about each variable of a program."""
    env = {v: _constant(c) for v, c in program.constants.items()} | dict(zip(program.inputs, inputs, strict=True))
    for operation in program.operations:
      results = self._results(operation, [_read(a, env) for a in operation.inputs])
      env.update((v, r) for v, r in zip(operation.outputs, results, strict=True) if v >= 0)
    return env

  def _results(self, operation: Operation, values: list[_Value]) -> list[_Value]:
    name = operation.name
    if name == "optimization_barrier":
      return values
    if name == "cond":
      found = [_outputs(body, self.run(body, values[1:])) for body in operation.bodies]
      return [_combined(each, all(v.nonnegative for v in each)) for each in zip(*found, strict=True)]
    if name == "scan":
      return self._scan(operation, values)
    poles = self._note(operation, values)
    terms = _terms(operation, values)
    if terms is not None:
      parts, number = _sum(terms)
      certain = number >= 0 and all(factor > 0 and value.nonnegative for value, factor in parts)
    else:
      parts, number, certain = None, 0.0, _is_nonnegative(operation, values)
    read = values[1:] if name == "select_n" else values
    if name in _SUMS or name in _COMPARISONS:
      read = []
    result = _combined(read, certain, parts, number)
    if name in ("add", "add_any", "sub") and not certain and all(v.stored & _STATE for v in values):
      result = dataclasses.replace(result, differs=result.stored)
    result = dataclasses.replace(result, floored=_is_floored(name, values))
    if poles:
      above = jax_forms.union(v.above for v in values if v not in poles)
      result = dataclasses.replace(
        result,
        above=above | jax_forms.union(v.below & ~_LOW for v in poles),
        below=jax_forms.union(v.below for v in values if v not in poles) | _below(poles),
      )
    return [dataclasses.replace(result) for _ in operation.outputs]  # compared by identity

  def _scan(self, operation: Operation, values: list[_Value]) -> list[_Value]:
    consts, carry, _ = jax_forms.scan_counts(operation)
    body, end = jax_forms.flatten(jax_forms.scan_body(operation)), consts + carry
    carried = values[consts:end]
    while True:
      out = _outputs(body, self.run(body, [*values[:consts], *carried, *values[end:]]))
      pairs = list(zip(carried, out, strict=False))
      new = [_combined(pair, all(v.nonnegative for v in pair)) for pair in pairs]
      if [v.known for v in new] == [v.known for v in carried]:
        return [*new, *(_combined([v], v.nonnegative) for v in out[carry:])]
      carried = new

  def _note(self, operation: Operation, values: list[_Value]) -> list[_Value]:
    """Records the state that an operation divides by, and the differences that it divides by or takes the root of.

    Returns:
      The operands that it divides by.
    """
    name = operation.name
    if name in _LINEAR_ALGEBRA:
      self.exact |= jax_forms.union(v.stored for v in values)
    poles: list[_Value] = []
    if name in ("div", "rem", "atan2"):
      poles = values[1:]
    elif name in _POLES or name not in _KNOWN or (name == "integer_pow" and operation.eqn.params["y"] < 0):
      poles = values
    elif name == "pow":
      power = values[1].constant
      poles = values[:1] if power is None or power < 0 else []
      if power is None or not power.is_integer():
        self.exact |= values[0].differs
    if name in _ROOTS:
      self.exact |= values[0].differs
    below = _below(poles)
    self.divisors |= below
    self.exact |= jax_forms.union(v.differs for v in poles)
    if name == "div" and below:
      self.quotients.add((values[0].above, below))
    if name == "mul":
      self.quotients.update((x.above, y.below) for x, y in (values, values[::-1]) if x.above and y.below)
    return poles


def _below(divisors: Sequence[_Value]) -> int:
  """The leaves in the numerators of divisors, with `_LOW` if one of them can be smaller than any code."""
  return jax_forms.union(v.above | (0 if v.floored else _LOW) for v in divisors if v.above)


def _read(atom: Atom, env: dict[int, _Value]) -> _Value:
  return env[atom] if isinstance(atom, int) else _constant(atom.val)


def _outputs(program: Program, env: dict[int, _Value]) -> list[_Value]:
  return [_read(a, env) for a in program.outputs]


def _combined(values: Sequence[_Value], nonnegative: bool, terms: Any = None, number: float = 0.0) -> _Value:
  keys = ("stored", "differs", "above", "below")
  stored, differs, above, below = (jax_forms.union(getattr(v, key) for v in values) for key in keys)
  return _Value(nonnegative, stored, differs, above, below, all(v.floored for v in values), terms, number)


def _terms(operation: Operation, values: list[_Value]) -> list[tuple[_Value, float]] | None:
  """The values and factors whose sum a result is. None if the operation makes no such sum."""
  name = operation.name
  if name in ("add", "add_any"):
    return [(v, 1.0) for v in values]
  if name == "sub":
    return [(values[0], 1.0), (values[1], -1.0)]
  if name == "neg":
    return [(values[0], -1.0)]
  if name == "mul":
    for value, other in (values, values[::-1]):
      if other.constant is not None:
        return [(value, other.constant)]
  if name == "div" and values[1].constant:
    return [(values[0], 1 / values[1].constant)]
  is_same = name in _SAME and all(_is_float(v.aval) for v in (*operation.eqn.invars, *operation.eqn.outvars))
  if is_same or (name in _SPREAD and values[0].constant is not None):
    return [(values[0], 1.0)]
  return None


def _is_floored(name: str, values: list[_Value]) -> bool:
  known = [v.floored for v in values]
  if name in ("add", "add_any", "sub", "max"):
    return any(known)
  if name in ("mul", "div"):
    return (known[0] and not values[1].stored) or (name == "mul" and known[1] and not values[0].stored)
  if name in ("select_n", "min", "concatenate"):
    return all(known[name == "select_n" :])
  if name == "clamp":
    return known[1] and known[2]
  return name in _FLOORED and known[0]


def _is_float(aval: Any) -> bool:
  return jnp.issubdtype(aval.dtype, jnp.floating)


def _are_alike(x: _Value, y: _Value) -> bool:
  """Whether two values are equal up to a factor that is not negative, so that their product is not negative."""
  ours, theirs = ({**dict(v.parts), None: v.number} for v in (x, y))
  if ours.keys() != theirs.keys():
    return False
  known = [(ours[k], theirs[k]) for k in ours]
  a, b = max(known, key=lambda pair: abs(pair[0]))
  return a * b >= 0 and all(abs(c * b - d * a) <= 1e-12 * abs(a * b) for c, d in known)


def _is_nonnegative(operation: Operation, values: list[_Value]) -> bool:
  name, known = operation.name, [v.nonnegative for v in values]
  if name in _NEVER_NEGATIVE or (name == "mul" and _are_alike(*values)):
    return True
  if name == "integer_pow" and operation.eqn.params["y"] % 2 == 0:
    return True
  if name == "pow" and values[1].constant is not None and values[1].constant % 2 == 0:
    return True
  if name in _INDEXED or name == "integer_pow":
    return known[0]
  if name == "max":
    return any(known)
  if name == "clamp":  # lower bound, value, upper bound
    return (known[0] or known[1]) and known[2]
  if name == "select_n":
    return all(known[1:])
  if name == "dynamic_update_slice":
    return all(known[:2])
  return name in _KEEPS_SIGN and all(known)


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
    return _OTHER if program.aval(var).shape else 0

  bits = [4 << j if want else other(var) for j, (var, want) in enumerate(zip(leaves, wanted, strict=True))]
  believed = [start is not None and start.nonnegative for start in starts]
  while True:
    flow = _Flow()
    given = [_Value(stored=other(var), above=other(var)) for var in rest]
    given += [_Value(sign, b, above=b, floored=want) for sign, b, want in zip(believed, bits, wanted, strict=True)]
    new = _outputs(program, flow.run(program, given))[len(program.outputs) - count :]
    proven = [sign and value.nonnegative for sign, value in zip(believed, new, strict=True)]
    if proven == believed:
      break
    believed = proven
  divisors, small, exact = _closed(flow, list(zip(bits, new, strict=True)))
  held = _hold_weights(program, given, new, len(jax.tree.leaves(params)))

  def kind(bit: int, start: _Value | None, sign: bool, weights: bool) -> Kind:
    if start is None or weights or exact & bit:
      return False
    if sign and not small & bit:  # these codes have no zero: a divided zero would become nonzero
      return "nonnegative"
    return "wide" if (divisors | small) & bit else "signed"

  return [kind(*leaf) for leaf in zip(bits, starts, believed, held, strict=True)]


def _hold_weights(
  program: jax_forms.Program, given: Sequence[_Value], new: Sequence[_Value], leaves: int
) -> list[bool]:
  """Whether the new value of each leaf of the state depends on params and no gradients, or averages params and itself.

  Args:
    program: an update; its inputs are the gradients, as many params, other arguments, and the state.
    given: what is known of its inputs.
    new: what is proven about each leaf of the new state.
    leaves: how many params there are.
  """
  grads, params, first = 1, 2, len(given) - len(new)
  bits = [grads] * leaves + [params] * leaves + [0] * (len(given) - 2 * leaves)
  made = jax_forms.output_bits(program, jax_forms.dependencies(program, bits))[-len(new) :] if new else []
  weights = given[leaves : 2 * leaves]

  def is_average(value: _Value, old: _Value) -> bool:
    factors = dict(value.parts)
    of_params = sum(factors.get(w, 0.0) for w in weights)
    return of_params > 0 and abs(of_params + factors.get(old, 0.0) - 1) < 1e-6

  return [b == params or is_average(v, old) for b, v, old in zip(made, new, given[first:], strict=True)]


def _closed(flow: _Flow, new: Sequence[tuple[int, _Value]]) -> tuple[int, int, int]:
  """Extends what a program does with the state in one step to any number of steps.

  Args:
    flow: what it does in one step.
    new: each leaf of the state, as a bit, and its new value.

  Returns:
    Bit sets of the leaves that are divisors, of those that are divided, and of those that must not be rounded.
  """
  divisors, small, exact = flow.divisors & _STATE, 0, flow.exact & _STATE
  while True:
    before = divisors, small, exact
    for above, below in flow.quotients:
      if below & (exact | _LOW):
        exact |= above & _STATE
      else:
        small |= above & _STATE
    for bit, value in new:  # a divisor of the next step is computed from state of this one
      if divisors & bit:
        divisors |= value.stored & _STATE
        exact |= value.differs & _STATE
      if exact & bit:
        exact |= value.stored & _STATE
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
  new = jax_forms.output_bits(program, jax_forms.dependencies(program, bits))[len(program.outputs) - count :]
  return [b.bit_length() - 1 if b and not b & (b - 1) else None for b in new]


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _starts(inner: optax.GradientTransformation, params: PyTree, count: int) -> list[_Value | None]:
  """What is proven about each leaf of a new state; None for a leaf that is computed from the values of the params."""
  try:
    program, _ = jax_forms.trace(inner.init, params)
  except Exception:  # an `init` that reads concrete values may raise anything
    return [_Value() for _ in range(count)]
  values = [_Value(stored=_OTHER) for _ in program.inputs]  # a leaf computed from elements of a param gets this bit
  found = _outputs(program, _Flow().run(program, values))
  return [None if value.stored and value.constant is None else value for value in found]


def _update(inner: optax.GradientTransformationExtraArgs, params: PyTree, state: PyTree) -> Program | None:
  """The program of an update, whose last inputs and outputs are the state; None if it does not trace."""

  def update(grads: PyTree, params: PyTree, extra: dict[str, Any], state: PyTree) -> Any:
    return inner.update(grads, state, params, **extra)

  for extra in ({}, {"value": jax.ShapeDtypeStruct((), jnp.float32)}):
    try:
      program, (_, new) = jax_forms.trace(update, params, params, extra, state)
    except Exception:  # an update that lacks arguments or reads concrete values may raise anything
      continue
    return program if len(jax.tree.leaves(new)) == len(jax.tree.leaves(state)) else None
  return None
