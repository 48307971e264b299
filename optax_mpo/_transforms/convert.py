"""Converts a training run to another precision: other bits, 8-bit state, f32 masters, and back.

Why: a run that started with f32 masters should be able to save memory without a restart, and a run that started with 8
bits to become exact.

How: without the wrappers of this library, the old and the new state have the same Optax structure. Both are stripped to
it, and the old leaves are put into the places of the new ones. Weights are converted through their f32 masters.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_mpo._codecs import blocks, formats
from optax_mpo._codecs.masters import master_params
from optax_mpo._core import buffers, host, modules, overwritten, packing, trees, wrapping
from optax_mpo._core.annotations import KeyPath, PyTree, Shaped
from optax_mpo._transforms import compensated, initialise, quantized

_OURS = (compensated.CompensatedState, compensated.RoundingState, quantized.QuantizedState)
_COUNTED = (compensated.RoundingState, quantized.QuantizedState)
State = TypeVar("State", bound=compensated.CompensatedState | compensated.RoundingState | quantized.QuantizedState)


def convert(
  tx: optax.GradientTransformation,
  params: PyTree,
  opt_state: optax.OptState,
  *,
  dtype: DTypeLike = jnp.bfloat16,
  where: Callable[[KeyPath, jax.Array], bool] | None = None,
) -> tuple[PyTree, optax.OptState]:
  """Returns the params and the state of a run as `tx` stores them.

  `tx` has to be the transformation of the run, except for the wrappers of this library: it may have `compensated` with
  other bits or not at all, and `quantized_state` or not. So a plain Optax run with f32 masters can continue with less
  memory, and any run can return to plain Optax with f32 params. Step counts, schedules and moments continue.

  Weights stay exact if the new bits can hold the old ones (in bf16, 16 bits hold every f32 number). Moments stay exact
  if they are f32 in the new state. 8-bit state stays exact if its dtype and block size do not change.

  Args:
    tx: the transformation to continue with.
    params: the params of the run: f32 masters, or low-precision params.
    opt_state: their state.
    dtype: the low precision of the new params, as in `init`, if `tx` has `compensated` in it. Low-precision params
      without bits keep their dtype.
    where: which f32 weights are cast, as in `init`.

  Returns:
    `(params, opt_state)`, as `init(tx, ...)` makes them, or with f32 params if `tx` has no `compensated` in it.
    Both can be donated: they share no buffer with each other or with the arguments.

  Raises:
    ValueError: if the states belong to different Optax transformations, with the leaf or the container that differs;
      and what `init` raises.
    TypeError: if a leaf of params is not an array; and what `init` raises.

  Memory: the old and the new params and state, and the f32 masters, 4 bytes per parameter, while it runs; less under
    `jax.jit` if params and state are donated.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> adamw = optax.adamw(1e-3)
    >>> masters = {"w": jnp.full((64, 64), 0.1)}
    >>> updates, state = adamw.update(masters, adamw.init(masters), masters)  # a run with f32 masters ...
    >>> tx = mpo.compensated(mpo.quantized_state(adamw), extra_bits=8)
    >>> params, small = mpo.convert(tx, masters, state)  # ... goes on in a third of the memory
    >>> params["w"].dtype.name, small.inner_state.inner_state[0].mu["w"].values.dtype.name
    ('bfloat16', 'int8')
    >>> mpo.convert(adamw, params, small)[0]["w"].dtype.name
    'float32'
  """
  tx = wrapping.as_transformation(tx, "convert", "tx", "tx, params, opt_state")
  given = params, opt_state
  params, opt_state = host.fetched(modules.pure(params)), packing.unpack_all(host.fetched(modules.pure(opt_state)))
  trees.check_arrays(params, "convert")
  masters = _masters(params, opt_state)
  state_form = packing.unpack_all(wrapping.state_shapes(tx, masters))
  if _nodes(state_form, compensated.CompensatedState):
    kept = _without_bits(params, opt_state)
    masters = jax.tree.map(lambda leaf, master, keep: leaf if keep else master, params, masters, kept)
    new_params, new_state = initialise.initialised(tx, masters, dtype, where)
  else:
    new_params = jax.tree.map(lambda m: m.astype(jnp.float32) if formats.is_low(m) else m, masters)
    new_state = tx.init(new_params)
  form, new_state = new_state, packing.unpack_all(new_state)
  old, new = _plain(opt_state), _plain(new_state)
  if overwritten.is_in(params):
    old = _of_all_collections(old, new)
  hint = "Give it the transformation that made opt_state, with compensated and quantized_state put around or taken off."
  blank = jax.tree.map(lambda _: 0, new, is_leaf=blocks.is_quantized)
  values = trees.flatten_like(blank, old, "convert: opt_state", hint, "tx's state")
  names = [name for name, _ in _named(new)]
  counted = {type(state): state.step for state in reversed(_nodes(opt_state, _COUNTED))}
  filled = packing.pack_like(_fill(new_state, iter(zip(names, values, strict=True)), counted), form)
  new = modules.in_form_of(given[0], new_params), modules.in_variables_of(given[1], filled)
  return buffers.own(new, given)


def _nodes(state: PyTree, kinds: type[State] | tuple[type[State], ...]) -> list[State]:
  """All states of the given types, outer ones first."""
  found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
  return [y for x in found for y in (x, *_nodes(x.inner_state, kinds))]


def _named(state: PyTree) -> list[tuple[str, PyTree]]:
  found = jax.tree_util.tree_leaves_with_path(state, is_leaf=blocks.is_quantized)
  return [(trees.name(path, "opt_state"), leaf) for path, leaf in found]


def _of_all_collections(old: PyTree, new: PyTree) -> PyTree:
  """Returns a state that Flax made, of `params["params"]` alone, in the form of `new`, which is of all variables."""
  values = _named(old)
  if [name.replace("['params']", "", 1) for name, _ in _named(new)] != [name for name, _ in values]:
    return old
  return jax.tree.structure(new, is_leaf=blocks.is_quantized).unflatten([value for _, value in values])


def _masters(params: PyTree, opt_state: PyTree) -> PyTree:
  if _nodes(opt_state, compensated.CompensatedState) or any(map(formats.is_scaled, jax.tree.leaves(params))):
    return master_params(params, opt_state)
  return jax.tree.map(lambda p: formats.widen(p) if formats.is_low(p) else p, params)


def _without_bits(params: PyTree, opt_state: PyTree) -> PyTree:
  """Which leaves have low precision and no bits: they are their own masters, and may be frozen."""
  treedef = jax.tree.structure(params)
  low = [formats.is_low(leaf) for leaf in treedef.flatten_up_to(params)]
  for state in _nodes(opt_state, compensated.CompensatedState):
    bits = treedef.flatten_up_to(state.compensation)
    low = [flag and not jax.tree.leaves(b) for flag, b in zip(low, bits, strict=True)]
  return treedef.unflatten(low)


def _plain(state: PyTree) -> PyTree:
  """A state without this library's wrappers. Each `Quantized` stays in place of its array."""

  def strip(x: PyTree) -> PyTree:
    return _plain(x.inner_state) if isinstance(x, _OURS) else x

  return jax.tree.map(strip, state, is_leaf=lambda x: isinstance(x, _OURS) or blocks.is_quantized(x))


def _fill(form: PyTree, values: Iterator[tuple[str, PyTree]], counted: dict[type, jax.Array]) -> PyTree:
  """Puts values into the leaves of a state, in order. Step counters continue from `counted`."""

  def fill(x: PyTree) -> PyTree:
    if isinstance(x, _OURS):
      inner = _fill(x.inner_state, values, counted)
      steps = {}
      if isinstance(x, _COUNTED) and type(x) in counted:  # in `per_layer` each layer has a counter
        steps["step"] = _broadcast(counted[type(x)], x.step)
      return x._replace(inner_state=inner, **steps)
    name, value = next(values)
    return _stored(name, value, x)

  return jax.tree.map(fill, form, is_leaf=lambda x: isinstance(x, _OURS) or blocks.is_quantized(x))


def _broadcast(step: jax.Array, form: Shaped) -> jax.Array:
  """A step counter in the shape of another."""
  return step if jnp.shape(step) == form.shape else jnp.broadcast_to(jnp.ravel(step)[0], form.shape)


def _stored(name: str, value: PyTree, form: PyTree) -> PyTree:
  """Converts a leaf of the old state to the dtype or codes of the new one."""
  have, want = (x.values if blocks.is_quantized(x) else x for x in (value, form))
  if jnp.shape(have) != jnp.shape(want):
    raise ValueError(f"convert: {name} is {list(jnp.shape(have))}, but in tx's state {list(jnp.shape(want))}.")
  if blocks.is_quantized(value):
    if blocks.is_quantized(form) and jax.tree.map(_form, value) == jax.tree.map(_form, form):
      return value
    value = blocks.dequantize(value)
  if not blocks.is_quantized(form):
    return jnp.asarray(value).astype(form.dtype) if trees.is_array(form) else value
  size = blocks.block_size_of(form.values.shape[-1], form.scales.shape[-1])
  return blocks.quantize(jnp.asarray(value).astype(jnp.float32), form.values.dtype, size)


def _form(x: Shaped) -> tuple[tuple[int, ...], np.dtype]:
  return x.shape, x.dtype
