"""Tells XLA what to keep in order: which value to compute first, and how an array lies in memory.

Why: in a scan over layers, XLA would compute all new values of a layer before it writes the first into its stack.
Optimization barriers do not prevent this: XLA removes them early, and removes unused values at once. And if the
backward pass of a layer needs an activation transposed, XLA transposes those of all layers, before the loop.

How: primitives with one lowering for a single device and another for several. On several devices their operands may be
sharded, and they must not make the devices wait for each other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import mlir

from optax_mpo._core import primitives, types
from optax_mpo._core.annotations import PyTree, Values

SMALL = 2**16
"""Elements. All that the update of a weight of this size needs fits into the caches."""


def after(index: jax.Array, done: Values, count: int) -> jax.Array:
  """Returns `index`, i32[] below 2^30, as a value that XLA knows only after the scalars `done`.

  On several devices XLA may know it earlier, but not that it equals `index`. So it still reads again what was just
  written there.

  Args:
    index: the value to return.
    done: scalars of any dtype.
    count: a different number for each call with the same index.
  """
  return _after.bind(index, *done, count=count)


def hidden(index: jax.Array, values: Values) -> jax.Array:
  """Returns a constant `index`, i32[], as one that XLA does not know, given scalars that it does not know.

  With a known index, XLA orders reads and writes itself, and `after` has no effect. On several devices it is known.
  """
  return _hidden.bind(index, *values[:1]) if values else index


def first_elements(arrays: Values) -> list[jax.Array]:
  """One element of each array or ref, except empty ones and those split over devices, which JAX refuses to index."""
  return [x[(0,) * x.ndim] for x in arrays if x.size and not types.is_split(x)]


def in_order(values: Values) -> list[jax.Array]:
  """Returns arrays; on one device, the floating-point ones are row-major, with their axes in order in memory."""
  floating = [jnp.issubdtype(v.dtype, jnp.floating) for v in values]
  return [_row_major.bind(v) if is_float else v for v, is_float in zip(values, floating, strict=True)]


def as_they_lie(arrays: Values) -> list[jax.Array]:
  """Returns gradients of weights, or layers of stacks; on GPUs with their axes in order in memory, as those of weights.

  XLA:GPU would choose what suits the product that makes a gradient, or the sum of its parts over devices, and lay out
  what is updated with it alike: for a scan it would copy whole stacks of weights and state, before it and after it. And
  it would lay out a stack as suits what reads several layers of it at once.
  """
  return [_as_they_lie.bind(x) if x.ndim > 1 else x for x in arrays]


def together(values: Values) -> list[jax.Array]:
  """Returns arrays that XLA:GPU makes before it uses any of them."""
  return _together.bind(*values)


def barrier(values: PyTree) -> PyTree:
  """`lax.optimization_barrier`, also inside a `shard_map` where only some arrays differ between devices.

  JAX refuses to put such arrays into one barrier. So each kind gets its own, and does not wait for the others.
  """
  leaves, treedef = jax.tree.flatten(values)
  kinds: dict[object, list[int]] = {}
  for i, leaf in enumerate(leaves):
    kinds.setdefault(getattr(jax.typeof(leaf), "manual_axis_type", None), []).append(i)
  for indices in kinds.values():
    for i, value in zip(indices, lax.optimization_barrier([leaves[i] for i in indices]), strict=True):
      leaves[i] = value
  return treedef.unflatten(leaves)


# --- The primitives ---------------------------------------------------------------------------------------------------


def everywhere(fun: Callable[..., PyTree]) -> primitives.Lowering:
  """Lowers to `fun` for any number of devices."""
  return lambda lower, *_, **__: lower(fun)


def by_devices(one: Callable[..., PyTree], several: Callable[..., PyTree]) -> primitives.Lowering:
  """Lowers to `one` for a single device, and to `several` for more."""
  return lambda lower, context, *_, **__: lower(one if is_for_one(context) else several)


def is_for_one(context: mlir.LoweringRuleContext) -> bool:
  """Whether a program is for one device."""
  return (getattr(context.module_context.axis_context, "num_devices", None) or 1) == 1  # None inside of shard_map


def after_values(index: jax.Array, *done: jax.Array, count: int) -> jax.Array:
  """`index`, from an expression that XLA can compute only after `done`."""
  never = index >> 30  # zero, but XLA cannot tell
  return index + never * sum((lax.convert_element_type(x, jnp.int32) for x in done), jnp.int32(0))


def _hide(index: jax.Array, value: jax.Array) -> jax.Array:
  never = lax.population_count(lax.convert_element_type(value, jnp.int32)) >> 6  # zero, but XLA cannot tell
  return index + never


def first(x: jax.Array, *_: object, **__: object) -> jax.Array:
  """The first operand."""
  return x


def _all(*values: jax.Array) -> list[jax.Array]:
  return list(values)


def _all_made(*values: jax.Array) -> list[jax.Array]:
  return barrier(list(values))


def _changed(index: jax.Array, *_: object, count: int) -> jax.Array:
  return index + ((index + count) >> 30)


def row_major(x: jax.Array) -> jax.Array:
  """An array with its axes in order in memory."""
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _row_major_parts(x: jax.Array) -> jax.Array:
  """`row_major` for an array that may be split over devices.

  XLA would gather the array first, as it does for any call that it does not know. It splits a call along the batch
  dimensions that it declares, which cannot be all: hence the axis of one element at the end. XLA decides how to split a
  result first by elementwise operations, so that one connects both: without it, XLA may split the gradient in another
  way, and send activations instead. It goes when XLA sees that both are the same.
  """
  with set_xla_metadata(num_batch_dims=str(x.ndim)):
    y = row_major(x[..., None])[..., 0]
  return jnp.where(x == x, y, x)  # x, also where it is NaN


_after = primitives.make_hint("after", {None: by_devices(after_values, _changed)})
_hidden = primitives.make_hint("hidden", {None: by_devices(_hide, first)})
_row_major = primitives.make_hint("row_major", {None: by_devices(row_major, first)})
_as_they_lie = primitives.make_hint(
  "as_they_lie", {None: everywhere(first), "cuda": by_devices(row_major, _row_major_parts)}
)
_together = primitives.make_hint("together", {None: everywhere(_all), "cuda": everywhere(_all_made)}, all_operands=True)
jax.ffi.register_ffi_target_as_batch_partitionable("LayoutConstraint")  # what `with_layout_constraint` calls
