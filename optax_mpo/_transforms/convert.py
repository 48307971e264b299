"""Carries a training run from one form of storage to another: other bits, 8-bit state, f32 masters, and back.

Why: a run that was begun with f32 masters should not have to begin again to save memory, nor one that was begun with 8
bits to be exact.

How: under every wrapper of this library lies the state that Optax made, and around it the same wrappers of Optax. So
both states are taken down to that, and the leaves of the one go into the places of the other. Weights go by way of
their f32 masters.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import blocks, formats
from optax_mpo._core import buffers, modules, trees, wrapping
from optax_mpo._transforms import compensated, quantized

PyTree = Any

_OURS = (compensated.CompensatedState, compensated.RoundingState, quantized.QuantizedState)
_COUNTED = (compensated.RoundingState, quantized.QuantizedState)


def convert(
  tx: optax.GradientTransformation,
  params: PyTree,
  opt_state: optax.OptState,
  *,
  dtype: Any = jnp.bfloat16,
  where: Callable[[tuple[Any, ...], jax.Array], bool] | None = None,
) -> tuple[PyTree, optax.OptState]:
  """Returns the params and the state of a run in the form in which `tx` keeps them.

  `tx` has to be the transformation of the run but for what this library adds: `compensated` with other bits or none at
  all, with `quantized_state` or without. So an f32-master run of plain Optax can go on with less memory, and any run
  can be taken back to plain Optax with f32 params. Step counts, schedules and moments go on.

  Exact are the weights wherever the new bits hold the old ones (16 bits hold every f32 number), moments wherever they
  are f32 in the new form, and 8-bit state that stays 8-bit state of the same block size.

  Args:
    tx: the transformation to go on with.
    params: the params of the run: f32 masters, or low-precision params.
    opt_state: their state.
    dtype: the low precision to go to, as in `init`, where `tx` has `compensated` in it.
    where: which params go low, likewise.

  Returns:
    `(params, opt_state)`, as `init(tx, ...)` makes them, or with f32 params where nothing in `tx` is compensated.
    They can be donated: they share no buffer with each other or with the arguments.

  Raises:
    ValueError: where the states are not of the same Optax transformation, with the leaf or the container that differs;
      and what `init` raises.

  Memory: both forms and the f32 masters, 4 bytes per parameter, while it runs; less under `jax.jit` with both donated.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> adamw = optax.adamw(1e-3)
    >>> masters = {"w": jnp.full((64, 64), 0.1)}
    >>> updates, state = adamw.update(masters, adamw.init(masters), masters)  # a run with f32 masters ...
    >>> tx = mpo.compensated(mpo.quantized_state(adamw), bits=8)
    >>> params, small = mpo.convert(tx, masters, state)  # ... goes on in a third of the memory
    >>> params["w"].dtype.name, small.inner_state.inner_state[0].mu["w"].values.dtype.name
    ('bfloat16', 'int8')
    >>> mpo.convert(adamw, params, small)[0]["w"].dtype.name
    'float32'
  """
  tx = wrapping.as_transformation(tx, "convert", "tx", "tx, params, opt_state")
  given = params, opt_state
  params, opt_state = modules.pure(params), modules.pure(opt_state)
  masters = _masters(params, opt_state)
  state_form = wrapping.state_shapes(tx, params)
  if _nodes(state_form, compensated.CompensatedState):
    kept = _without_bits(params, opt_state)
    masters = jax.tree.map(lambda leaf, master, keep: leaf if keep else master, params, masters, kept)
    new_params, new_state = compensated.seeded(tx, masters, dtype, where)
  else:
    new_params = jax.tree.map(lambda m: m.astype(jnp.float32) if formats.is_low(m) else m, masters)
    new_state = tx.init(new_params)
  old, new = _plain(opt_state), _plain(new_state)
  hint = "Give it the transformation that made opt_state, with compensated and quantized_state put around or taken off."
  blank = jax.tree.map(lambda _: 0, new, is_leaf=_is_quantized)
  values = trees.flatten_like(blank, old, "convert: opt_state", hint, "tx's state")
  names = [name for name, _ in _named(new)]
  counted = {type(state): state.step for state in reversed(_nodes(opt_state, _COUNTED))}
  filled = _fill(new_state, iter(zip(names, values, strict=True)), counted)
  new = modules.in_form_of(given[0], new_params), modules.in_variables_of(given[1], filled)
  return buffers.own(new, given)


def _is_quantized(x: Any) -> bool:
  return isinstance(x, blocks.Quantized)


def _nodes(state: PyTree, kinds: type | tuple[type, ...]) -> list[Any]:
  """All states of some kinds, outer ones first."""
  found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
  return [y for x in found for y in (x, *_nodes(x.inner_state, kinds))]


def _named(state: PyTree) -> list[tuple[str, Any]]:
  found = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_quantized)
  return [(trees.name(path, "opt_state"), leaf) for path, leaf in found]


def _masters(params: PyTree, opt_state: PyTree) -> PyTree:
  if _nodes(opt_state, compensated.CompensatedState):
    return compensated.master_params(params, opt_state)
  return jax.tree.map(lambda p: formats.widen(p) if formats.is_low(p) else p, params)


def _without_bits(params: PyTree, opt_state: PyTree) -> PyTree:
  """Which leaves are low and have no bits: they are their own masters, and perhaps frozen."""
  treedef = jax.tree.structure(params)
  low = [formats.is_low(leaf) for leaf in treedef.flatten_up_to(params)]
  for state in _nodes(opt_state, compensated.CompensatedState):
    bits = treedef.flatten_up_to(state.compensation)
    low = [flag and not jax.tree.leaves(b) for flag, b in zip(low, bits, strict=True)]
  return treedef.unflatten(low)


def _plain(state: PyTree) -> PyTree:
  """A state without what this library adds, down to the `Quantized` in place of arrays."""

  def strip(x: Any) -> Any:
    return _plain(x.inner_state) if isinstance(x, _OURS) else x

  return jax.tree.map(strip, state, is_leaf=lambda x: isinstance(x, _OURS) or _is_quantized(x))


def _fill(form: PyTree, values: Iterator[tuple[str, Any]], counted: dict[type, Any]) -> PyTree:
  """Puts values into the leaves of a state, in order, and goes on counting from the steps in `counted`."""

  def fill(x: Any) -> Any:
    if isinstance(x, _OURS):
      inner = _fill(x.inner_state, values, counted)
      steps = {"step": counted[type(x)]} if type(x) in counted else {}
      return x._replace(inner_state=inner, **steps)
    name, value = next(values)
    return _stored(name, value, x)

  return jax.tree.map(fill, form, is_leaf=lambda x: isinstance(x, _OURS) or _is_quantized(x))


def _stored(name: str, value: Any, form: Any) -> Any:
  """A leaf of the old state in the form of the new one."""
  have, want = (x.values if _is_quantized(x) else x for x in (value, form))
  if jnp.shape(have) != jnp.shape(want):
    raise ValueError(f"convert: {name} is {list(jnp.shape(have))}, but in tx's state {list(jnp.shape(want))}.")
  if _is_quantized(value):
    if _is_quantized(form) and jax.tree.map(_form, value) == jax.tree.map(_form, form):
      return value
    value = blocks.dequantize(value)
  if not _is_quantized(form):
    return jnp.asarray(value).astype(form.dtype) if trees.is_array(form) else value
  size = blocks.block_size_of(form.values.shape[-1], form.scales.shape[-1])
  return blocks.quantize(jnp.asarray(value).astype(jnp.float32), form.values.dtype, size)


def _form(x: Any) -> tuple[Any, Any]:
  return x.shape, x.dtype
