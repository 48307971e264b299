"""Runs the update of a stack of layers for one layer at a time, where the result is provably the same.

Why: the weights of scanned layers are stacked, `[layers, ...]`, and so are their moments. The backward pass of the scan
has the gradient of one layer at a time, and should update that layer's weights at once. But Optax's update is for the
whole stack. Traced again for one layer, it could mean something else: a weight decay mask by rank would see scales as
scalars, adafactor would factor other axes.

How: run the operations of the update one by one on arrays whose layer axis has size 1 (a few, for rows), and track that
axis: elementwise operations keep it, a transpose moves it, in a product it may be a batch axis. An operation that mixes
layers (a sum over that axis, say) or is not known is refused by name. Arrays that do not depend on the layer are sliced
at its index where they meet ones that do.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from optax_mpo._core import xla_cpu
from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Operation, Program

ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
  convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt held igamma
  igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not one_minus_square
  or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
  shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
  mul_add psum psum_invariant pmax pmin pvary""".split()
)

_REDUCTIONS = frozenset(
  """reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin reduce""".split()
)
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())

Axis = int | None  # the position of an array's layer axis, or None


class NotSeparableError(Exception):
  """An update of stacked layers that cannot be run for one layer alone. The message names the operation."""


class _Layer:
  """One layer of a stack of `length`, or `size` consecutive ones, from `index` on."""

  def __init__(self, index: Any, length: int, size: int):
    self.index, self.length, self.size = index, length, size

  def cut(self, value: Any, axis: int) -> Any:
    """Slices this layer out of an array that does not depend on the layer."""
    if value.shape[axis] == 1:  # the same for all layers, or there is only one
      return value
    return lax.dynamic_slice_in_dim(value, self.index, self.size, axis)

  def shape(self, shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """The shape for this layer, from the shape for all layers."""
    return (*shape[:axis], self.size, *shape[axis + 1 :])


def run(
  operations: Sequence[Operation],
  program: Program,
  env: dict[int, Any],
  axes: dict[int, Axis],
  index: Any,
  length: int,
  size: int = 1,
) -> None:
  """Runs operations for one layer, or for several consecutive ones.

  Args:
    operations: the operations, in order.
    program: the program they are from.
    env: the values of variables, read and written; their layer axes have length `size`.
    axes: the layer axis of each variable in `env`, read and written; a missing variable has none.
    index: i32[], the first layer to run.
    length: the number of layers.
    size: the number of layers to run.

  Raises:
    NotSeparableError: if an operation mixes layers or is not known.
  """
  layer = _Layer(index, length, size)

  for operation in operations:
    values = [jax_forms.operand(a, env) for a in operation.inputs]
    where = [axes.get(a) if isinstance(a, int) else None for a in operation.inputs]
    if all(a is None for a in where):
      results, out = jax_forms.run_operation(operation, values), [None] * len(operation.outputs)
    else:
      results, out = _rule(operation)(operation, values, where, layer, [program.aval(a) for a in operation.inputs])
    for var, result, axis in zip(operation.outputs, results, out, strict=True):
      if var >= 0:
        env[var], axes[var] = result, axis


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of an update, run and written before the next part is read.

  Attributes:
    inputs: the variables of gradients, weights and states. A new state that is already written replaces the old one.
    outputs: the indices of the update's outputs that it makes.
    operations: its operations.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  operations: tuple[Operation, ...]


def parts(
  program: Program,
  inputs: Sequence[int],
  outputs: Sequence[Atom],
  places: dict[int, int],
  given: set[int],
) -> list[Part]:
  """Splits an update into parts that can be run and written one after the other, each over what it has read.

  Why: XLA:GPU writes each stack in a kernel of its own, and would compute all new values before the first write. If
  nothing later needs an old moment, the new one is written first, and then read again in its place.

  Args:
    program: the program of the update.
    inputs: the variables of gradients, weights and states.
    outputs: the atoms of new weights and states.
    places: for each output that is a new state, the index of the input that it replaces.
    given: the variables that are known besides the inputs.
  """

  def part(inputs: Sequence[int], chosen: Sequence[int]) -> Part:
    operations = jax_forms.slice_of(program, [outputs[k] for k in chosen], {*given, *inputs})
    return Part(tuple(inputs), tuple(chosen), tuple(operations))

  now, left, found = list(inputs), list(range(len(outputs))), []
  for k, place in places.items():
    new = outputs[k]
    if not isinstance(new, int) or new in inputs:
      continue
    after = [*now[:place], new, *now[place + 1 :]]
    rest = [o for o in left if o != k]
    if now[place] in jax_forms.read_by(part(after, rest).operations, [outputs[o] for o in rest]):
      continue
    found.append(part(now, [k]))
    now, left = after, rest
  return [*found, part(now, left)]


_Rule = Callable[[Operation, list[Any], list[Axis], _Layer, list[Any]], tuple[list[Any], list[Axis]]]


def _rule(operation: Operation) -> _Rule:
  name = operation.name
  if name in ELEMENTWISE:
    return _elementwise
  if name in _REDUCTIONS:
    return _reduction
  if name in _CUMULATIVE:
    return _cumulative
  rule = _RULES.get(name)
  if rule is None:
    raise NotSeparableError(f"{jax_forms.where(operation)} is not known to keep layers apart")
  return rule


def _mixes(operation: Operation) -> NotSeparableError:
  return NotSeparableError(f"{jax_forms.where(operation)} mixes the layers")


def _elementwise(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  axis = next(a for a in axes if a is not None)
  same = []
  for value, found, aval in zip(values, axes, avals, strict=True):
    if found is None and aval.ndim:
      value = layer.cut(value, axis)
    elif found not in (None, axis):
      raise _mixes(operation)
    same.append(value)
  changes = {}
  if operation.eqn.params.get("sharding") is not None:
    changes["sharding"] = None
  results = jax_forms.run_operation(operation, same, **changes)
  return results, [axis] * len(results)


def _barrier(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  # Only CPUs update by rows, and XLA:CPU removes barriers once it has eliminated common subexpressions.
  return values if layer.size > 1 else jax_forms.run_operation(operation, values), axes


def _constraint(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  return values, axes  # the sharding of a stack says nothing about one layer


def _laid_out(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  # The backward pass makes a layer's gradient by itself; rows are sliced from a gradient that is already in order.
  return values if layer.size > 1 else [xla_cpu.laid_out(*values)], axes


def _reduction(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  name = "dimensions" if operation.name == "reduce" else "axes"
  reduced = operation.eqn.params[name]
  axis = next(a for a in axes if a is not None)
  if axis in reduced or any(a not in (None, axis) for a in axes):
    raise _mixes(operation)
  values = [
    layer.cut(v, axis) if a is None and aval.ndim else v for v, a, aval in zip(values, axes, avals, strict=True)
  ]
  results = jax_forms.run_operation(operation, values)
  return results, [axis - sum(r < axis for r in reduced)] * len(results)


def _cumulative(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  if operation.eqn.params["axis"] == axes[0]:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), axes


def _broadcast_in_dim(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  params = operation.eqn.params
  assert axes[0] is not None
  axis = params["broadcast_dimensions"][axes[0]]
  if params["shape"][axis] != layer.length:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values, shape=layer.shape(params["shape"], axis), sharding=None), [axis]


def _reshape(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  new, axis, old = operation.eqn.params["new_sizes"], axes[0], avals[0].shape
  before = math.prod(old[:axis])
  for i, size in enumerate(new):
    if size == layer.length and math.prod(new[:i]) == before and operation.eqn.params.get("dimensions") is None:
      return jax_forms.run_operation(operation, values, new_sizes=layer.shape(new, i), sharding=None), [i]
  raise _mixes(operation)


def _transpose(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  return jax_forms.run_operation(operation, values), [operation.eqn.params["permutation"].index(axes[0])]


def _squeeze(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  axis, gone = axes[0], operation.eqn.params["dimensions"]
  if axis in gone:
    raise _mixes(operation)
  assert axis is not None
  return jax_forms.run_operation(operation, values), [axis - sum(d < axis for d in gone)]


def _concatenate(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  axis = next(a for a in axes if a is not None)
  if operation.eqn.params["dimension"] == axis:
    raise _mixes(operation)
  return _elementwise(operation, values, axes, layer, avals)


def _slice(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  params, axis = operation.eqn.params, axes[0]
  assert axis is not None
  whole = params["start_indices"][axis] == 0 and params["limit_indices"][axis] == layer.length
  if not whole or (params["strides"] or {axis: 1})[axis] != 1:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values, limit_indices=layer.shape(params["limit_indices"], axis)), axes


def _pad(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  axis = axes[0]
  if axis is None or axes[1] is not None or operation.eqn.params["padding_config"][axis] != (0, 0, 0):
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), [axis]


def _rev(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  if axes[0] in operation.eqn.params["dimensions"]:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), axes


def _sort(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  if operation.eqn.params["dimension"] == next(a for a in axes if a is not None):
    raise _mixes(operation)
  return _elementwise(operation, values, axes, layer, avals)


def _bitcast_convert_type(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  # A conversion to a narrower type adds a last axis, one to a wider type removes it; the other axes stay.
  if operation.eqn.outvars[0].aval.ndim == axes[0]:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), axes


def _dot_general(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  contracted, batch = operation.eqn.params["dimension_numbers"]
  out: set[int] = set()
  free = len(batch[0])
  for side in (0, 1):
    axis, ndim = axes[side], avals[side].ndim
    if axis in contracted[side]:
      raise _mixes(operation)
    if axis in batch[side]:
      position = list(batch[side]).index(axis)
      other = 1 - side
      if axes[other] is None:
        values[other] = layer.cut(values[other], batch[other][position])
      elif axes[other] != batch[other][position]:
        raise _mixes(operation)
      out.add(position)
    frees = [d for d in range(ndim) if d not in contracted[side] and d not in batch[side]]
    if axis in frees:
      out.add(free + frees.index(axis))
    free += len(frees)
  if len(out) != 1:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values, out_sharding=None), [out.pop()]


def _cond(
  operation: Operation, values: list[Any], axes: list[Axis], layer: _Layer, avals: list[Any]
) -> tuple[list[Any], list[Axis]]:
  if axes[0] is not None:
    raise _mixes(operation)
  branches = operation.bodies
  found: list[list[Axis]] = []

  def branch(program: Program, out: list[Axis] | None) -> Callable[..., list[Any]]:
    def apply(index: Any, *operands: Any) -> list[Any]:
      env = dict(program.constants) | dict(zip(program.inputs, operands, strict=True))
      inner: dict[int, Axis] = dict(zip(program.inputs, axes[1:], strict=True))
      run(program.operations, program, env, inner, index, layer.length, layer.size)
      results = [jax_forms.value(a, env) for a in program.outputs]
      result_axes = [inner.get(a) if isinstance(a, int) else None for a in program.outputs]
      if out is None:
        found.append(result_axes)
        return results
      here = _Layer(index, layer.length, layer.size)
      return [
        here.cut(r, a) if a is not None and had is None else r
        for r, a, had in zip(results, out, result_axes, strict=True)
      ]

    return apply

  for program in branches:
    jax.eval_shape(branch(program, None), layer.index, *values[1:])
  out = [next((a for a in choices if a is not None), None) for choices in zip(*found, strict=True)]
  if any(a not in (None, o) for choices in found for a, o in zip(choices, out, strict=True)):
    raise _mixes(operation)
  return lax.switch(values[0], [branch(p, out) for p in branches], layer.index, *values[1:]), out


_RULES: dict[str, _Rule] = {
  "optimization_barrier": _barrier,
  "sharding_constraint": _constraint,
  "laid_out": _laid_out,
  "bitcast_convert_type": _bitcast_convert_type,
  "broadcast_in_dim": _broadcast_in_dim,
  "reshape": _reshape,
  "transpose": _transpose,
  "squeeze": _squeeze,
  "concatenate": _concatenate,
  "slice": _slice,
  "pad": _pad,
  "rev": _rev,
  "sort": _sort,
  "dot_general": _dot_general,
  "cond": _cond,
}
