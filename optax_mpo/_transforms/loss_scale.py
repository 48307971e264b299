"""Loss scaling for fp16, static or dynamic, around any Optax transformation.

Why: gradients under 2^-24 vanish in fp16. The loss is multiplied by a scale before it is differentiated, and the
gradients are divided by it in f32. If the scale is too large, gradients overflow: such a step is skipped, and a dynamic
scale is divided by `factor`, 2 by default.

How: `loss_scaled` wraps everything else, including `compensated`. The state is selected with `where`, without a
branch, so that XLA updates it in place.

Source: Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mpo._core import buffers, modules, overwritten, packing, wrapping
from optax_mpo._core.annotations import KeyPath, PyTree


class LossScaleState(NamedTuple):
  """State of `loss_scaled`.

  Attributes:
    scale: f32[], the factor for the next loss.
    good_steps: i32[], steps without an overflow since the last overflow or growth of the scale; 0 for a static scale.
    skipped: i32[], how many steps were skipped so far.
    inner_state: the state of the wrapped transformation.
  """

  scale: jax.Array
  good_steps: jax.Array
  skipped: jax.Array
  inner_state: optax.OptState


def loss_scaled(
  inner: optax.GradientTransformation,
  scale: float = 2.0**15,
  *,
  dynamic: bool = True,
  growth_interval: int = 2000,
  factor: float = 2.0,
  min_scale: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Divides gradients of a scaled loss by the scale, in f32, and skips steps where they overflowed.

  Multiply the loss by `loss_scale(opt_state)` and pass its gradients to `update`. Wrap everything,
  `loss_scaled(compensated(optax.adamw(3e-4)))`, so that clipping and moments see unscaled gradients.

  If any gradient is not finite, all updates are zero and the state of `inner` does not change.

  Args:
    inner: the transformation to wrap.
    scale: the scale, or the first one if `dynamic`. A power of two changes no significand bits.
    dynamic: whether the scale is divided by `factor` after a step with an overflow, and multiplied by it after
      `growth_interval` steps without. A static scale never changes, and steps with an overflow are skipped too.
    growth_interval: see above.
    factor: see above.
    min_scale: a dynamic scale stays between this and 2^120.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `LossScaleState`.

  Raises:
    ValueError: for an invalid `scale`, or if `dynamic` an invalid `growth_interval`, `factor` or `min_scale`.
    TypeError: if `inner` is not an Optax transformation; in `update`, if the state is not a `LossScaleState`.

  Memory: 12 bytes in total.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.loss_scaled(mpo.compensated(optax.sgd(1.0)), 2.0**15)
    >>> params, state = mpo.init(tx, {"w": jnp.ones(2)}, dtype=jnp.float16)
    >>> loss = lambda p, scale: scale * 1e-6 * jnp.sum(p["w"].astype(jnp.float32))
    >>> grads = jax.grad(loss)(params, mpo.loss_scale(state))
    >>> updates, state = tx.update(grads, state, params)
    >>> params = mpo.apply_updates(params, updates)
    >>> print(f"{1 - mpo.master_params(params, state)['w'][0]:.2e}")
    1.01e-06

  References:
    Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2017
  """
  if not 0 < scale < float("inf"):
    raise ValueError(f"loss_scaled: scale has to be a finite number above 0, but it is {scale!r}.")
  if dynamic and not (factor > 1 and growth_interval >= 1 and 0 < min_scale <= scale):
    raise ValueError(
      "loss_scaled: dynamic scaling needs factor > 1, growth_interval >= 1 and 0 < min_scale <= scale, but they are "
      f"{factor!r}, {growth_interval!r} and {min_scale!r}, with a scale of {scale!r}."
    )
  inner = wrapping.as_transformation(inner, "loss_scaled")

  def init(params: PyTree) -> LossScaleState:
    good_steps, skipped = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
    return LossScaleState(jnp.asarray(scale, jnp.float32), good_steps, skipped, inner.init(params))

  def update(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: PyTree
  ) -> tuple[optax.Updates, optax.OptState]:
    state = wrapping.own_state(state, LossScaleState, "loss_scaled")

    def unscaled(path: KeyPath, g: jax.Array) -> jax.Array:
      if overwritten.is_overwritten(path):
        return g  # a new value, not a gradient
      dtype = jnp.complex64 if jnp.iscomplexobj(g) else jnp.float32
      return g.astype(dtype) / state.scale.astype(dtype)

    grads = jax.tree_util.tree_map_with_path(unscaled, updates)
    finite = jnp.asarray(True)
    for g, is_replaced in zip(jax.tree.leaves(grads), overwritten.flags(grads), strict=True):
      finite = finite if is_replaced else finite & jnp.isfinite(g).all()
    updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
    inner_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state)
    skipped = jnp.where(finite, state.skipped, jnp.asarray(optax.safe_increment(state.skipped)))
    if not dynamic:
      return updates, LossScaleState(state.scale, state.good_steps, skipped, inner_state)
    good = jnp.where(finite, state.good_steps + 1, 0)
    grow = good >= growth_interval
    larger = jnp.minimum(state.scale * factor, jnp.float32(2.0**120))
    smaller = jnp.maximum(state.scale / factor, min_scale)
    new_scale = jnp.where(finite, jnp.where(grow, larger, state.scale), smaller).astype(jnp.float32)
    return updates, LossScaleState(new_scale, jnp.where(grow, 0, good), skipped, inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: optax.OptState) -> jax.Array:
  """Returns the factor to multiply the loss by, f32[].

  Args:
    opt_state: the state of a transformation with `loss_scaled` in it.

  Returns:
    The scale for the next step.

  Raises:
    ValueError: if there is no `LossScaleState` in the state, or several.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> float(mpo.loss_scale(mpo.loss_scaled(optax.sgd(0.1), 1024.0).init(jnp.ones(2))))
    1024.0
  """
  opt_state = packing.unpack_all(modules.pure(opt_state))
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, LossScaleState))
  found = [x.scale for x in leaves if isinstance(x, LossScaleState)]
  if len(found) != 1:
    raise ValueError(
      f"loss_scale: there are {len(found)} LossScaleStates in opt_state, and there has to be one. Wrap the whole "
      "transformation in loss_scaled, once."
    )
  return buffers.own(found[0], found)
