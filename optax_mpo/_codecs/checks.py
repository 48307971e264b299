"""Checks of `compensated` before every update: params, state and gradients have to belong together."""

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import codec, formats
from optax_mpo._core import overwritten, trees
from optax_mpo._core.annotations import PyTree, Shaped


def check_update(
  updates: optax.Updates, compensation: PyTree, params: PyTree, bits: int
) -> tuple[list[PyTree], list[jax.Array]]:
  """Returns the checked leaves of the compensation and of the updates, in the order of the params' leaves."""
  remake = "Make the state anew with optax_mpo.init(tx, params), or pass the params it was made for."
  kept = trees.flatten_like(params, compensation, "compensated: the state's compensation", remake)
  grads = trees.flatten_like(
    params, updates, "compensated: the tree of updates", "Differentiate with respect to the very params you pass."
  )
  replaced = overwritten.flags(params)
  for (leaf_name, leaf), c, g, is_replaced in zip(trees.named_leaves(params), kept, grads, replaced, strict=True):
    if is_replaced:
      check_new_value("compensated", leaf_name, leaf, g)
      continue
    check_param("compensated", leaf_name, leaf, bits)
    _check_bits(leaf_name, leaf, bits_or_none(c), bits, remake)
    if not trees.is_array(g) or g.shape != leaf.shape:
      raise ValueError(
        f"compensated: {leaf_name} has shape {leaf.shape}, but its update is {described(g)}. "
        "Differentiate with respect to the very params you pass."
      )
    if not jnp.issubdtype(g.dtype, jnp.floating):
      raise TypeError(f"compensated: the update of {leaf_name} is {g.dtype}. Pass floating-point gradients.")
    if formats.is_scaled(g):
      raise TypeError(
        f"compensated: the gradient of {leaf_name} is {g.dtype}, so that it was taken with respect to codes without "
        "their scales, and most of it is rounded away. Differentiate with respect to decoded weights: "
        "jax.grad(loss_fn)(optax_mpo.decoded(params, opt_state), ...). optax_mpo.value_and_update does so by itself."
      )
  return kept, grads


def fits(leaf: Shaped, kept: PyTree) -> bool:
  """Whether bits have scales exactly where the format of their low-precision leaf needs them."""
  return isinstance(kept, codec.ScaledBits) == formats.is_scaled(leaf)


def _check_bits(leaf_name: str, leaf: Shaped, kept: PyTree, bits: int, remake: str) -> None:
  expected = codec.bits_dtype(bits) if bits and formats.is_low(leaf) else None
  array = kept.bits if isinstance(kept, codec.ScaledBits) else kept
  found = getattr(array, "dtype", None)
  if found != expected or (found is not None and not fits(leaf, kept)):
    raise_foreign_bits(leaf_name, leaf, kept, bits)
  if found is not None and array.shape != leaf.shape:
    raise ValueError(f"compensated: {leaf_name} has shape {leaf.shape}, its bits have {array.shape}. {remake}")


def check_param(who: str, leaf_name: str, leaf: Shaped, bits: int) -> None:
  """Checks that a param can be trained, and that its format supports `bits` compensation bits."""
  trees.check_trainable(leaf_name, leaf)
  if formats.is_low(leaf) and bits not in formats.widths(leaf.dtype):
    raise ValueError(
      f"{who}: {leaf_name} is {leaf.dtype}, for which extra_bits has to be one of {formats.widths(leaf.dtype)}, but it "
      f"is {bits}. Choose other bits, or give this leaf a compensated of its own with optax.multi_transform."
    )


def check_new_value(who: str, leaf_name: str, leaf: jax.Array, value: PyTree) -> None:
  """Checks the gradient of an overwritten leaf, which is its new value."""
  if not trees.is_array(value) or value.shape != jnp.shape(leaf) or not jnp.issubdtype(value.dtype, jnp.floating):
    kind = f"{value.dtype}{list(value.shape)}" if trees.is_array(value) else f"a {type(value).__name__}"
    raise ValueError(
      f"{who}: {leaf_name} is overwritten with its gradient. It is {leaf.dtype}{list(jnp.shape(leaf))}, and its "
      f"gradient {kind}. Differentiate with respect to the very params you pass."
    )


def described(x: PyTree) -> str:
  return f"an array of shape {x.shape}" if trees.is_array(x) else f"a {type(x).__name__}"


def raise_foreign_bits(leaf_name: str, leaf: Shaped, kept: PyTree, bits: int) -> None:
  held = codec.describe(kept)
  if not formats.is_low(leaf):
    raise ValueError(
      f"compensated: {leaf_name} is {leaf.dtype}, but the state holds {held} for it, so that it was low when the state "
      "was made. Keep the dtypes of the params from step to step (mpo.apply_updates and optax.apply_updates do); to "
      "change them, start again from optax_mpo.init(tx, f32_params)."
    )
  raise ValueError(
    f"compensated: {leaf_name} is {leaf.dtype} and this transformation keeps extra_bits={bits}, but the state holds "
    f"{held} for it: it was made with other `extra_bits`, or for params of another dtype. To carry the weights over: "
    "masters = optax_mpo.master_params(params, state) with the old state, then params, new = optax_mpo.init(tx, "
    "masters) and new._replace(inner_state=state.inner_state)."
  )


def bits_or_none(kept: PyTree) -> PyTree:
  """Returns what is kept for a leaf, or None for a tree without leaves, which a wrapper may leave there."""
  return kept if jax.tree.leaves(kept) else None


def bits_or_masked(kept: PyTree) -> PyTree:
  """Returns the bits kept for a leaf as a state holds them."""
  return optax.MaskedNode() if kept is None else kept
