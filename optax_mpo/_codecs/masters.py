"""Reads weights from params and the compensation bits in an optimizer state: f32 masters, and what a loss gets.

Why: bits are in the state of `compensated`, which may be anywhere inside the state of a transformation.

How: all `CompensatedState`s in the state are found by their type. At most one of them has bits for a param.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import checks, codec, formats
from optax_mpo._core import buffers, host, modules, overwritten, packing, trees
from optax_mpo._core.annotations import PyTree


class CompensatedState(NamedTuple):
  """State of `compensated`.

  Attributes:
    compensation: a tree like the params with `uint16`, `uint8` or `uint4` leaves of the params' shapes. A leaf without
      bits (f32 params, extra_bits=0, overwritten leaves) has an `optax.MaskedNode()`, and a float8 leaf a `ScaledBits`.
    inner_state: the state of the wrapped transformation, made from f32 params. With stochastic rounding, a
      `RoundingState` around it.
  """

  compensation: PyTree
  inner_state: optax.OptState


def master_params(params: PyTree, opt_state: optax.OptState) -> PyTree:
  """Returns the f32 master weights that `params` and the compensation bits in `opt_state` stand for.

  Args:
    params: the low-precision params.
    opt_state: the state of a transformation with `compensated` anywhere inside it.

  Returns:
    A tree like `params` in which low-precision leaves are f32[*s], joined with their bits if they have any. Other
    leaves are unchanged; outside of jit they are copies, so that the result or `params` can be donated.

  Raises:
    ValueError: if `opt_state` has no `CompensatedState`, one for other params, two with bits for one leaf, or bits that
      a wrapper around `compensated` has split.
    TypeError: if the arguments are swapped.

  Memory: 4 bytes per parameter if the result is kept; none if XLA fuses it into its use.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = optax.chain(optax.identity(), mpo.compensated(optax.sgd(0.1)))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.full(1, 1 / 3)})
    >>> mpo.master_params(params, opt_state)
    {'w': Array([0.33333334], dtype=float32)}
  """
  given, params, opt_state = params, host.fetched(modules.pure(params)), modules.pure(opt_state)
  kept = kept_of(params, opt_state, "master_params")
  masters = [
    formats.join(jnp.asarray(leaf), k) if trees.is_array(leaf) and formats.is_low(leaf) and not replaced else leaf
    for leaf, k, replaced in zip(jax.tree.leaves(params), kept, overwritten.flags(params), strict=True)
  ]
  return buffers.own(modules.in_form_of(given, jax.tree.structure(params).unflatten(masters)), given)


def decoded(params: PyTree, opt_state: optax.OptState) -> PyTree:
  """Returns the weights that a loss function computes with: float8 params times their scales, in bf16.

  Use it in an ordinary step and for evaluation. `value_and_update` calls it itself. A float8 param is a code, which is
  no weight without the scale of its block; the scales are in the state.

  Args:
    params: the low-precision params.
    opt_state: the state of a transformation with `compensated` anywhere inside it.

  Returns:
    A tree like `params` in which float8 leaves are bf16[*s], exactly code times scale. Other leaves are unchanged;
    outside of jit they are copies, so that the result or `params` can be donated.

  Raises:
    ValueError: as `master_params`, and where there are no scales for a float8 leaf.
    TypeError: if the arguments are swapped, or if this is differentiated with respect to a float8 leaf: differentiate
      with respect to the result.

  Memory: 2 bytes per float8 parameter, as long as the result is used.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.compensated(optax.sgd(0.1))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.full(3, 0.02)}, dtype=jnp.float8_e4m3fn)
    >>> weights = mpo.decoded(params, opt_state)
    >>> print(params["w"], weights["w"])
    [320 320 320] [0.0195312 0.0195312 0.0195312]
    >>> grads = jax.grad(lambda weights: jnp.sum(weights["w"] ** 2))(weights)
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = mpo.apply_updates(params, updates)
  """
  given, params, opt_state = params, modules.pure(params), modules.pure(opt_state)
  _check_order(params, opt_state, "decoded")
  return buffers.own(modules.in_form_of(given, decode(params, opt_state, "decoded")), given)


def decode(params: PyTree, opt_state: optax.OptState, who: str) -> PyTree:
  """As `decoded`, without copies of the leaves that are not decoded."""
  weights = map(formats.decode, jax.tree.leaves(host.fetched(params)), scales_of(params, opt_state, who))
  return jax.tree.structure(params).unflatten(list(weights))


def scales_of(params: PyTree, opt_state: optax.OptState, who: str) -> list[jax.Array | None]:
  """Returns for each leaf of `params` the scales that `formats.decode` needs; None where it needs none.

  Raises:
    ValueError: where there are none for a leaf that needs them, and as `master_params`.
  """
  leaves = zip(jax.tree.leaves(params), overwritten.flags(params), strict=True)
  scaled = [trees.is_array(leaf) and formats.is_scaled(leaf) and not replaced for leaf, replaced in leaves]
  if not any(scaled):
    return [None] * len(scaled)
  kept = kept_of(params, opt_state, who)
  return [k.scales if needed else None for needed, k in zip(scaled, kept, strict=True)]


def kept_of(params: PyTree, opt_state: optax.OptState, who: str) -> list[PyTree]:
  """Returns the bits of each leaf of `params`, or None, from all states of `compensated` in `opt_state`."""
  _check_order(params, opt_state, who)
  found = states_in(opt_state)
  if not found:
    raise ValueError(f"{who}: there is no CompensatedState in opt_state. Wrap the transformation in compensated.")
  hint = "Pass the params that this state belongs to."
  per_state = [trees.flatten_like(params, s.compensation, f"{who}: the compensation in opt_state", hint) for s in found]
  chosen = []
  replaced = overwritten.flags(params)
  for i, (leaf_name, leaf) in enumerate(trees.named_leaves(params)):
    kept = [c[i] for c in per_state if checks.bits_or_none(c[i]) is not None]
    if len(kept) > 1:
      raise ValueError(f"{who}: two states in opt_state hold compensation bits for {leaf_name}. {hint}")
    bits: PyTree = kept[0].bits if kept and isinstance(kept[0], codec.ScaledBits) else [*kept, None][0]
    if kept and not trees.is_array(bits):
      raise ValueError(
        f"{who}: a transformation around compensated splits {leaf_name} into {len(jax.tree.leaves(kept[0]))} "
        "low-precision leaves, and only it can put their bits together. Split the params themselves, or keep this leaf "
        "in float32 with the argument where of optax_mpo.init."
      )
    if kept and (not formats.is_low(leaf) or bits.shape != leaf.shape or not checks.fits(leaf, kept[0])):
      raise ValueError(
        f"{who}: {leaf_name} is {leaf.dtype}{list(leaf.shape)}, but its compensation bits belong to a low-precision "
        f"leaf of shape {list(bits.shape)}{'' if checks.fits(leaf, kept[0]) else ' and another dtype'}. {hint}"
      )
    if not kept and trees.is_array(leaf) and formats.is_scaled(leaf) and not replaced[i]:
      raise ValueError(
        f"{who}: {leaf_name} is {leaf.dtype}, and opt_state has no scales for it, without which it is no weight. Make "
        "params and state with optax_mpo.init(tx, f32_params, dtype=...), where a compensated in tx trains the leaf."
      )
    chosen.append(host.fetched(kept[0]) if kept else None)
  return chosen


def _check_order(params: PyTree, opt_state: optax.OptState, who: str) -> None:
  if states_in(params) and not states_in(opt_state):
    raise TypeError(f"{who}: params is an optimizer state, and opt_state none. Call {who}(params, opt_state).")


def states_in(tree: PyTree) -> list[CompensatedState]:
  """Returns the states of all `compensated` in a tree."""
  found = jax.tree.leaves(packing.unpack_all(tree), is_leaf=lambda s: isinstance(s, CompensatedState))
  return [s for s in found if isinstance(s, CompensatedState)]
