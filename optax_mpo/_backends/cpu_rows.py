"""Updates a weight with 8-bit state a few rows at a time, on CPUs.

Why: XLA:CPU has no kernels with several results, so a value that is used more than once becomes an f32 array. For 8-bit
state these are the levels of the old codes, the new moments and the new master weights. For a large weight none of them
fits into the cache, and the system hands out their pages anew in every step, which takes longer than all arithmetic.

How: where `by_layer` proves that the update keeps the rows of a weight apart, a loop updates a few rows at a time and
writes them in place. What these rows need stays in the cache.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from optax_mpo._core import types, xla_cpu
from optax_mpo._core.annotations import Shaped, Values
from optax_mpo._program import by_layer, jax_forms
from optax_mpo._program.entries import Entries, NotSeparableError
from optax_mpo._program.program import Atom, Operation, Slice

ELEMENTS = 2**19
"""Elements that are updated at a time, at most: 2 MB for each f32 array."""

_SHARED = ELEMENTS // 8  # the most elements of an array that may be computed again for every few rows


class NotByRowsError(Exception):
  """An update that mixes rows, or that would compute a large array again for every few rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """The update of one weight by rows.

  Attributes:
    update: the update.
    axis: the axis of the rows, layers not counted.
    count: how many rows are updated at a time.
    stacked: whether this is the update of one layer of a stack, whose first axis is that of the layers.
    divisors: the numbers, and arrays filled with one, that divide in the plain update.
  """

  update: Slice
  axis: int
  count: int
  stacked: bool
  divisors: frozenset[int]

  def step(self, grad: jax.Array, stacks: Values, shared: Values, index: jax.Array) -> list[jax.Array]:
    """Updates the weight and its states, or their layer at `index`, and returns the new ones.

    Args:
      grad: the gradient; of one layer where the weight is a stack.
      stacks: the weight and its states.
      shared: the other values that the update reads.
      index: i32[], which layer; 0 where there are none. The update of a layer reads it as its last shared value.

    Raises:
      NotByRowsError: where the update cannot be done by rows.
    """
    length, layers = grad.shape[self.axis], int(self.stacked)
    dtypes = [x.dtype for x in stacks]
    handed = [*shared, *[index] * layers]

    def place(x: jax.Array, k: int, start: jax.Array) -> list[jax.Array]:
      starts: list[jax.Array] = [jnp.int32(0)] * x.ndim
      starts[layers + self.axis] = start
      if layers and _carried_dtype(dtypes[k]) == dtypes[k]:
        starts[0] = index
      return starts

    def cut(x: jax.Array, k: int, start: jax.Array) -> jax.Array:
      sizes = list(x.shape)
      sizes[layers + self.axis] = self.count
      if layers:
        sizes[0] = 1
      piece = lax.dynamic_slice(x, place(x, k, start), sizes)
      return lax.squeeze(piece, [0]) if layers else piece

    def body(i: jax.Array, stacks: list[jax.Array]) -> list[jax.Array]:
      start = xla_cpu.on_all_cores(i) * self.count

      def new(grad: jax.Array, stacks: list[jax.Array], shared: Values) -> list[jax.Array]:
        values = [_as(cut(x, k, start), dtypes[k]) for k, x in enumerate(stacks)]
        grad = lax.dynamic_slice_in_dim(grad, start, self.count, self.axis)
        return [_carried(x) for x in self._piece(grad, values, shared, start, length)]

      def old(grad: jax.Array, stacks: list[jax.Array], shared: Values) -> list[jax.Array]:
        return [cut(x, k, start) for k, x in enumerate(stacks)]

      # The first branch always runs, but XLA cannot know that. It does not fuse a branch with the writes below, for
      # which it would have to copy all that is overwritten.
      pieces = lax.cond(index + i + 1 > 0, new, old, grad, stacks, handed)
      if layers:
        pieces = [lax.expand_dims(x, [0]) for x in pieces]
      return [
        lax.dynamic_update_slice(x, y, place(x, k, start)) for k, (x, y) in enumerate(zip(stacks, pieces, strict=True))
      ]

    # The loop carries only the layer of a stack that is carried in another dtype.
    own = [bool(layers) and _carried_dtype(dtype) != dtype for dtype in dtypes]
    first = [lax.dynamic_slice_in_dim(x, index, 1, 0) if alone else x for x, alone in zip(stacks, own, strict=True)]
    results = lax.fori_loop(jnp.int32(0), jnp.int32(length // self.count), body, [_carried(x) for x in first])
    results = [_as(x, dtype) for x, dtype in zip(results, dtypes, strict=True)]
    return [
      lax.dynamic_update_slice_in_dim(stack, x, index, 0) if alone else x
      for stack, x, alone in zip(stacks, results, own, strict=True)
    ]

  def _piece(self, grad: jax.Array, values: Values, shared: Values, start: jax.Array, length: int) -> list[jax.Array]:
    """Returns the new values of some rows."""
    update = self.update
    env = update.constants | dict(zip(update.shared, shared, strict=True))
    env |= dict(zip(update.inputs, [grad, *values], strict=True))
    if self.count == length:  # all rows at once, which the update may mix
      self._run(env)
      return [jax_forms.value(a, env) for a in update.outputs]
    rows = Entries(self.axis, size=self.count)
    where: dict[int, Entries | None] = dict.fromkeys(update.inputs, rows)
    try:
      by_layer.run(update.operations, update.program, env, where, start, length - self.count + 1, True, self.divisors)
    except NotSeparableError as error:
      raise NotByRowsError(str(error)) from error
    alike: set[int] = set()  # large arrays filled with one scalar, which XLA never makes
    spread: set[int] = set()  # broadcasts and slices of them, which XLA never makes either

    def size(atom: Atom) -> int:
      return math.prod(update.program.aval(atom).shape)

    def is_cut(operation: Operation) -> bool:
      return operation.name in ("dynamic_slice", "slice", "squeeze")

    for operation in update.operations:
      large = [v for v in operation.outputs if v >= 0 and where.get(v) is None and size(v) > _SHARED]
      numbers = all(size(a) == 1 or (isinstance(a, int) and a in alike) for a in operation.inputs)
      if large and numbers and operation.name != "iota":
        alike.update(large)
      elif large and (operation.name == "broadcast_in_dim" or (is_cut(operation) and operation.inputs[0] in spread)):
        spread.update(large)
      elif large:
        raise NotByRowsError(f"{jax_forms.where(operation)} makes a large array that all rows share")
    results = []
    for atom in update.outputs:
      if not isinstance(atom, int) or where.get(atom) != rows:
        raise NotByRowsError("the update moves the rows")
      results.append(env[atom])
    return results

  def _run(self, env: dict[int, jax.Array]) -> None:
    """Runs the whole update, reading and writing `env`."""
    for operation in self.update.operations:
      values = [jax_forms.operand(a, env) for a in operation.inputs]
      divisor = operation.inputs[1] if operation.name == "div" else None
      if isinstance(divisor, int) and divisor in self.divisors:
        values = xla_cpu.kept_division(*values)
      results = jax_forms.run_operation(operation, values)
      env.update((v, r) for v, r in zip(operation.outputs, results, strict=True) if v >= 0)


def of_weight(update: Slice) -> Rows | None:
  """Returns the update of a weight by rows, if it has 8-bit state and is large enough."""
  return _rows_of(update, stacked=False) if _has_rows(update) and update.weight.size >= ELEMENTS else None


def of_layer(run: Callable[..., Values], avals: Sequence[Shaped], shared: Sequence[Shaped]) -> Rows | None:
  """Returns the update of one layer of a stack by rows, if the layer has 8-bit state.

  A small layer is updated in one piece. For it, only one thing matters: nothing is written before all is read.

  Args:
    run: `run(gradient, weight, *states, *shared)` returns the new weight and states.
    avals: the shapes of the gradient, the weight and the states of one layer.
    shared: the shapes of the other values that the update reads; the last one is the index of the layer.
  """
  if not _are_rows(avals):
    return None
  program, _ = jax_forms.trace(run, *avals, *shared)
  inputs, handed = program.inputs[: len(avals)], program.inputs[len(avals) :]
  update = Slice(program, program.operations, inputs, handed, program.constants, program.outputs)
  return _rows_of(update, stacked=True) if _has_rows(update) else None


def _has_rows(update: Slice) -> bool:
  """Whether the arrays of an update can be cut into rows, some are 8-bit state, and no constant is traced."""
  return _are_rows([update.program.aval(v) for v in update.inputs]) and not any(
    isinstance(c, Tracer) for c in update.constants.values()
  )


def _are_rows(avals: Sequence[Shaped]) -> bool:
  if len(avals) < 3:
    return False
  grad, weight, *states = avals
  in_blocks = any(a.dtype == jnp.uint16 and a.shape != weight.shape for a in states)
  packed = any(types.is_packed(a.dtype) for a in avals)  # XLA:CPU does not write those in place
  if not in_blocks or packed or len(weight.shape) < 2 or grad.dtype != weight.dtype:
    return False
  return all(len(a.shape) == len(weight.shape) and a.shape[:-1] == weight.shape[:-1] for a in avals)


def _rows_of(update: Slice, stacked: bool) -> Rows | None:
  shape = update.weight.shape
  axis = max(range(len(shape) - 1), key=lambda a: shape[a])
  length, size = shape[axis], math.prod(shape)
  most = min(ELEMENTS * length // size, length if stacked else length // 2)
  count = next((c for c in range(most, 0, -1) if length % c == 0), 0)
  return Rows(update, axis, count, stacked, _divisors(update, stacked)) if count * 8 > most else None


def _divisors(update: Slice, stacked: bool) -> frozenset[int]:
  """The divisors of one number that the plain update divides by: numbers that all layers or several leaves read."""
  program, found = update.program, set()
  reads = collections.Counter(a for o in program.operations for a in o.inputs if isinstance(a, int))
  filled = {o.outputs[0]: o.inputs[0] for o in update.operations if o.name == "broadcast_in_dim"}
  for operation in update.operations:
    divisor = operation.inputs[1] if operation.name == "div" else None
    if not isinstance(divisor, int):
      continue
    number = filled.get(divisor, divisor)
    if not isinstance(number, int) or program.aval(number).shape:
      continue
    is_read_by_others = number in update.shared if stacked else reads[number] > 1
    if is_read_by_others:
      found.add(divisor)
  return frozenset(found)


def _carried_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Integers for 16-bit floats: XLA:CPU of JAX 0.10 writes these by way of f32 arrays, of all rows each time."""
  return jnp.dtype(jnp.uint16) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2 else dtype


def _carried(x: jax.Array) -> jax.Array:
  return _as(x, _carried_dtype(x.dtype))


def _as(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
