"""Measures how many weights an update does not change, because rounding drops it. Compensation bits prevent this.

Why: a weight that does not change in spite of steady updates looks like convergence. It depends on the size of the
weights and on the learning rate, so it is measured per leaf.
"""

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import checks, formats
from optax_mpo._codecs.masters import master_params
from optax_mpo._core import modules, overwritten, renames, trees
from optax_mpo._core.annotations import PyTree


@renames.renamed(bits="extra_bits")
def lost_updates(
  params: PyTree, updates: optax.Updates, extra_bits: int = 0, opt_state: optax.OptState | None = None
) -> PyTree:
  """Returns for each leaf the fraction of weights that a nonzero update does not change.

  Args:
    params: params in bf16, fp16, f32 or complex64.
    updates: the f32 updates to add to them, as an Optax transformation without `compensated` makes them from
      `master_params`. Updates of `compensated` are already rounded.
    extra_bits: how many compensation bits the weights have: 0 for plain low precision; with 16 in bf16, an update is
      lost only if f32 loses it.
    opt_state: a state with `compensated` in it that belongs to `params`. Without it, their bits are taken to be zero.

  Returns:
    A tree like `params` of f32[], from 0 to 1, for logging, for rounding to nearest. For f32 and complex leaves it is
    the fraction that their own precision loses.

  Raises:
    ValueError: for other values of `extra_bits`, and if trees or shapes do not match.
    TypeError: for params that are not bf16, fp16, f32 or complex.

  Example:
    >>> import jax.numpy as jnp, optax_mpo as mpo
    >>> params = {"w": jnp.ones(4, jnp.bfloat16), "small": jnp.full(4, 1e-3, jnp.bfloat16)}
    >>> updates = {"w": jnp.full(4, 1e-4), "small": jnp.full(4, 1e-4)}
    >>> {name: float(share) for name, share in mpo.lost_updates(params, updates).items()}
    {'small': 0.0, 'w': 1.0}
    >>> {name: float(share) for name, share in mpo.lost_updates(params, updates, extra_bits=8).items()}
    {'small': 0.0, 'w': 0.0}
  """
  bits = extra_bits
  if not isinstance(bits, int) or isinstance(bits, bool) or bits not in formats.BITS:
    found = repr(bits) if isinstance(bits, int) else f"a {type(bits).__name__}"
    raise ValueError(
      f"lost_updates: extra_bits has to be one of {formats.BITS}, but it is {found}. "
      "Call lost_updates(params, updates, extra_bits, opt_state)."
    )
  given, params, updates = params, modules.pure(params), modules.pure(updates)
  steps = trees.flatten_like(params, updates, "lost_updates: the tree of updates", "Pass updates for these params.")
  masters = jax.tree.leaves(params if opt_state is None else master_params(params, opt_state))
  shares = []
  replaced = overwritten.flags(params)
  for (name, leaf), master, step, is_replaced in zip(trees.named_leaves(params), masters, steps, replaced, strict=True):
    if is_replaced:
      shares.append(jnp.zeros([], jnp.float32))
      continue
    is_complex = trees.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    if not is_complex:
      checks.check_param("lost_updates", name, leaf, bits)
      if opt_state is None and formats.is_scaled(leaf):
        raise ValueError(f"lost_updates: {name} is {leaf.dtype}, and its scales are in the state. Pass opt_state.")
    if jnp.shape(step) != jnp.shape(leaf):
      raise ValueError(
        f"lost_updates: {name} has shape {jnp.shape(leaf)}, but its update has {jnp.shape(step)}. "
        "Pass updates for these params."
      )
    step = jnp.asarray(step) if is_complex else jnp.asarray(step).astype(jnp.float32)
    shares.append(_share(leaf, master, step, bits))
  return modules.in_form_of(given, jax.tree.structure(params).unflatten(shares))


def _share(leaf: jax.Array, master: jax.Array, step: jax.Array, bits: int) -> jax.Array:
  if formats.is_low(leaf):
    wide = formats.widen(jnp.asarray(leaf)) if formats.is_low(master) else master

    def kept(x: jax.Array) -> jax.Array:
      return formats.join(*formats.split(x, leaf.dtype, bits))

    moved = kept(wide + step) != kept(wide)
  else:
    moved = master + step != master
  return jnp.mean((~moved & (step != 0)).astype(jnp.float32)) if step.size else jnp.zeros([], jnp.float32)
