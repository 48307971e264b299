"""Steps the leaves of an ordinary update one by one, where there is a better way than XLA's to do so.

How: the update is computed as it is, and taken apart by leaves as fused steps do it. What is better done by
`_step_weight` is put in the place of what the update computed, and XLA drops what is not used then.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax

from optax_mpo import _formats, _made, _separable, _site, _step_weight, _tree

PyTree = Any


def replaced(
  tx: optax.GradientTransformation,
  given: tuple[PyTree, PyTree, PyTree],
  new: tuple[PyTree, PyTree],
  caller: str,
  *,
  kernels: bool,
) -> tuple[PyTree, PyTree]:
  """Returns the update `new` that `tx` made of `(updates, state, params)`, with leaves stepped by `_step_weight`.

  Args:
    tx: an update of which leaves may be taken out; its side effects are not kept, so that where there are any `new` is
      returned as it is.
    given: what its update was given.
    new: what it made of it.
    caller: who asks.
    kernels: whether a GPU may step weights by kernels of ours.
  """
  updates, state, params = given
  if not _step_weight.is_traced([*jax.tree.leaves(updates), *jax.tree.leaves(state), *jax.tree.leaves(params)]):
    return new
  try:
    taken = _separable.Update(tx, params, state, caller)
  except ValueError:  # an update that cannot be taken apart, such as one with side effects
    return new
  leaves, treedef = jax.tree.flatten(params)
  gradients, steps = (_tree.flatten_like(params, t, f"{caller}: the tree of updates", "") for t in (updates, new[0]))
  states = jax.tree.leaves(state)
  new_states, state_treedef = jax.tree.flatten(new[1])
  shared: Callable[[], dict[int, Any]] = _once(lambda: taken.run_shared()[0])
  for i, *others in taken.components(range(len(leaves))):
    if others or not _formats.is_low(leaves[i]) or gradients[i].dtype != leaves[i].dtype:
      continue
    group = taken.group([i], caller)
    (site,) = _site.of_groups([group], gradients, leaves, kernels)
    if not site.step.is_special:
      continue
    own, values = [states[j] for j in group.states], shared()
    arguments = ([gradients[i]], [leaves[i]], own, [values[v] for v in group.shared])
    (weight,), own = site.step.apply(*lax.stop_gradient(arguments))
    plain = _made.new_weights(steps[i], leaves[i])
    weight = weight if plain is None else _instead(plain, weight)
    steps[i] = _instead(steps[i], _formats.difference(leaves[i], weight))
    if plain is not None:
      _made.remember(steps[i], leaves[i], weight)
    for j, value in zip(group.states, own, strict=True):
      new_states[j] = _instead(new_states[j], value)
  return treedef.unflatten(steps), state_treedef.unflatten(new_states)


@jax.custom_jvp
def _instead(plain: jax.Array, better: jax.Array) -> jax.Array:
  """Returns `better` with the derivatives of `plain`, which is the same number."""
  return better


@_instead.defjvp
def _instead_jvp(primals: Any, tangents: Any) -> Any:
  return primals[1], tangents[0]


def _once(fun: Callable[[], Any]) -> Callable[[], Any]:
  found: list[Any] = []

  def call() -> Any:
    if not found:
      found.append(fun())
    return found[0]

  return call
