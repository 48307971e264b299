"""What each operation does to the layers of a stack: keeps them apart, moves their axis, or mixes them.

Why: `by_layer` runs the update of a stack for one layer at a time. It has to know, operation by operation, that the
result for a layer depends on this layer alone, and where in the result it lies.

How: one rule for each operation. A rule gets the values for one layer, with their `Entries`, and the types of the whole
arrays. It returns the results for this layer, with theirs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax import lax

from optax_mpo._core import order, xla_cpu
from optax_mpo._core.annotations import Index, Shaped
from optax_mpo._program import jax_forms
from optax_mpo._program.entries import Entries, NotSeparableError, Where
from optax_mpo._program.program import Operation, Program, type_of

ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
  convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
  held igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not
  one_minus_square or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round
  rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
  tan tanh xor mul_add psum psum_invariant pmax pmin pvary""".split()
)

_REDUCTIONS = frozenset(
  """reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin reduce""".split()
)
_CUT = "scan these in a scan of their own, without other arrays"
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Layer:
  """The layer that rules run for.

  Attributes:
    index: i32[], which layer.
    count: the number of layers.
    is_rows: whether "layers" are rows of one weight, as for `cpu_rows`.
    divisors: the variables that have to divide, as for `xla_cpu.kept_division`.
    run: `by_layer.run`, for operations that contain others.
  """

  index: Index
  count: int
  is_rows: bool
  divisors: frozenset[int]
  run: Callable[..., None]

  def cut(self, value: jax.Array, entries: Entries) -> jax.Array:
    """Slices this layer out of an array that does not depend on the layer; several entries as they lie there."""
    if value.shape[entries.axis] == 1:  # the same for all layers, or there is only one
      return value
    part = lax.dynamic_slice_in_dim(value, entries.first(self.index), entries.size, entries.axis)
    return part if entries.size == 1 or self.is_rows else order.as_they_lie([part])[0]


def _with(items: Sequence[_Item], axis: int, item: _Item) -> tuple[_Item, ...]:
  """The items, with another one at `axis`."""
  return (*items[:axis], item, *items[axis + 1 :])


Arrays = list[jax.Array]
Wheres = Sequence[Where]
Types = Sequence[Shaped]
_Result = tuple[Arrays, Wheres]
Rule = Callable[[Operation, Arrays, Wheres, Layer, Types], _Result]


def rule_of(operation: Operation) -> Rule:
  """The rule of an operation. Raises NotSeparableError where there is none."""
  name = operation.name
  if name in _RULES:
    return _RULES[name]
  if name in ELEMENTWISE:
    return _elementwise
  if name in _REDUCTIONS:
    return _reduction
  if name in _CUMULATIVE:
    return _cumulative
  raise NotSeparableError(
    f"{jax_forms.where(operation)} is not known to keep layers apart: do it for one layer at a time"
  )


def _mixes(operation: Operation) -> NotSeparableError:
  return NotSeparableError(f"{jax_forms.where(operation)} mixes the layers: do it for one layer at a time")


def _takes_some(operation: Operation) -> NotSeparableError:
  return NotSeparableError(f"{jax_forms.where(operation)} takes some of the layers: {_CUT}")


def _alike(
  operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types
) -> tuple[list[jax.Array], Entries]:
  """The operands of one shape, each for this layer, and where the layer lies in all of them."""
  entries = next(e for e in where if e is not None)
  if any(e not in (None, entries) for e in where):
    raise (_takes_some if any(e is not None and e.without != (0, 0) for e in where) else _mixes)(operation)
  cut = [
    layer.cut(v, entries) if e is None and aval.ndim else v for v, e, aval in zip(values, where, avals, strict=True)
  ]
  return cut, entries


def _elementwise(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  values, entries = _alike(operation, values, where, layer, avals)
  changes = {"sharding": None} if operation.eqn.params.get("sharding") is not None else {}
  results = jax_forms.run_operation(operation, values, **changes)
  return results, [entries] * len(results)


def _div(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  divisor = operation.inputs[1]
  if isinstance(divisor, int) and divisor in layer.divisors and where[1] is None:
    values, entries = _alike(operation, values, where, layer, avals)
    values, where = xla_cpu.kept_division(*values), [entries, entries]
  return _elementwise(operation, values, where, layer, avals)


def _barrier(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  # Only CPUs update by rows, and XLA:CPU removes barriers once it has eliminated common subexpressions.
  return values if layer.is_rows else jax_forms.run_operation(operation, values), where


def _constraint(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  return values, where  # the sharding of a stack says nothing about one layer


def _laid_out(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  # The backward pass makes a layer's gradient by itself; rows are sliced from a gradient that is already in order.
  return values if layer.is_rows else [xla_cpu.laid_out(*values)], where


def _reduction(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  reduced = operation.eqn.params["dimensions" if operation.name == "reduce" else "axes"]
  values, entries = _alike(operation, values, where, layer, avals)
  if entries.axis in reduced:
    raise _mixes(operation)
  results = jax_forms.run_operation(operation, values)
  return results, [entries.on(entries.axis - sum(r < entries.axis for r in reduced))] * len(results)


def _cumulative(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  (entries,) = where
  assert entries is not None
  if operation.eqn.params["axis"] == entries.axis:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), where


def _broadcast_in_dim(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  params, entries = operation.eqn.params, where[0]
  assert entries is not None
  axis = params["broadcast_dimensions"][entries.axis]
  if params["shape"][axis] != avals[0].shape[entries.axis]:
    raise _mixes(operation)
  shape = _with(params["shape"], axis, entries.size)
  return jax_forms.run_operation(operation, values, shape=shape, sharding=None), [entries.on(axis)]


def _reshape(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  new, (entries,) = operation.eqn.params["new_sizes"], where
  assert entries is not None
  found = entries.reshaped(avals[0].shape, new) if operation.eqn.params.get("dimensions") is None else None
  if found is None:
    raise _mixes(operation)
  shape = _with(new, found.axis, found.size)
  return jax_forms.run_operation(operation, values, new_sizes=shape, sharding=None), [found]


def _transpose(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  (entries,) = where
  assert entries is not None
  axis = operation.eqn.params["permutation"].index(entries.axis)
  return jax_forms.run_operation(operation, values), [entries.on(axis)]


def _squeeze(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  (entries,), gone = where, operation.eqn.params["dimensions"]
  assert entries is not None
  if entries.axis in gone:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), [entries.on(entries.axis - sum(d < entries.axis for d in gone))]


def _concatenate(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  dimension = operation.eqn.params["dimension"]
  if all(e is None or e.axis != dimension for e in where):
    return _elementwise(operation, values, where, layer, avals)
  lengths = [aval.shape[dimension] for aval in avals]
  starts = [sum(lengths[:k]) for k in range(len(lengths))]
  k, entries = next((k, e) for k, e in enumerate(where) if e is not None)
  found = entries.spread(starts[k], 1)
  parts = [found._replace(without=(0, 0)).cut(o, o + n, layer.count) for o, n in zip(starts, lengths, strict=True)]
  others = [j for j, part in enumerate(parts) if j != k and (part is None or part.layers(layer.count))]
  if not others and all(e is None for j, e in enumerate(where) if j != k):
    return [values[k]], [found]  # the layers are all in this operand
  if any(part is None or e not in (None, part) for e, part in zip(where, parts, strict=True)):
    raise _mixes(operation)
  value = values[k]
  for j, part in enumerate(parts):
    if j in others and part is not None:
      other = layer.cut(values[j], part) if where[j] is None else values[j]
      value = lax.select_n(part.exist(layer.index, layer.count), value, other)
  return [value], [found._replace(without=(0, 0)).cut(0, sum(lengths), layer.count)]


def _slice(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  params, (entries,) = operation.eqn.params, where
  assert entries is not None
  axis, start, limit, strides = entries.axis, params["start_indices"], params["limit_indices"], params["strides"]
  stride = strides[axis] if strides else 1
  moved = entries.cut(start[axis], limit[axis], layer.count)
  if moved is None or moved.start % stride or moved.stride % stride:
    raise _takes_some(operation)
  if stride > 1 and entries.size > 1:
    raise _mixes(operation)
  changes = {"start_indices": _with(start, axis, 0), "limit_indices": _with(limit, axis, entries.size)}
  changes |= {"strides": _with(strides, axis, 1)} if strides else {}
  found = moved._replace(start=moved.start // stride, stride=moved.stride // stride)
  return jax_forms.run_operation(operation, values, **changes), [found]


def _split(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  axis, (entries,) = operation.eqn.params["axis"], where
  assert entries is not None
  if axis != entries.axis:
    results = jax_forms.run_operation(operation, values)
    return results, [entries] * len(results)
  sizes = operation.eqn.params["sizes"]
  found = [entries.cut(sum(sizes[:k]), sum(sizes[: k + 1]), layer.count) for k in range(len(sizes))]
  if any(e is None for e in found):
    raise _takes_some(operation)
  return [values[0]] * len(sizes), found


def _pad(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  entries, config = where[0], operation.eqn.params["padding_config"]
  if entries is None or where[1] is not None:
    raise _mixes(operation)
  low, high, interior = config[entries.axis]
  step = interior + 1
  moved = entries.spread(low, step).cut(0, low + high + (avals[0].shape[entries.axis] - 1) * step + 1, layer.count)
  if moved is None or (interior and entries.size > 1):
    raise _takes_some(operation)
  config = _with(config, entries.axis, (0, 0, 0))
  return jax_forms.run_operation(operation, values, padding_config=config), [moved]


def _rev(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  (entries,) = where
  assert entries is not None
  if entries.axis in operation.eqn.params["dimensions"]:
    entries = entries.reversed(avals[0].shape[entries.axis])
  return jax_forms.run_operation(operation, values), [entries]


def _sort(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  if any(e is not None and e.axis == operation.eqn.params["dimension"] for e in where):
    raise _mixes(operation)
  return _elementwise(operation, values, where, layer, avals)


def _bitcast_convert_type(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  # A conversion to a narrower type adds a last axis, one to a wider type removes it; the other axes stay.
  (entries,) = where
  assert entries is not None
  if type_of(operation.eqn.outvars[0]).ndim == entries.axis:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values), where


def _dot_general(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  contracted, batch = operation.eqn.params["dimension_numbers"]
  out: set[Entries] = set()
  free = len(batch[0])
  for side in (0, 1):
    entries, ndim = where[side], avals[side].ndim
    frees = [d for d in range(ndim) if d not in contracted[side] and d not in batch[side]]
    if entries is not None and entries.axis in contracted[side]:
      raise _mixes(operation)
    if entries is not None and entries.axis in batch[side]:
      position, other = list(batch[side]).index(entries.axis), 1 - side
      same = entries.on(batch[other][position])
      if where[other] is None:
        values[other] = layer.cut(values[other], same)
      elif where[other] != same:
        raise _mixes(operation)
      out.add(entries.on(position))
    elif entries is not None:
      out.add(entries.on(free + frees.index(entries.axis)))
    free += len(frees)
  if len(out) != 1:
    raise _mixes(operation)
  return jax_forms.run_operation(operation, values, out_sharding=None), [out.pop()]


def _cond(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  if where[0] is not None:
    raise _mixes(operation)
  branches = operation.bodies
  found: list[Wheres] = []

  def branch(program: Program, out: Wheres | None) -> Callable[..., list[jax.Array]]:
    def apply(index: Index, *operands: jax.Array) -> list[jax.Array]:
      env = dict(program.constants) | dict(zip(program.inputs, operands, strict=True))
      inner: dict[int, Where] = dict(zip(program.inputs, where[1:], strict=True))
      layer.run(program.operations, program, env, inner, index, layer.count, layer.is_rows)
      results = [jax_forms.value(a, env) for a in program.outputs]
      here = [inner.get(a) if isinstance(a, int) else None for a in program.outputs]
      if out is None:
        found.append(here)
        return results
      at = dataclasses.replace(layer, index=index)
      return [
        at.cut(r, e) if e is not None and had is None else r for r, e, had in zip(results, out, here, strict=True)
      ]

    return apply

  for program in branches:
    jax.eval_shape(branch(program, None), layer.index, *values[1:])
  out = [next((e for e in choices if e is not None), None) for choices in zip(*found, strict=True)]
  if any(e not in (None, o) for choices in found for e, o in zip(choices, out, strict=True)):
    raise _mixes(operation)
  return lax.switch(values[0], [branch(p, out) for p in branches], layer.index, *values[1:]), out


def _scan(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  # A scan along the axis of the layers, without a carry, does to a layer what its body does.
  scan = jax_forms.read_scan(operation)
  if scan is None or scan[1] or any(e is not None for e in where[: scan[0]]):
    raise _mixes(operation)
  count, _, body = scan
  consts, xs = values[:count], values[count:]
  entries = next(e for e in where if e is not None)
  if entries.axis or any(e not in (None, entries) for e in where[count:]):
    raise _mixes(operation)
  xs = [layer.cut(v, entries) if e is None else v for v, e in zip(xs, where[count:], strict=True)]
  if entries.size == 1:
    results = jax_forms.call(body, *consts, *(lax.squeeze(x, [0]) for x in xs))
    results = [lax.expand_dims(r, [0]) for r in results]
  else:
    results = lax.map(lambda x: jax_forms.call(body, *consts, *x), xs)
  return results, [entries] * len(results)


def _call(operation: Operation, values: Arrays, where: Wheres, layer: Layer, avals: Types) -> _Result:
  (program,) = jax_forms.bodies(operation)
  env = dict(program.constants) | dict(zip(program.inputs, values, strict=True))
  inside: dict[int, Where] = dict(zip(program.inputs, where, strict=True))
  layer.run(program.operations, program, env, inside, layer.index, layer.count, layer.is_rows)
  found = [inside.get(a) if isinstance(a, int) else None for a in program.outputs]
  return [jax_forms.value(a, env) for a in program.outputs], found


_RULES: dict[str, Rule] = {
  "optimization_barrier": _barrier,
  "sharding_constraint": _constraint,
  "laid_out": _laid_out,
  "bitcast_convert_type": _bitcast_convert_type,
  "div": _div,
  "broadcast_in_dim": _broadcast_in_dim,
  "reshape": _reshape,
  "transpose": _transpose,
  "squeeze": _squeeze,
  "concatenate": _concatenate,
  "slice": _slice,
  "split": _split,
  "pad": _pad,
  "rev": _rev,
  "sort": _sort,
  "dot_general": _dot_general,
  "cond": _cond,
  "scan": _scan,
  **dict.fromkeys(jax_forms.CALLS, _call),
}
