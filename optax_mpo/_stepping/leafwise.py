"""Updates the leaves of an ordinary `tx.update` one by one: by a better backend, or streaming state.

Why: the backends of `step_weight` update one weight, but `tx.update` computes the whole tree. Where state is in host
memory, XLA would fetch that of the whole tree at once.

How: the update is computed as it is. It is also taken apart into leaves as in fused steps: by `by_leaf`, or by
`coupled` where small arrays couple the leaves, such as the norm for clipping. Where `step_weight` is better, its
results replace those of the update, and XLA drops what is then unused. So do those of `evaluate` where state is on the
host: it runs a program that only has the gradients as inputs, and takes large leaves by rows.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import optax
from jax import lax

from optax_mpo._backends import step_weight
from optax_mpo._codecs import formats, known_weights
from optax_mpo._core import host, overwritten, trees
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program.program import Program
from optax_mpo._stepping import evaluate, stores
from optax_mpo._stepping.site import Site, Taken, apply_all, of_groups
from optax_mpo._updates import by_leaf, coupled
from optax_mpo._updates.late import take

# From JAX 0.11 on, `inline=True` is inlined when XLA's program is made: `known_weights` would find nothing.
_WHILE_TRACING = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)

_Pair = tuple[jax.Array, jax.Array]
_Known = tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]
"""Values by variable that updates share; and the new weights and states, by index, that are made with them."""


def update(
  tx: optax.GradientTransformation, updates: PyTree, state: PyTree, params: PyTree, caller: str, *, kernels: bool
) -> tuple[PyTree, PyTree]:
  """Returns what `tx.update(updates, state, params)` does, with some leaves updated by `step_weight`.

  Args:
    tx: the transformation. If its update has side effects or cannot be taken apart, all of it runs as it is.
    updates: gradients, or what earlier transformations made of them.
    state: the state, which may be in host memory.
    params: the params, which may be in host memory.
    caller: the caller's name, for errors.
    kernels: whether a GPU may update weights with kernels of this package.
  """
  given = [*jax.tree.leaves(updates), *jax.tree.leaves(state), *jax.tree.leaves(params)]
  if not step_weight.is_traced(given) or not all(map(trees.is_array, given)):
    return tx.update(updates, state, params)
  once = _traced_once(tx, caller)
  with step_weight.left_out() as met:
    plain, new_state = once.update(updates, host.fetched(state), host.fetched(params))
  new = plain, host.stored_like(new_state, state)
  try:
    taken = take(by_leaf.Update(once, params, state, caller, kernels or bool(met))).rest
  except ValueError:  # an update that cannot be taken apart, such as one with side effects
    return new
  leaves, treedef = jax.tree.flatten(params)
  gradients, steps = (_by_leaf(params, tree, caller) for tree in (updates, plain))
  states = jax.tree.leaves(state)
  new_states, state_treedef = jax.tree.flatten(new[1])
  found, values_of = _groups(taken, caller)

  def is_known(i: int) -> bool:
    """Whether a leaf is updated as it was when the update was taken apart, by the same gradient."""
    same = not isinstance(steps[i], overwritten.NewValue) and gradients[i].dtype == leaves[i].dtype
    return formats.is_low(leaves[i]) and same

  groups = [group for group in found if is_known(group.leaves[0])]
  sites = of_groups(groups, gradients, leaves, kernels)
  several = sum(site.step.backend.together is not None for site in sites) > 1
  # All or none: beside leaves that are updated elsewhere, XLA:CPU rounds the rest in another way.
  is_streamed = any(host.is_on_host(x) for site in sites for x in site.step.states)
  streamed = set(range(len(sites))) if is_streamed else set()
  chosen = [
    k
    for k, site in enumerate(sites)
    if k in streamed or site.step.backend.is_special or (several and site.step.backend.together is not None)
  ]
  if not chosen:
    return new
  values, made, made_states = values_of(gradients, leaves, states)
  taken_by = []
  for group in (groups[k] for k in chosen):
    (i,) = group.leaves
    own = [states[j] for j in group.states]
    taken_by.append(lax.stop_gradient(([gradients[i]], [leaves[i]], own, [values[v] for v in group.shared])))
  given = dict(zip(chosen, taken_by, strict=True))
  here = [k for k in chosen if k not in streamed]
  stepped = dict(zip(here, apply_all([sites[k].step for k in here], [given[k] for k in here]), strict=True))
  there = sorted(streamed)
  stepped |= zip(there, _streamed([groups[k] for k in there], [given[k] for k in there]), strict=True)
  weights, own = {}, {}
  for k in chosen:
    (i,) = groups[k].leaves
    weights[i] = stepped[k][0][0]
    own |= zip(groups[k].states, stepped[k][1], strict=True)
  if is_streamed:
    weights |= {i: lax.stop_gradient(w) for i, w in made.items() if is_known(i)}
    own |= {j: lax.stop_gradient(x) for j, x in made_states.items()}
  for i, weight in weights.items():
    plain = known_weights.new_weights(steps[i], leaves[i])
    weight = weight if plain is None else _instead(plain, weight)
    steps[i] = _instead(steps[i], formats.difference(host.fetched(leaves[i]), host.fetched(weight)))
    if plain is not None:
      known_weights.remember(steps[i], leaves[i], weight)
  for j, value in own.items():
    new_states[j] = _instead(new_states[j], value)
  return treedef.unflatten(steps), state_treedef.unflatten(new_states)


def _streamed(groups: Sequence[by_leaf.Group], given: Sequence[Taken]) -> list[tuple[list[jax.Array], list[jax.Array]]]:
  """Updates leaves with state in host memory, each fetched when its turn comes, and by rows where it is large."""
  program, gradients, weights = Program(), {}, {}
  inputs, leaves, states = [], {}, {}
  for group, (grads, params, own, _) in zip(groups, given, strict=True):
    (i,) = group.leaves
    gradients[i], weights[i] = (program.new(jax.typeof(x)) for x in (*grads, *params))
    program.inputs += [gradients[i], weights[i]]
    inputs += [*grads, *params]
    leaves[i] = params[0]
    states |= zip(group.states, own, strict=True)
  store = stores.Whole(leaves, states, groups)
  sites: list[Site] = of_groups(groups, gradients, weights)
  evaluate.run(program, sites, inputs, [], store, [shared for *_, shared in given])
  return [store.get(k) for k in range(len(groups))]


def _groups(
  taken: by_leaf.Update, caller: str
) -> tuple[list[by_leaf.Group], Callable[[Values, Values, Values], _Known]]:
  """Returns the updates of single leaves, and a function `(gradients, weights, states)` of what is known before them.

  Leaves that depend on each other through more than small arrays are left out.
  """
  if taken.is_coupled:
    try:
      passes = coupled.TwoPass(taken, caller)
    except ValueError:
      pass
    else:

      def linked(gradients: Values, leaves: Values, states: Values) -> _Known:
        known = passes.known(taken.run_shared()[0], leaves, states)
        return passes.links(passes.parts_of(gradients, known), known)

      return passes.groups, linked
  alone = [leaves for leaves in taken.components(range(len(taken.names))) if len(leaves) == 1]
  return [taken.group(leaves, caller) for leaves in alone], lambda *_: (taken.run_shared()[0], {}, {})


def _by_leaf(params: PyTree, updates: PyTree, caller: str) -> list[PyTree]:
  return trees.flatten_like(params, updates, f"{caller}: the tree of updates", "")


def _traced_once(tx: optax.GradientTransformation, caller: str) -> optax.GradientTransformation:
  """`tx`, whose update runs as Python once in a trace: it is computed as it is, and then taken apart."""

  @functools.partial(jax.jit, inline=_WHILE_TRACING)
  def traced(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree, list[jax.Array | None]]:
    steps, new_state = tx.update(updates, state, params)
    pairs = zip(_by_leaf(params, steps, caller), jax.tree.leaves(params), strict=True)
    return steps, new_state, [known_weights.new_weights(*pair) for pair in pairs]

  def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
    steps, new_state, weights = traced(updates, state, params)
    for step, leaf, new in zip(_by_leaf(params, steps, caller), jax.tree.leaves(params), weights, strict=True):
      if new is not None:
        known_weights.remember(step, leaf, new)
    return steps, new_state

  return optax.GradientTransformation(tx.init, update)


@jax.custom_jvp
def _instead(plain: jax.Array, better: jax.Array) -> jax.Array:
  """Returns `better` with the derivatives of `plain`, which has the same value."""
  return better


@_instead.defjvp
def _instead_jvp(primals: _Pair, tangents: _Pair) -> _Pair:
  return primals[1], tangents[0]
