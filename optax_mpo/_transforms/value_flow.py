"""Follows values through the program of an update: their signs, the state they come from, and what they are divided by.

Why: `state_flow` decides by this which state may be rounded.

How: what is proven about the results of an operation follows from what is proven about its operands. Nothing is proven
by an operation that is not known, and it may divide by its operands.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Atom, Operation, Program

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
OTHER, LOW = 1, 2  # bits: an array that is not stored; a divisor that can be smaller than any code
STATE = ~(OTHER | LOW)
_SAME = frozenset("convert_element_type copy copy_p stop_gradient held laid_out row_major".split())
_FLOORED = _SAME | frozenset(
  """abs neg sqrt cbrt square integer_pow pow broadcast_in_dim reshape squeeze expand_dims transpose slice dynamic_slice
  gather rev sharding_constraint reduce_precision""".split()
)
_SPREAD = frozenset("broadcast_in_dim reshape squeeze expand_dims".split())


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """What is proven about a value.

  Attributes:
    nonnegative: whether no element is negative.
    stored: the leaves of the state that it is computed from, element by element, as a bit set; `OTHER` stands for
      arrays that are not stored.
    differs: the leaves in `stored` of which it may be a small difference.
    above: the leaves in `stored` that are in its numerators.
    below: the leaves in its denominators, and `LOW`.
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
  terms: tuple[tuple["Value", float], ...] | None = None
  number: float = 0.0

  @property
  def parts(self) -> tuple[tuple["Value", float], ...]:
    """The values and factors whose sum it is, without `number`."""
    return ((self, 1.0),) if self.terms is None else self.terms

  @property
  def known(self) -> tuple[bool | int, ...]:
    """All that is proven about it, except `terms` and `number`."""
    return self.nonnegative, self.stored, self.differs, self.above, self.below, self.floored

  @property
  def constant(self) -> float | None:
    """The value of all its elements, if it is one known number."""
    return self.number if self.terms == () else None


Terms = tuple[tuple[Value, float], ...]


def _sum(terms: Sequence[tuple[Value, float]]) -> tuple[Terms, float]:
  """Adds values with factors. Returns the terms whose factor is not zero, and a constant."""
  factors: dict[Value, float] = {}
  number = 0.0
  for value, factor in terms:
    number += factor * value.number if value.terms is not None else 0.0
    for part, inner in value.parts:
      factors[part] = factors.get(part, 0.0) + factor * inner
  return tuple((v, f) for v, f in factors.items() if f), number


def _constant(value: ArrayLike) -> Value:
  """What is known of a literal, or of an array that the program closes over."""
  if isinstance(value, Tracer):
    return Value()
  try:
    array = np.asarray(value).astype(np.float64)
  except (TypeError, ValueError):  # random keys, for example
    return Value()
  if array.size and array.min() == array.max():
    return Value(bool(array.min() >= 0), terms=(), number=float(array.min()))
  return Value(bool((array >= 0).all()))


class Flow:
  """Follows values through programs.

  Attributes:
    divisors: the leaves of the state that something is divided by, element by element, as a bit set.
    exact: the leaves for which no rounding is safe.
    quotients: for each division of state the leaves above and below, as bit sets.
  """

  def __init__(self) -> None:
    self.divisors = self.exact = 0
    self.quotients: set[tuple[int, int]] = set()

  def run(self, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """Returns what is proven about each output of a program."""
    env = {v: _constant(c) for v, c in program.constants.items()} | dict(zip(program.inputs, inputs, strict=True))
    for operation in program.operations:
      results = self._results(operation, [_read(a, env) for a in operation.inputs])
      env.update((v, r) for v, r in zip(operation.outputs, results, strict=True) if v >= 0)
    return [_read(a, env) for a in program.outputs]

  def _results(self, operation: Operation, values: list[Value]) -> list[Value]:
    name = operation.name
    if name == "optimization_barrier":
      return values
    if name == "cond":
      found = [self.run(body, values[1:]) for body in operation.bodies]
      return [_combined(each, all(v.nonnegative for v in each)) for each in zip(*found, strict=True)]
    scan = jax_forms.read_scan(operation) if name == "scan" else None
    if scan is not None:
      return self._scan(*scan, values)
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
    if name in ("add", "add_any", "sub") and not certain and all(v.stored & STATE for v in values):
      result = dataclasses.replace(result, differs=result.stored)
    result = dataclasses.replace(result, floored=_is_floored(name, values))
    if poles:
      above = dataflow.union(v.above for v in values if v not in poles)
      result = dataclasses.replace(
        result,
        above=above | dataflow.union(v.below & ~LOW for v in poles),
        below=dataflow.union(v.below for v in values if v not in poles) | _below(poles),
      )
    return [dataclasses.replace(result) for _ in operation.outputs]  # compared by identity

  def _scan(self, consts: int, carry: int, body: Program, values: list[Value]) -> list[Value]:
    end = consts + carry
    carried = values[consts:end]
    while True:
      out = self.run(body, [*values[:consts], *carried, *values[end:]])
      pairs = list(zip(carried, out, strict=False))
      new = [_combined(pair, all(v.nonnegative for v in pair)) for pair in pairs]
      if [v.known for v in new] == [v.known for v in carried]:
        return [*new, *(_combined([v], v.nonnegative) for v in out[carry:])]
      carried = new

  def _note(self, operation: Operation, values: list[Value]) -> list[Value]:
    """Records the state that an operation divides by, and the differences that it divides by or takes the root of.

    Returns:
      The operands that it divides by.
    """
    name = operation.name
    if name in _LINEAR_ALGEBRA:
      self.exact |= dataflow.union(v.stored for v in values)
    poles: list[Value] = []
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
    self.exact |= dataflow.union(v.differs for v in poles)
    if name == "div" and below:
      self.quotients.add((values[0].above, below))
    if name == "mul":
      self.quotients.update((x.above, y.below) for x, y in (values, values[::-1]) if x.above and y.below)
    return poles


def _below(divisors: Sequence[Value]) -> int:
  """The leaves in the numerators of divisors, with `LOW` if one of them can be smaller than any code."""
  return dataflow.union(v.above | (0 if v.floored else LOW) for v in divisors if v.above)


def _read(atom: Atom, env: dict[int, Value]) -> Value:
  return env[atom] if isinstance(atom, int) else _constant(atom.val)


def _combined(values: Sequence[Value], nonnegative: bool, terms: Terms | None = None, number: float = 0.0) -> Value:
  keys = ("stored", "differs", "above", "below")
  stored, differs, above, below = (dataflow.union(getattr(v, key) for v in values) for key in keys)
  return Value(nonnegative, stored, differs, above, below, all(v.floored for v in values), terms, number)


def _terms(operation: Operation, values: list[Value]) -> list[tuple[Value, float]] | None:
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


def _is_floored(name: str, values: list[Value]) -> bool:
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


def _are_alike(x: Value, y: Value) -> bool:
  """Whether two values are equal up to a factor that is not negative, so that their product is not negative."""
  ours, theirs = ({**dict(v.parts), None: v.number} for v in (x, y))
  if ours.keys() != theirs.keys():
    return False
  known = [(ours[k], theirs[k]) for k in ours]
  a, b = max(known, key=lambda pair: abs(pair[0]))
  return a * b >= 0 and all(abs(c * b - d * a) <= 1e-12 * abs(a * b) for c, d in known)


def _is_nonnegative(operation: Operation, values: list[Value]) -> bool:
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
