"""What XLA is to keep in order: which value is computed first, and how a slice lies in memory.

Why: in a scan over layers, XLA would make all new values of a layer before it writes the first of them into its stack.
Optimization barriers do not prevent that, since XLA takes them out early, and what nobody uses at once. And the
backward pass of a layer may want an activation transposed; XLA then transposes those of all layers, before the loop.

How: operations that are lowered in one way for one device, and in another for several, over which the numbers that they
are given may be spread: there they must not make the devices wait for each other.
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
"""Elements of a weight, of which the caches hold all that its step needs."""

_HELD = 2**10  # elements of a weight, of which it costs more to hold something than to compute it anew


def after(index: jax.Array, done: Sequence[jax.Array], count: int) -> jax.Array:
  """Returns `index`, i32[] and less than 2^30, as a value that XLA knows only when the numbers `done` are there.

  On several devices it may know it before, but not that it is `index`: what is read there and was just written is read
  again all the same.

  Args:
    index: what is returned.
    done: numbers of any dtype, without axes.
    count: another one for each call with the same index.
  """
  return _after.bind(index, *done, count=count)


def after_use(index: jax.Array, values: Sequence[Any]) -> jax.Array:
  """Returns `index`, i32[], on one CPU as a value that XLA knows only when the arrays `values` are there.

  XLA:CPU takes barriers out before it decides what comes first. Where it might write into a stack before the last of
  those who read it, it would copy the stack: all layers, for each of them.
  """
  return _after_use.bind(index, *first_elements(values))


def first_elements(arrays: Sequence[Any]) -> list[jax.Array]:
  """A number of each array or ref, but for those that are split over devices: JAX would not take one out."""
  return [x[(0,) * x.ndim] for x in arrays if x.size and not types.is_split(x)]


def in_order(values: PyTree) -> list[Any]:
  """Returns arrays, of which the floating ones have their axes in order in memory, where that is on one device."""
  floating = [jnp.issubdtype(v.dtype, jnp.floating) for v in values]
  return [_row_major.bind(v) if is_float else v for v, is_float in zip(values, floating, strict=True)]


def barrier(values: PyTree) -> PyTree:
  """`lax.optimization_barrier`, also for arrays of which some differ from device to device inside of a `shard_map`.

  JAX refuses to put those into one barrier, so that each kind has its own, and waits for no other kind.
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
  """A `barrier`, but on CPUs nothing: what XLA:CPU does first it decides when it has taken the barriers out.

  All that one would do there is to have gradients transposed that are wanted as they lie.
  """
  leaves, treedef = jax.tree.flatten(values)
  return treedef.unflatten(_tie.bind(*leaves))


def laid_out(x: jax.Array) -> jax.Array:
  """Returns a gradient `x`, with its axes in order in memory, on a CPU where it is large and comes out transposed.

  Derivatives of products do. XLA:CPU would have each loop that reads such a gradient, as those of two moments do, turn
  it round in passing, a number from each cache line: three times the time of one that reads in order. Where it is
  written, turning it round costs once. Any other gradient is left alone, as XLA may compute it within those loops.
  """
  return _laid_out.bind(x) if x.ndim > 1 and x.size >= SMALL else x


def held(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x: f32[*s]`, as something that XLA:CPU computes once, where it is used more than once.

  XLA:CPU puts what is cheap into each loop that uses it. New weights and their bits are two loops, so that both would
  compute the new master weight, and the old weights would be copied first, since both loops need them and write into
  their place: of a layer in a scan the whole stack. A division is not cheap; that this one is by one is known to LLVM
  alone, which takes it out.

  Args:
    x: what is returned.
    like: of a dtype of 16 bits, [*s]; any array that `x` is computed from.
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
  # What is exported to be kept must not have this constraint, of which JAX does not promise that XLA will know it.
  is_kept = getattr(getattr(context.module_context, "lowering_parameters", None), "for_export", False)
  return lower(_in_order if _is_for_one(context) and not is_kept and _comes_transposed(x) else _first)


def _comes_transposed(x: Any) -> bool:
  """Whether a value of a program that is being lowered comes out of a transposition."""
  while True:
    operation = getattr(x.owner, "operation", x.owner)  # a block without a name, for an argument of a function
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
