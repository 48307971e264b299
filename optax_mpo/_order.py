"""What XLA is to keep in order: which value is computed first, and how a slice lies in memory.

Why: in a scan over layers, XLA would make all new values of a layer before it writes the first of them into its stack.
Optimization barriers do not prevent that, since XLA takes them out early, and what nobody uses at once. And the
backward pass of a layer may want an activation transposed; XLA then transposes those of all layers, before the loop.

How: operations that are lowered in one way for one device, and in another for several, over which the numbers that they
are given may be spread: there they must not make the devices wait for each other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from optax_mpo import _types

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
  return [x[(0,) * x.ndim] for x in arrays if x.size and not _types.is_split(x)]


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


@jax.custom_jvp
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


@held.defjvp
def _held_jvp(primals: Any, tangents: Any) -> Any:
  return held(*primals), tangents[0]


def _primitive(
  name: str, one: Callable[..., Any], several: Callable[..., Any], on_cpu: Callable[..., Any] | None = None
) -> Primitive:
  """An operation that returns its first operand, as `one` or `on_cpu` does on one device and `several` on several."""
  primitive = Primitive(name)
  primitive.def_impl(lambda x, *_, **__: x)
  primitive.def_abstract_eval(lambda x, *_, **__: x)

  def lower(context: Any, *operands: Any, one: Callable[..., Any], **params: Any) -> Any:
    chosen = one if _is_for_one(context) else several
    return mlir.lower_fun(chosen, multiple_results=False)(context, *operands, **params)

  mlir.register_lowering(primitive, functools.partial(lower, one=one))
  if on_cpu is not None:
    mlir.register_lowering(primitive, functools.partial(lower, one=on_cpu), platform="cpu")
  return primitive


def _is_for_one(context: Any) -> bool:
  """Whether a program is for one device."""
  return (getattr(context.module_context.axis_context, "num_devices", None) or 1) == 1  # None inside of shard_map


def _after_values(index: Any, *done: Any, count: int) -> Any:
  never = index >> 30  # zero, but XLA cannot tell
  return index + never * sum((lax.convert_element_type(x, jnp.int32) for x in done), jnp.int32(0))


def _index(index: Any, *_: Any) -> Any:
  return index


_after_use = _primitive("after_use", _index, _index, lambda index, *values: _after_values(index, *values, count=0))
_after = _primitive("after", _after_values, lambda index, *_, count: index + ((index + count) >> 30))


def _divided_by_one(x: Any, like: Any) -> Any:
  zero = lax.bitcast_convert_type(like, jnp.uint16).astype(jnp.uint32) >> 16
  return x / lax.bitcast_convert_type(zero + jnp.uint32(0x3F80_0000), jnp.float32)


def _held_batch(values: Any, axes: Any) -> Any:
  size = next(v.shape[a] for v, a in zip(values, axes, strict=True) if a is not None)
  moved = (
    jnp.broadcast_to(v, (size, *v.shape)) if a is None else jnp.moveaxis(v, a, 0)
    for v, a in zip(values, axes, strict=True)
  )
  return _held.bind(*moved), 0


_tie = Primitive("tie")
_tie.multiple_results = True
_tie.def_impl(lambda *values: barrier(list(values)))
_tie.def_abstract_eval(lambda *values: list(values))
mlir.register_lowering(_tie, mlir.lower_fun(lambda *values: barrier(list(values)), multiple_results=True))
mlir.register_lowering(_tie, mlir.lower_fun(lambda *values: list(values), multiple_results=True), platform="cpu")

batching.primitive_batchers[_tie] = lambda values, axes: (_tie.bind(*values), list(axes))
ad.primitive_jvps[_tie] = lambda values, tangents: (_tie.bind(*values), list(tangents))

_held = Primitive("held")
_held.def_impl(lambda x, _: x)
_held.def_abstract_eval(lambda x, _: x)
mlir.register_lowering(_held, mlir.lower_fun(lambda x, _: x, multiple_results=False))
mlir.register_lowering(_held, mlir.lower_fun(_divided_by_one, multiple_results=False), platform="cpu")
batching.primitive_batchers[_held] = _held_batch


def _in_order(x: Any) -> Any:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _lower_laid_out(context: Any, x: Any) -> Any:
  # What is exported to be kept must not have this constraint, of which JAX does not promise that XLA will know it.
  is_kept = getattr(getattr(context.module_context, "lowering_parameters", None), "for_export", False)
  here = _is_for_one(context) and not is_kept and _comes_transposed(x)
  return mlir.lower_fun(_in_order if here else lambda x: x, multiple_results=False)(context, x)


def _comes_transposed(x: Any) -> bool:
  """Whether a value of a program that is being lowered comes out of a transposition."""
  while True:
    operation = getattr(x.owner, "operation", x.owner)  # a block without a name, for an argument of a function
    name = getattr(operation, "name", "")
    if name not in ("stablehlo.reshape", "stablehlo.broadcast_in_dim"):
      return name == "stablehlo.transpose"
    x = operation.operands[0]


_row_major = _primitive("row_major", _in_order, lambda x: x)
_laid_out = _primitive("laid_out", lambda x: x, lambda x: x)
mlir.register_lowering(_laid_out, _lower_laid_out, platform="cpu", cacheable=False)  # it depends on what x is
ad.primitive_jvps[_laid_out] = lambda values, tangents: (_laid_out.bind(*values), tangents[0])
batching.primitive_batchers[_laid_out] = lambda values, axes: (_laid_out.bind(*values), axes[0])
