"""Norms of all gradients, recorded for logs or used for clipping in the next step, in one backward pass.

Why: a global norm needs all gradients before any weight can be updated, unless no weight needs it in this step. Then
each leaf gives its sum of squares when it is updated, and the norm is made at the end (`_updates/late.py`).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mpo._core import packing, trees, wrapping
from optax_mpo._core.annotations import KeyPath, PyTree


class RecordedNorms(NamedTuple):
  """The state of `record_norms`.

  Attributes:
    norms: f32[] each, the norms of the last step by their names; zeros before the first one.
  """

  norms: dict[str, jax.Array]


class DelayedNormState(NamedTuple):
  """The state of `clip_by_delayed_norm`.

  Attributes:
    norm: f32[], the norm that the next step is clipped by; 0 before the first step.
  """

  norm: jax.Array


def record_norms(
  name: str = "grad_norm",
  groups: Callable[[KeyPath, jax.Array], str | None] | None = None,
  of: Literal["updates", "params"] = "updates",
) -> optax.GradientTransformation:
  """Records the global norm of what passes through it, and changes nothing.

  Put it anywhere in a chain: first for the norm of the gradients, after `clip_by_delayed_norm` for that of the clipped
  gradients, last for that of the updates. Inside of `compensated` it sees f32 gradients. `recorded` reads the norms.
  Gradient release makes them in its one backward pass.

  The sum of squares is made in f32, along one axis after the other, so that it has the same bits for a stack of layers
  that a scan updates layer by layer as in the ordinary step, unless XLA fuses the two differently.

  Args:
    name: the name of the norm, unlike that of any other recorder in the same transformation.
    groups: `groups(path, leaf) -> str | None` gives the group of a leaf, by JAX's key path. The norm of each group is
      recorded as `name/group`. None: no groups; a leaf for which it returns None belongs to none.
    of: "updates" for what passes through, or "params" for the params that the step started with.

  Returns:
    The transformation. Its state is `RecordedNorms`.

  Raises:
    ValueError: for another `of`; by `update`, if params are needed and not given.

  Memory: 4 bytes for each norm.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.compensated(optax.chain(mpo.record_norms(), optax.sgd(0.5), mpo.record_norms("update_norm")))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.ones(2), "b": jnp.ones(1)})
    >>> step = mpo.value_and_update(lambda p: 3 * p["w"][0] + 4 * p["b"][0], tx)
    >>> _, params, opt_state = step(params, opt_state)
    >>> {name: float(norm) for name, norm in mpo.recorded(opt_state).items()}
    {'grad_norm': 5.0, 'update_norm': 2.5}
  """
  if of not in ("updates", "params"):
    raise ValueError(f"record_norms: of has to be 'updates' or 'params', but it is {of!r}.")

  def by_name(tree: PyTree) -> dict[str, list[int]]:
    """The positions of the leaves that each norm is made of."""
    found: dict[str, list[int]] = {name: []}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
      found[name].append(i)
      if groups is not None and (group := groups(path, leaf)) is not None:
        found.setdefault(f"{name}/{group}", []).append(i)
    return found

  def init(params: optax.Params) -> RecordedNorms:
    return RecordedNorms({key: jnp.zeros([], jnp.float32) for key in by_name(params)})

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    state = wrapping.own_state(state, RecordedNorms, "record_norms")
    if of == "params" and params is None:
      raise ValueError(f"record_norms: {name!r} is a norm of the params: call tx.update(grads, opt_state, params).")
    measured = updates if of == "updates" else params
    found = by_name(measured)
    if unlike := set(found) ^ set(state.norms):
      raise ValueError(
        f"record_norms: groups give {trees.listed(sorted(unlike))} now and not at init, or the other way round. They "
        "have to give each leaf the same group, whatever its dtype."
      )
    squares = list(map(_sum_of_squares, jax.tree.leaves(measured)))
    return updates, RecordedNorms({key: _norm([squares[i] for i in leaves]) for key, leaves in found.items()})

  return optax.GradientTransformation(init, update)


def recorded(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Returns what all `record_norms` of a transformation have recorded in the last step.

  Args:
    opt_state: the state of any transformation with recorders in it.

  Returns:
    f32[] each, by name; empty if there is no recorder.

  Raises:
    ValueError: if two recorders have the same name.
  """
  norms: dict[str, jax.Array] = {}
  for state in jax.tree.leaves(packing.unpack_all(opt_state), is_leaf=_is_recorder):
    if not _is_recorder(state):
      continue
    if twice := norms.keys() & state.norms.keys():
      raise ValueError(
        f"recorded: two recorders are called {trees.listed(sorted(map(repr, twice)))}. Give each a name of its own: "
        "record_norms('update_norm'). Inside per_layer, a recorder counts once for each leaf: put it around per_layer."
      )
    norms |= state.norms
  return norms


def clip_by_delayed_norm(max_norm: float, decay: float = 0.0) -> optax.GradientTransformation:
  """Clips by the global norm of the step before, or by its moving average, in one backward pass.

  `optax.clip_by_global_norm` needs the norm of all gradients before it can scale the first one, and so two backward
  passes. This one scales by `max_norm / norm` where `norm` is known already and above `max_norm`. It keeps a long run
  at the step size that clipping would give it, but a sudden spike is only answered in the next step. Where spikes are
  the reason for clipping, use `optax.clip_by_global_norm` with `two_pass=True`, or clip each layer by its own norm.

  The first step has no norm to clip by and is left as it is; so is each step until a norm is neither zero nor infinite
  nor NaN. A norm that is not finite is ignored.

  Args:
    max_norm: the norm to clip to, above 0.
    decay: the fraction of the average that each step keeps, 0 to below 1. With 0 it is the norm of the step before.

  Returns:
    The transformation. Its state is `DelayedNormState`.

  Raises:
    ValueError: if `max_norm` or `decay` is out of range, unless it is traced, as by `optax.inject_hyperparams`.

  Memory: 4 bytes.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.clip_by_delayed_norm(1.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> first, state = tx.update(jnp.array([3.0, 4.0]), state)
    >>> second, state = tx.update(jnp.array([3.0, 4.0]), state)
    >>> print(first, second)
    [3. 4.] [0.6 0.8]
  """
  if not isinstance(max_norm, jax.Array) and not max_norm > 0:
    raise ValueError(f"clip_by_delayed_norm: max_norm has to be above 0, but it is {max_norm}.")
  if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
    raise ValueError(f"clip_by_delayed_norm: decay has to be at least 0 and below 1, but it is {decay}.")

  def init(params: optax.Params) -> DelayedNormState:
    return DelayedNormState(jnp.zeros([], jnp.float32))

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    state = wrapping.own_state(state, DelayedNormState, "clip_by_delayed_norm")
    scale = jnp.where(state.norm > max_norm, max_norm / state.norm, jnp.float32(1))
    norm = _norm(list(map(_sum_of_squares, jax.tree.leaves(updates))))
    average = jnp.where(state.norm > 0, decay * state.norm + (1 - decay) * norm, norm)
    average = jnp.where(jnp.isfinite(norm), average, state.norm)
    return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), DelayedNormState(average)

  return optax.GradientTransformation(init, update)


def _is_recorder(x: object) -> bool:
  return isinstance(x, RecordedNorms)


def _norm(squares: list[jax.Array]) -> jax.Array:
  """The norm of several leaves, f32[], from the sums of their squares."""
  return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))


def _sum_of_squares(x: jax.Array) -> jax.Array:
  """Sums the squares of a leaf, f32[], along one axis after the other.

  So the result does not depend on whether a scan makes the leaf layer by layer, or in which layout. The maximum keeps
  XLA from summing along several axes at once.
  """
  total = jnp.square(jnp.abs(x)).astype(jnp.float32) if jnp.iscomplexobj(x) else jnp.square(x.astype(jnp.float32))
  while total.ndim > 1:
    total = jnp.maximum(jnp.sum(total, axis=-1), 0)
  return jnp.sum(total)
