"""Hands f32 weights through `tx.init` to the `compensated` that trains them, for the bits that the cast cuts off.

Why: `tx.init` gets low-precision params, so that whatever is around `compensated` makes its state for those. The bits
that the cast cut off have to reach `compensated` past it.

How: by identity. `initialised` notes which master each low-precision leaf was made of, and `claimed` looks a leaf up.
"""

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_mpo._codecs import blocks, cast, checks, formats
from optax_mpo._core import buffers, trees, wrapping
from optax_mpo._core.annotations import PyTree


@dataclasses.dataclass
class _Original:
  """A master weight on its way through `tx.init`, and the param that a `compensated` made of it."""

  name: str
  placeholder: jax.Array  # low[*s]: what the transformations around `compensated` see; kept alive for its id
  master: jax.Array  # f32[*s]
  low: jax.Array | None = None  # None until a `compensated` claims the leaf


_originals: contextvars.ContextVar[dict[int, _Original]] = contextvars.ContextVar("optax_mpo_originals")


@contextlib.contextmanager
def _handing(originals: dict[int, _Original]) -> Iterator[None]:
  token = _originals.set(originals)
  try:
    yield
  finally:
    _originals.reset(token)


def warn_of_f32(params: PyTree) -> None:
  """Warns if no param has low precision, as when Flax's own TrainState or nnx.Optimizer calls `tx.init`."""
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  whole = bool(leaves) and not any(isinstance(leaf, optax.MaskedNode) for leaf in leaves)
  if _originals.get(None) is None and whole and not any(map(formats.is_low, leaves)) and not wrapping.is_for_shapes():
    warnings.warn(
      "compensated: all params that init was given are float32. They will be trained in float32, and compensated saves "
      "no memory. Make them and the state with params, opt_state = optax_mpo.init(tx, params), or with TrainState or "
      "Optimizer of optax_mpo.flax instead of Flax's own. If they are to stay float32, say so: "
      "optax_mpo.init(tx, params, where=lambda path, leaf: False).",
      stacklevel=3,
    )


def claimed(leaf_name: str, leaf: jax.Array, bits: int) -> tuple[jax.Array, PyTree]:
  """Returns a leaf's master weight f32[*s] and its bits, for the `init` of `compensated`."""
  if not formats.is_low(leaf):
    return leaf, optax.MaskedNode()
  original = _originals.get({}).get(id(leaf))
  if original is None:
    # There is no f32 original: the low-precision value itself is the master weight, and its bits are zero.
    leaf = jnp.asarray(leaf)
    return formats.widen(leaf), checks.bits_or_masked(formats.zero_bits(leaf, bits))
  if original.low is not None:
    raise ValueError(
      f"init: {leaf_name} is trained by two compensated(...) transformations, and each would keep bits for it. Wrap "
      "the whole chain once, or give each its own leaves with optax.masked or optax.multi_transform."
    )
  original.low, kept, master = formats.stored(original.master, leaf.dtype, bits)
  return master, checks.bits_or_masked(kept)


def initialised(
  tx: optax.GradientTransformation, params: PyTree, dtype: DTypeLike, where: cast.Where | None
) -> tuple[PyTree, PyTree]:
  """Returns what `compensated.init` returns, without a check that nothing around `compensated` changes its updates."""
  trees.check_arrays(params, "init")
  originals: dict[int, _Original] = {}
  mixed = []
  names = [leaf_name for leaf_name, _ in trees.named_leaves(params)]
  for leaf_name, (leaf, low) in zip(names, cast.chosen(params, dtype, where, "init"), strict=True):
    if low:
      master = jnp.asarray(leaf)
      leaf = formats.split(master, dtype, min(formats.widths(dtype)))[0]
      originals[id(leaf)] = _Original(leaf_name, leaf, master)
    mixed.append(leaf)
  treedef = jax.tree.structure(params)
  with _handing(originals):
    opt_state = tx.init(treedef.unflatten(mixed))
  lost = [original.name for original in originals.values() if original.low is None]
  if lost:
    raise ValueError(
      f"init: no compensated(...) in tx trains {trees.listed(lost)}, so that the bits cut off would be lost. Wrap the "
      "transformation of these leaves in compensated (extra_bits=0 keeps none), keep them in float32 with where=..., "
      "or, to hold frozen weights in bfloat16, cast them with optax_mpo.cast before. If they are wrapped, something "
      "around compensated copies or reshapes the params in its init (optax.flatten and jit do): put it inside."
    )
  _check_state(treedef.unflatten(mixed), opt_state)
  low = [originals[id(leaf)].low if id(leaf) in originals else leaf for leaf in mixed]
  return buffers.own((treedef.unflatten(low), opt_state), params)


def _check_state(params: PyTree, opt_state: PyTree) -> None:
  """Raises ValueError where a wrapper around `compensated` makes state in the dtype of params that need scales."""
  if not any(trees.is_array(leaf) and formats.is_scaled(leaf) for leaf in jax.tree.leaves(params)):
    return
  named, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=blocks.is_quantized)
  for path, leaf in named:
    if trees.is_array(leaf) and formats.is_scaled(leaf):
      raise ValueError(
        f"init: {trees.name(path, 'opt_state')} is {leaf.dtype}, since something around compensated makes state in the "
        "dtype of the params (as optax.trace does, and optax.inject_hyperparams without hyperparam_dtype). Without "
        "scales that dtype is of no use for it: put it inside, compensated(optax.chain(...)), or give it a dtype."
      )
