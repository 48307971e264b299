"""Steps the leaves of an ordinary update one by one, where there is a better way than XLA's to do so.

How: the update is computed as it is, and taken apart by leaves as fused steps do it: by `_separable`, or by `_two_pass`
where leaves are coupled through a few numbers, such as the norm that clipping needs. What is better done by
`_step_weight` is put in the place of what the update computed, and XLA drops what is not used then.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax import lax

from optax_mpo import _formats, _made, _separable, _site, _step_weight, _tree, _two_pass

PyTree = Any


def replaced(
  tx: optax.GradientTransformation,
  inputs: tuple[PyTree, PyTree, PyTree],
  new: tuple[PyTree, PyTree],
  caller: str,
  *,
  kernels: bool,
) -> tuple[PyTree, PyTree]:
  """Returns the update `new` that `tx` made of `(updates, state, params)`, with leaves stepped by `_step_weight`.

  Args:
    tx: an update of which leaves may be taken out; its side effects are not kept, so that where there are any `new` is
      returned as it is.
    inputs: what its update was given.
    new: what it made of it.
    caller: who asks.
    kernels: whether a GPU may step weights by kernels of ours.
  """
  updates, state, params = inputs
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
  try:
    found, values = _groups(taken, gradients, leaves, states, caller)
  except ValueError:  # leaves coupled through more than a few numbers
    return new
  groups = [
    group
    for group in found
    if _formats.is_low(leaves[group.leaves[0]]) and gradients[group.leaves[0]].dtype == leaves[group.leaves[0]].dtype
  ]
  sites = _site.of_groups(groups, gradients, leaves, kernels)
  small = {k: kernel for k, g in enumerate(groups) if kernels and (kernel := _site.small_kernel(g)) is not None}
  together = list(small) if len(small) > 1 else []
  given = {}
  for k in sorted({*together, *(k for k, site in enumerate(sites) if site.step.is_special)}):
    group, (i,) = groups[k], groups[k].leaves
    stacks = [leaves[i], *(states[j] for j in group.states)]
    given[k] = lax.stop_gradient((gradients[i], stacks, [values[v] for v in group.shared]))
  stepped = dict(
    zip(
      together,
      _step_weight.step_together(
        [sites[k].step.pure for k in together], [small[k] for k in together], [given[k] for k in together]
      ),
      strict=True,
    )
  )
  for k in given:
    (i,) = groups[k].leaves
    weight, *own = stepped[k] if k in stepped else _alone(sites[k].step, *given[k])
    plain = _made.new_weights(steps[i], leaves[i])
    weight = weight if plain is None else _instead(plain, weight)
    steps[i] = _instead(steps[i], _formats.difference(leaves[i], weight))
    if plain is not None:
      _made.remember(steps[i], leaves[i], weight)
    for j, value in zip(groups[k].states, own, strict=True):
      new_states[j] = _instead(new_states[j], value)
  return treedef.unflatten(steps), state_treedef.unflatten(new_states)


def _groups(
  taken: _separable.Update, gradients: Sequence[Any], leaves: Sequence[Any], states: Sequence[Any], caller: str
) -> tuple[list[_separable.Group], dict[int, Any]]:
  """Returns the updates of single leaves, and the values of what they share.

  Raises:
    ValueError: where leaves are coupled through more than a few numbers.
  """
  values, _ = taken.run_shared()
  components = list(taken.components(range(len(leaves))))
  if all(len(component) == 1 for component in components):
    return [taken.group(component, caller) for component in components], values
  passes = _two_pass.TwoPass(taken, caller)
  _, weights, state_vars = taken.inputs
  known = values | dict(zip([*weights, *state_vars], [*leaves, *states], strict=True))
  links, _, _ = passes.links(passes.parts_of(gradients, known), known)
  return passes.groups, links


def _alone(step: _site.Step, grad: Any, stacks: list[Any], shared: list[Any]) -> list[Any]:
  params, states = step.apply([grad], stacks[:1], stacks[1:], shared)
  return [*params, *states]


@jax.custom_jvp
def _instead(plain: jax.Array, better: jax.Array) -> jax.Array:
  """Returns `better` with the derivatives of `plain`, which is the same number."""
  return better


@_instead.defjvp
def _instead_jvp(primals: Any, tangents: Any) -> Any:
  return primals[1], tangents[0]
