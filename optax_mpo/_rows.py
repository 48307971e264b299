"""Steps a weight with 8-bit state a few rows at a time, on CPUs.

Why: XLA:CPU has no kernels with several results, so that what is used more than once is an f32 array: of 8-bit state
that are the levels of old codes, new moments and new master weights. For a large weight none of them fits into the
cache, and the system has to hand out the pages of each in every step, which takes longer than all of the arithmetic.

How: where the update keeps the rows of a weight apart, as `_stacked` proves, a loop steps a few at a time, so that what
they need stays in the cache, and writes them in place.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from optax_mpo import _jaxpr, _stacked

ELEMENTS = 2**19
"""Elements that are stepped at a time, or somewhat less: 2 MB for each array of f32."""

_SHARED = 2**14  # elements of what may be computed anew for every few rows


class NotByRowsError(Exception):
  """An update that does not keep rows apart, or that would compute something large for each few of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """The update of one weight by rows.

  Attributes:
    group: the update, a `_separable.Group` of one leaf.
    axis: the axis of the rows.
    count: how many rows are stepped at a time.
  """

  group: Any
  axis: int
  count: int

  def step(self, grad: Any, stacks: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    """Steps the weight and its states, and returns the new ones.

    Raises:
      NotByRowsError: where it cannot be done by rows.
    """
    length = stacks[0].shape[self.axis]
    dtypes = [x.dtype for x in stacks]

    def body(i: Any, stacks: list[Any]) -> list[Any]:
      start = i * self.count

      def cut(x: Any) -> Any:
        return lax.dynamic_slice_in_dim(x, start, self.count, self.axis)

      def new(grad: Any, stacks: list[Any], shared: Sequence[Any]) -> list[Any]:
        values = [_as(cut(x), dtype) for x, dtype in zip(stacks, dtypes, strict=True)]
        return [_carried(x) for x in self._piece(cut(grad), values, shared, start, length)]

      def old(grad: Any, stacks: list[Any], shared: Sequence[Any]) -> list[Any]:
        return [cut(x) for x in stacks]

      # Always the first one, which XLA does not know: what is in a branch it does not mix with the writing below, for
      # which it would have to copy all that is written over.
      pieces = lax.cond(i + 1 > 0, new, old, grad, stacks, list(shared))
      return [lax.dynamic_update_slice_in_dim(x, y, start, self.axis) for x, y in zip(stacks, pieces, strict=True)]

    results = lax.fori_loop(0, length // self.count, body, [_carried(x) for x in stacks])
    return [_as(x, dtype) for x, dtype in zip(results, dtypes, strict=True)]

  def _piece(self, grad: Any, values: Sequence[Any], shared: Sequence[Any], start: Any, length: int) -> list[Any]:
    """The new values of some rows."""
    group = self.group
    env = group.constants | dict(zip(group.shared, shared, strict=True))
    env |= dict(zip(group.inputs, [grad, *values], strict=True))
    axes: dict[int, int | None] = dict.fromkeys(group.inputs, self.axis)
    try:
      _stacked.run(group.operations, group.program, env, axes, start, length, self.count)
    except _stacked.NotSeparableError as error:
      raise NotByRowsError(str(error)) from error
    alike: set[int] = set()  # large arrays of one number, which XLA never makes

    def size(atom: _jaxpr.Atom) -> int:
      return math.prod(group.program.aval(atom).shape)

    for operation in group.operations:
      large = [v for v in operation.outputs if v >= 0 and axes.get(v) is None and size(v) > _SHARED]
      numbers = all(size(a) == 1 or (isinstance(a, int) and a in alike) for a in operation.inputs)
      if large and numbers and operation.name != "iota":
        alike.update(large)
      elif large and operation.name != "broadcast_in_dim":
        raise NotByRowsError(f"{_jaxpr.where(operation)} makes a large array that all rows share")
    results = []
    for atom in group.outputs:
      if not isinstance(atom, int) or axes.get(atom) != self.axis:
        raise NotByRowsError("the update moves the rows")
      results.append(env[atom])
    return results


def of_group(group: Any) -> Rows | None:
  """The update of a group by rows, if it has one weight, with 8-bit state and large enough for it to matter."""
  avals = [group.program.aval(v) for v in group.inputs]
  if len(group.leaves) != 1 or len(avals) < 3 or any(isinstance(c, Tracer) for c in group.constants.values()):
    return None
  weight = avals[1]
  in_blocks = any(a.dtype == jnp.uint16 and a.shape != weight.shape for a in avals[2:])
  packed = any(a.dtype.name in ("int4", "uint4") for a in avals)  # XLA:CPU does not write those in place
  if not in_blocks or packed or weight.ndim < 2 or weight.size < ELEMENTS or avals[0].dtype != weight.dtype:
    return None
  if any(a.ndim != weight.ndim or a.shape[:-1] != weight.shape[:-1] for a in avals):
    return None
  axis = max(range(weight.ndim - 1), key=lambda a: weight.shape[a])
  length = weight.shape[axis]
  most = min(ELEMENTS * length // weight.size, length // 2)
  count = next((c for c in range(most, 0, -1) if length % c == 0), 0)
  return Rows(group, axis, count) if count * 8 > most else None


def _carried(x: Any) -> Any:
  """Floats of 16 bits as integers: XLA:CPU writes the former by way of f32 arrays, of all rows each time."""
  return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def _as(x: Any, dtype: Any) -> Any:
  return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
