"""Optimizer state in 8 bits, for any Optax transformation.

Why: with f32 moments AdamW holds 8 bytes of state per parameter. The transformation does not have to change: it gets
and returns f32 state, and the state has 8 bits only between steps.

How: leaves of the state that belong to a param and have its shape are stored in blocks (see `blocks`). The wrapped
transformation gets them dequantized. XLA:GPU fuses both conversions into the update, so that no f32 copy is stored.
All operations are elementwise or along the last axis: leaves stay sharded, and stacks of layers can be updated one
layer at a time.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike

from optax_mpo._codecs import blocks, levels
from optax_mpo._core import buffers, host, packing, renames, trees, wrapping
from optax_mpo._core.annotations import KeyPath, PyTree, PyTreeDef
from optax_mpo._transforms import state_flow, state_kinds

Where = Callable[[KeyPath, jax.Array], state_kinds.Kind | None]

_SHORTEST = 8  # a shorter last axis saves little: each block has a scale of two bytes


class QuantizedState(NamedTuple):
  """State of `quantized_state`.

  Attributes:
    step: i32[], the number of updates, from which the dither of the rounding is made.
    inner_state: the state of the wrapped transformation, with an `optax_mpo.Quantized` for each leaf stored in blocks.
  """

  step: jax.Array
  inner_state: optax.OptState


@renames.renamed(bits="state_bits")
def quantized_state(
  inner: optax.GradientTransformation,
  state_bits: int = 8,
  block_size: int = 32,
  where: Where | None = None,
  *,
  min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
  """Stores the large state of `inner` (moments, momentum, accumulators) in 8 bits between steps.

  It stores float32 and bfloat16 leaves of `inner`'s state, at any depth, that belong to a param, have its shape, at
  least `min_size` elements and a last axis of 8 or more. A leaf belongs to the param whose path is part of its own, as
  in `mu['w']`; if there is none, to the param whose gradient it is computed from. Other params do not change how a leaf
  is stored. All other state (counts, keys, integers, factored moments, weights) stays as it is. `inner` sees its state
  in the usual dtypes, and computes in f32 as before.

  How a leaf is stored depends on its use. Optax's states are known by name. For any other transformation, `init` traces
  the update and reads it from the program:

  - "nonnegative", such as a second moment: proven never to be negative, and not itself divided element by element. No
    element is below 7.6e-6 of its block's largest.
  - "signed", such as a momentum: not part of a quotient. Values below 0.2% of the block's largest round to zero.
  - "wide": everything else, and all state of an update that cannot be traced. These are 8-bit floats, down to 7.6e-6 of
    the block's largest, near which they are coarser than the others (errors of up to 6% instead of 1%). Nonzero values
    stay nonzero.
  - not stored: state that starts as or becomes a function of the params (weights), that is subtracted from other state
    and then divided by or rooted (a variance of `nu - mu**2`), that is divided by something not stored (the gradient),
    or that linear algebra reads (an inverse, a decomposition).

  Combine it with compensated: `compensated(quantized_state(optax.adamw(3e-4)), extra_bits=8)`.

  Args:
    inner: the transformation to wrap.
    state_bits: 8, or 4, which is coarse (docs/compact.md); "wide" codes have 8 bits in both cases.
    block_size: how many elements along the last axis share a scale; a power of two. If that axis is sharded, each shard
      should hold whole blocks.
    where: `where(path, leaf)` overrides the choice for a leaf of the state, whatever its size: "signed", "nonnegative"
      or "wide" to store it, False to keep it as it is, None for the default. The path is JAX's key path in `inner`'s
      state (`jax.tree_util.keystr(path)` makes a string such as `[0].mu['w']`); the leaf has a shape and a dtype.
    min_size: leaves with fewer elements stay as they are.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `QuantizedState`.

  Raises:
    ValueError: for other values of `state_bits`, `block_size` or `min_size`.
    TypeError: if `inner` is not an Optax transformation.

    `init` raises ValueError if `where` returns something else, or asks to store a leaf that has no blocks. `update`
    raises ValueError or TypeError if `init` did not make the state, or if `inner` changes its structure or shapes.

  Memory: state_bits / 8 + 2 / block_size bytes per stored element, 1.0625 by default. AdamW in `compensated` with
    8 bits holds 5.125 bytes per parameter.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)), extra_bits=8)
    >>> params, state = mpo.init(tx, {"w": jnp.ones((64, 64))})
    >>> updates, state = tx.update({"w": jnp.ones((64, 64))}, state, params)
    >>> params = mpo.apply_updates(params, updates)
    >>> sum(x.nbytes for x in jax.tree.leaves((params, state))) / 64**2 < 5.13
    True
    >>> state.inner_state.inner_state[0].mu["w"].values.dtype.name
    'int8'

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2021;
    `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026
  """
  _check_options(state_bits, block_size, min_size)
  inner = wrapping.as_transformation(inner, "quantized_state")

  def store(params: PyTree, state: PyTree) -> PyTree:
    shapes = {path: jnp.shape(p) for path, p in jax.tree_util.tree_leaves_with_path(params)}
    found = list(state_kinds.leaves(state))
    owned = [_is_large(leaf, min_size) and _is_owned(path, leaf.shape, shapes) for path, leaf, _ in found]
    if None in owned:
      whose, of = state_flow.owners(inner, params, state), list(shapes.values())
      by_flow = [k is not None and of[k] == jnp.shape(leaf) for k, (_, leaf, _) in zip(whose, found, strict=True)]
      owned = [other if flag is None else flag for flag, other in zip(owned, by_flow, strict=True)]
    large = [bool(flag) for flag in owned]
    kinds: list[state_kinds.Kind | None] = [kind for _, _, kind in found]
    if any(flag and kind is None for flag, kind in zip(large, kinds, strict=True)):
      seen = state_flow.kinds(inner, params, state, large)
      kinds = [other if kind is None else kind for kind, other in zip(kinds, seen, strict=True)]
    new = []
    for (path, leaf, _), kind, flag in zip(found, kinds, large, strict=True):
      chosen = where(path, leaf) if where is not None else None
      if chosen is None:
        chosen = kind if flag else False
      new.append(_store(path, leaf, chosen, state_bits, block_size))
    return jax.tree.structure(state).unflatten(new)

  def init(params: PyTree) -> QuantizedState:
    return QuantizedState(jnp.zeros([], jnp.int32), store(params, inner.init(params)))

  def update(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: PyTree
  ) -> tuple[optax.Updates, optax.OptState]:
    state = wrapping.own_state(state, QuantizedState, "quantized_state")
    old, treedef = jax.tree.flatten(state.inner_state, is_leaf=blocks.is_quantized)
    paths = [name for name, _ in _named(state.inner_state)]
    for name, leaf in zip(paths, old, strict=True):
      _check_stored(name, leaf, state_bits, block_size)
    like = _dtypes(inner, updates if params is None else params, len(old))

    def run(stored: list[PyTree]) -> tuple[optax.Updates, list[jax.Array]]:
      wide = [
        blocks.dequantize(x).astype(d) if blocks.is_quantized(x) else x for x, d in zip(stored, like, strict=True)
      ]
      new_updates, new_state = inner.update(updates, treedef.unflatten(wide), params, **extra_args)
      new = _flatten_new(treedef, state.inner_state, new_state)
      for name, before, after in zip(paths, stored, new, strict=True):
        if blocks.is_quantized(before) and jnp.shape(after) != before.values.shape:
          raise ValueError(
            f"quantized_state: the wrapped transformation changes {name} from {before.values.shape} to "
            f"{jnp.shape(after)}. Keep it as it is with where=..., which is given its path."
          )
      return new_updates, [
        jnp.asarray(after).astype(jnp.float32) if blocks.is_quantized(before) else after
        for before, after in zip(stored, new, strict=True)
      ]

    # The update runs twice: first for the largest magnitude of each block, then to store the codes. In one run, XLA:GPU
    # would write the new f32 state, 4 bytes per element, and read it in the next kernel. Computing it again is cheaper.
    # The barriers make the two runs differ, so that XLA does not merge them.
    _, new = run(old)
    pairs = [
      lax.optimization_barrier((before, blocks.largest_of(x, before)))
      if blocks.is_quantized(before)
      else (before, None)
      for x, before in zip(new, old, strict=True)
    ]
    updates, new = run([before for before, _ in pairs])
    new = [
      blocks.requantize(x, before, state.step, 2 * i, top) if blocks.is_quantized(before) else x
      for i, (x, (before, top)) in enumerate(zip(new, pairs, strict=True))
    ]
    return updates, QuantizedState(jnp.asarray(optax.safe_increment(state.step)), treedef.unflatten(new))

  return optax.GradientTransformationExtraArgs(init, update)


def dequantized(opt_state: PyTree) -> PyTree:
  """Converts every `Quantized` in a state to the f32 array that it stands for, to inspect or to export it.

  Args:
    opt_state: any tree.

  Returns:
    A tree like it. `optax.tree.get(optax_mpo.dequantized(opt_state), "mu")` returns the first moments in f32.

  Memory: 4 bytes per element of state, if the result is kept.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.quantized_state(optax.sgd(1e-2, momentum=0.9), min_size=1)
    >>> _, state = tx.update(jnp.arange(8.0), tx.init(jnp.zeros(8)))
    >>> mpo.dequantized(state).inner_state[0].trace.round(1)
    Array([0., 1., 2., 3., 4., 5., 6., 7.], dtype=float32)
  """
  opt_state = packing.unpack_all(host.fetched(opt_state))
  wide = jax.tree.map(
    lambda x: blocks.dequantize(x) if blocks.is_quantized(x) else x, opt_state, is_leaf=blocks.is_quantized
  )
  return buffers.own(wide, opt_state)


def _check_options(bits: object, block_size: object, min_size: object) -> None:
  if bits not in levels.BITS or isinstance(bits, bool):
    raise ValueError(f"quantized_state: state_bits has to be one of {levels.BITS}, but it is {bits!r}.")
  if not isinstance(block_size, int) or block_size < 2 or block_size & (block_size - 1):
    raise ValueError(
      f"quantized_state: block_size has to be a power of two, 2 or more, but it is {block_size!r}. The default, 32, is "
      "best for most; 64 and 128 save 0.03 and 0.05 bytes per element and are coarser."
    )
  if not isinstance(min_size, int) or min_size < 0:
    raise ValueError(f"quantized_state: min_size has to be a whole number of elements, but it is {min_size!r}.")


def _is_storable(leaf: jax.Array) -> bool:
  return trees.is_array(leaf) and leaf.ndim > 0 and leaf.size > 0 and leaf.dtype in (jnp.float32, jnp.bfloat16)


def _is_large(leaf: jax.Array, min_size: int) -> bool:
  return _is_storable(leaf) and math.prod(leaf.shape) >= min_size and leaf.shape[-1] >= _SHORTEST


def _is_owned(path: KeyPath, shape: tuple[int, ...], shapes: dict[KeyPath, tuple[int, ...]]) -> bool | None:
  """Whether a leaf of the state has the shape of the param whose path is part of its own, as in `mu['w']`.

  None if its path contains no param's path, as in a list of moments.
  """
  parts = [path[i:j] for i in range(len(path) + 1) for j in range(i, len(path) + 1)]
  found = [shapes[part] for part in parts if part in shapes]
  return shape in found if found else None


def _store(path: KeyPath, leaf: jax.Array, chosen: state_kinds.Kind | None, bits: int, block_size: int) -> PyTree:
  if chosen is False:
    return leaf
  name = trees.name(path, "the state's ")
  if chosen not in [*levels.KINDS]:
    *first, last = map(repr, levels.KINDS)
    raise ValueError(
      f"quantized_state: where returned {chosen!r} for {name}. Return {', '.join(first)} or {last} to store it by "
      "blocks, False to keep it as it is, or None for the default."
    )
  if not _is_storable(leaf):
    described = f"{leaf.dtype}{list(leaf.shape)}" if trees.is_array(leaf) else f"a {type(leaf).__name__}"
    raise ValueError(
      f"quantized_state: where asks to store {name}, which is {described}. Only float32 and bfloat16 arrays with an "
      "axis have blocks: return None or False for it."
    )
  return blocks.quantize(jnp.asarray(leaf).astype(jnp.float32), levels.KINDS[chosen](bits).dtype, block_size)


def _named(state: PyTree) -> list[tuple[str, PyTree]]:
  found = jax.tree_util.tree_leaves_with_path(state, is_leaf=blocks.is_quantized)
  return [(trees.name(path, "state.inner_state"), leaf) for path, leaf in found]


_REMAKE = "Make the state anew with init, or pass the one that this transformation made."


def _check_stored(name: str, leaf: PyTree, bits: int, block_size: int) -> None:
  """Raises ValueError if a stored leaf was made with other options, or if its two arrays do not match."""
  if not blocks.is_quantized(leaf):
    return
  values, scales = leaf
  if values.dtype not in [kind(bits).dtype for kind in levels.KINDS.values()]:
    raise ValueError(f"quantized_state: {name} is stored as {values.dtype}, but state_bits={bits}. {_REMAKE}")
  expected = (*values.shape[:-1], blocks.blocks(values.shape[-1], block_size))
  if scales.shape != expected or scales.dtype != jnp.uint16:
    raise ValueError(
      f"quantized_state: {name} has values of shape {list(values.shape)} and scales of {scales.dtype}"
      f"{list(scales.shape)}; with block_size={block_size} they are uint16{list(expected)}. {_REMAKE}"
    )


def _flatten_new(treedef: PyTreeDef, old: PyTree, new: PyTree) -> list[jax.Array]:
  """Returns the leaves of the new inner state, in the order of the old ones."""
  plain = jax.tree.map(lambda x: 0 if blocks.is_quantized(x) else x, old, is_leaf=blocks.is_quantized)
  hint = "A state has to keep its structure from step to step for its leaves to be stored."
  return trees.flatten_like(plain, new, "quantized_state: the new state of the wrapped transformation", hint, "the old")


def _dtypes(inner: optax.GradientTransformation, params: PyTree, count: int) -> list[DTypeLike]:
  """The dtypes of `inner`'s state (some are bf16 with `mu_dtype`, for example), or f32 if they are not known."""
  try:
    found = [leaf.dtype for leaf in jax.tree.leaves(wrapping.state_shapes(inner, params))]
  except jax.errors.ConcretizationTypeError:  # an init that reads concrete values
    found = []
  return found if len(found) == count else [jnp.float32] * count
