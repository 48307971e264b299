"""Tells XLA what to keep in order: which value to compute first, and how an array lies in memory.

Why: in a scan over layers, XLA would compute all new values of a layer before it writes the first into its stack.
Optimization barriers do not prevent this: XLA removes them early, and removes unused values at once. And if the
backward pass of a layer needs an activation transposed, XLA transposes those of all layers, before the loop.

How: primitives with one lowering for a single device and another for several. On several devices their operands may be
sharded, and they must not make the devices wait for each other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from optax_mpo._core import primitives, types

PyTree = Any

SMALL = 2**16
"""Elements. All that the update of a weight of this size needs fits into the caches."""

_HELD = 2**10  # elements; for smaller arrays, computing twice costs less than `held`


def after(index: jax.Array, done: Sequence[jax.Array], count: int) -> jax.Array:
  """Returns `index`, i32[] below 2^30, as a value that XLA knows only after the scalars `done`.

  On several devices XLA may know it earlier, but not that it equals `index`. So it still reads again what was just
  written there.

  Args:
    index: the value to return.
    done: scalars of any dtype.
    count: a different number for each call with the same index.
  """
  return _after.bind(index, *done, count=count)


def after_use(index: jax.Array, values: Sequence[Any]) -> jax.Array:
  """Returns `index`, i32[]; on one CPU, as a value that XLA knows only after the arrays `values`.

  XLA:CPU removes barriers before it orders operations. If it could write into a stack before the last read of the old
  values, it would copy the stack: all layers, for each layer.
  """
  return _after_use.bind(index, *first_elements(values))


def first_elements(arrays: Sequence[Any]) -> list[jax.Array]:
  """One element of each array or ref, except empty ones and those split over devices, which JAX refuses to index."""
  return [x[(0,) * x.ndim] for x in arrays if x.size and not types.is_split(x)]


def in_order(values: PyTree) -> list[Any]:
  """Returns arrays; on one device, the floating-point ones are row-major, with their axes in order in memory."""
  floating = [jnp.issubdtype(v.dtype, jnp.floating) for v in values]
  return [_row_major.bind(v) if is_float else v for v, is_float in zip(values, floating, strict=True)]


def barrier(values: PyTree) -> PyTree:
  """`lax.optimization_barrier`, also inside a `shard_map` where only some arrays differ between devices.

  JAX refuses to put such arrays into one barrier. So each kind gets its own, and does not wait for the others.
  """
  leaves, treedef = jax.tree.flatten(values)
  kinds: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    kinds.setdefault(getattr(jax.typeof(leaf), "manual_axis_type", None), []).append(i)
  for indices in kinds.values():
    for i, value in zip(indices, lax.optimization_barrier([leaves[i] for i in indices]), strict=True):
      leaves[i] = value
  return treedef.unflatten(leaves)


def tie(values: PyTree) -> PyTree:
  """A `barrier`; nothing on CPUs, since XLA:CPU orders operations after it has removed barriers.

  There a barrier would only make XLA transpose gradients that are wanted as they lie.
  """
  leaves, treedef = jax.tree.flatten(values)
  return treedef.unflatten(_tie.bind(*leaves))


def laid_out(x: jax.Array) -> jax.Array:
  """Returns a gradient `x`; on one CPU, with its axes in order in memory if it is large and comes out transposed.

  Derivatives of products come out transposed. XLA:CPU would transpose such a gradient in each loop that reads it, for
  instance for each of two moments, one element per cache line: three times as slow as reading in order. Transposing it
  where it is written costs only once. Any other gradient is left alone, since XLA may compute it within those loops.
  """
  return _laid_out.bind(x) if x.ndim > 1 and x.size >= SMALL else x


def held(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x: f32[*s]` as a value that XLA:CPU computes only once, even if it is used several times.

  XLA:CPU repeats cheap operations in each loop that uses them. New weights and their bits are two loops, so both would
  compute the new master weight. And the old weights would be copied first, since both loops read them and write in
  their place; in a scan, the whole stack. XLA takes a division for expensive, so `x` is divided by one. Only LLVM sees
  that the divisor is one, and removes the division.

  Args:
    x: the value to return.
    like: [*s], of a 16-bit dtype: any array that `x` is computed from.
  """
  return _held.bind(x, like) if x.size >= _HELD else x


# --- The primitives ---------------------------------------------------------------------------------------------------


def _everywhere(fun: Callable[..., Any]) -> primitives.Lowering:
  return lambda lower, *_, **__: lower(fun)


def _by_devices(one: Callable[..., Any], several: Callable[..., Any]) -> primitives.Lowering:
  return lambda lower, context, *_, **__: lower(one if _is_for_one(context) else several)


def _is_for_one(context: Any) -> bool:
  """Whether a program is for one device."""
  return (getattr(context.module_context.axis_context, "num_devices", None) or 1) == 1  # None inside of shard_map


def _after_values(index: Any, *done: Any, count: int) -> Any:
  never = index >> 30  # zero, but XLA cannot tell
  return index + never * sum((lax.convert_element_type(x, jnp.int32) for x in done), jnp.int32(0))


def _first(first: Any, *_: Any, **__: Any) -> Any:
  return first


def _changed(index: Any, *_: Any, count: int) -> Any:
  return index + ((index + count) >> 30)


def _divided_by_one(x: Any, like: Any) -> Any:
  zero = lax.bitcast_convert_type(like, jnp.uint16).astype(jnp.uint32) >> 16
  return x / lax.bitcast_convert_type(zero + jnp.uint32(0x3F80_0000), jnp.float32)


def _in_order(x: Any) -> Any:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _lay_out(lower: Callable[..., Any], context: Any, x: Any) -> Any:
  # Not in exported programs: JAX does not promise that a later XLA knows this constraint.
  is_kept = getattr(getattr(context.module_context, "lowering_parameters", None), "for_export", False)
  return lower(_in_order if _is_for_one(context) and not is_kept and _comes_transposed(x) else _first)


def _comes_transposed(x: Any) -> bool:
  """Whether a value in a program that is being lowered comes from a transposition."""
  while True:
    operation = getattr(x.owner, "operation", x.owner)  # a function's argument has a block, without a name
    name = getattr(operation, "name", "")
    if name not in ("stablehlo.reshape", "stablehlo.broadcast_in_dim"):
      return name == "stablehlo.transpose"
    x = operation.operands[0]


_on_one_cpu = _by_devices(lambda index, *values: _after_values(index, *values, count=0), _first)
_after = primitives.make_hint("after", {None: _by_devices(_after_values, _changed)})
_after_use = primitives.make_hint("after_use", {None: _everywhere(_first), "cpu": _on_one_cpu})
_held = primitives.make_hint("held", {None: _everywhere(_first), "cpu": _everywhere(_divided_by_one)})
_row_major = primitives.make_hint("row_major", {None: _by_devices(_in_order, _first)})
_laid_out = primitives.make_hint("laid_out", {None: _everywhere(_first), "cpu": _lay_out}, depends_on_operands=True)
_tie = primitives.make_hint(
  "tie",
  {None: _everywhere(lambda *values: barrier(list(values))), "cpu": _everywhere(lambda *values: list(values))},
  all_operands=True,
)
