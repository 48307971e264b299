"""Updates each weight inside the backward pass, as soon as its gradient is complete, for any loss function.

Why: between the backward pass and the update, every gradient is held: 2 to 4 bytes per parameter, at the very moment
of the peak. If each gradient is applied and freed where it is made, only the largest one counts.

How: `jax.value_and_grad(loss_fn)` is traced to a program. `by_leaf` takes the update apart into updates of single
leaves, `planning` finds the place of each in the program, and `evaluate` runs the two together.

References: LOMO (arXiv:2306.09782) and Lewandowski & Kosson (arXiv:2309.12381) update in the backward pass of PyTorch.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from optax_mpo._core import modules, order, trees, wrapping
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom
from optax_mpo._stepping import evaluate, stores
from optax_mpo._stepping.microbatches import Microbatches, step_by_microbatches
from optax_mpo._stepping.traced import CALLER, Operands, Results, Traced, differentiated_as
from optax_mpo._updates import by_leaf, coupled
from optax_mpo._updates.late import Late, take


def groups_of(update: by_leaf.Update) -> list[by_leaf.Group]:
  """Returns the updates of single leaves, or raises ValueError where they are coupled."""
  groups = []
  for leaves in update.components(range(len(update.names))):
    try:
      groups.append(update.group(leaves[:1], CALLER))
    except ValueError as error:
      try:
        coupled.TwoPass(update, CALLER)
      except ValueError:
        raise error from None
      raise ValueError(f"{error} Or pass two_pass=True: exact, with a second backward pass.") from None
  return groups


def value_and_update(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformation,
  has_aux: bool = False,
  two_pass: bool = False,
  microbatches: int | Microbatches = 1,
) -> Callable[..., tuple[PyTree, PyTree, optax.OptState]]:
  """Makes a training step that updates each weight inside the backward pass and keeps no gradients.

  It replaces `jax.value_and_grad`, `tx.update` and `apply_updates`. The loss function needs no changes: shared weights,
  rematerialisation, custom derivatives, nested `jit` and scans over layers work as they are. The operations and the
  optimizer state are those of the ordinary step, so you can switch between the two at any time.

  The step is pure. To save the memory, run it under `jax.jit` with the params and the state donated.

  Args:
    loss_fn: `loss_fn(params, *args, **kwargs) -> f32[]`, or `(f32[], aux)` with `has_aux`, as `jax.value_and_grad`
      takes it. It gets float8 params decoded, as `decoded` returns them.
    tx: an Optax transformation that updates each leaf on its own: the update of a leaf may depend on step counts and
      schedules, but not on the gradients of other leaves. What it computes decides this, not its name.
    has_aux: whether `loss_fn` returns more than the loss.
    two_pass: allows updates that depend on all gradients through small arrays, such as clipping by their global norm,
      at the cost of a second backward pass. The first pass only computes these arrays. Stacks whose layers
      depend on each other in this way (`optax.clip_by_block_rms`) are then updated in their scans, too.
    microbatches: for gradient accumulation, the number of parts that the batch is split into along axis 0 of all
      arrays; or `Microbatches`, for other axes, weights and sums. Their gradients are added up in one accumulator, f32
      or, with `Microbatches(accumulator_bits=8)`, smaller.

  Returns:
    `step(params, opt_state, *args, tx_args=None, **kwargs) -> (value, params, opt_state)`; with `has_aux`, `value` is
    `(loss, aux)`. `tx_args` is a dict of extra arguments of `tx.update`. A transformation that takes `value`, such as
    `optax.contrib.reduce_on_plateau`, gets the loss in f32, unless `tx_args` has another one.

  Raises:
    NotImplementedError: by the step, on a JAX whose programs it cannot read, and where `loss_fn` has side effects that
      two passes would repeat.
    ValueError: by the step, where `opt_state` is not the state of `tx` for `params`, where `tx` couples leaves and
      `two_pass` does not help, and where `loss_fn` closes over a leaf of `params`.
    TypeError: by the step, where a leaf of `params` is not an array, or `tx.update` needs other extra arguments than
      those in `tx_args`; `grad` and `value_fn`, as line searches need them, cannot be given.
    The step also raises what `jax.value_and_grad` raises.

  Memory: saves the gradient tree, 2 to 4 bytes per parameter. At any time there is the gradient of one leaf, or, for
    layers in a `lax.scan`, of one leaf of one layer. `explain` tells which leaves are exceptions.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.compensated(optax.adamw(1e-2))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)})
    >>> def loss_fn(params, x):
    ...   return jnp.mean((x.astype(jnp.bfloat16) @ params["w"] + params["b"]).astype(jnp.float32) ** 2)
    >>> step = jax.jit(mpo.value_and_update(loss_fn, tx), donate_argnums=(0, 1))
    >>> value, params, opt_state = step(params, opt_state, jnp.ones((8, 4)))
    >>> float(value), params["w"].dtype.name
    (16.0, 'bfloat16')

  References:
    Lewandowski & Kosson, `Memory Efficient Mixed-Precision Optimizers <https://arxiv.org/abs/2309.12381>`_, 2023;
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
    <https://arxiv.org/abs/2306.09782>`_, 2023 (LOMO)
  """
  wrapping.check_loss(loss_fn, CALLER, "loss_fn, tx")
  tx = wrapping.as_transformation(tx, CALLER, "tx", "loss_fn, tx")
  how = Microbatches.of(microbatches)
  if how is not None:
    last = functools.partial(value_and_update, loss_fn, has_aux=has_aux, two_pass=two_pass)
    return step_by_microbatches(loss_fn, tx, has_aux, how, last)

  def step(
    params: PyTree,
    opt_state: optax.OptState,
    *args: PyTree,
    tx_args: Mapping[str, PyTree] | None = None,
    **kwargs: PyTree,
  ) -> tuple[PyTree, PyTree, optax.OptState]:
    extra = wrapping.extra_args(tx_args, CALLER)
    update = by_leaf.Update(tx, modules.pure(params), modules.pure(opt_state), CALLER, extra=extra)
    late = take(update)
    traced = Traced(loss_fn, has_aux, late.update, params, opt_state, args, kwargs)
    states, state_treedef = jax.tree.flatten(opt_state)
    operands = (
      [*traced.leaves, *traced.lifted],
      [*states, *jax.tree.leaves(extra)],
      traced.program.traced,
      update.program.traced,
    )
    value = None if "value" in (tx_args or {}) else update.value
    results, leaves, new_states = differentiated_as(
      functools.partial(_ordinary, traced, update, value),
      functools.partial(_released, traced, late, two_pass, value),
      operands,
    )
    new_state = state_treedef.unflatten(new_states[: len(states)])
    return traced.output(results), jax.tree.structure(params).unflatten(leaves), new_state

  return step


class _Shared:
  """What the updates of all leaves share. It is computed when the loss is known, since it may depend on it.

  Attributes:
    values: by variable.
    states: the new state that belongs to no leaf, by index.
    old: the leaves of the old state, with the loss among them where the update reads it.
  """

  def __init__(self, late: Late, value: int | None, old: Values, constants: dict[int, jax.Array]):
    self._late, self._value, self._constants = late, value, constants
    self.values: dict[int, jax.Array] | None = None
    self.states: dict[int, jax.Array] = {}
    self.old = late.with_parts(old)

  def compute(self, loss: jax.Array | None) -> dict[int, jax.Array]:
    """Computes the values, unless that has been done, and returns them."""
    if self.values is None:
      if self._value is not None:
        self.old[self._value] = jnp.asarray(loss, jnp.float32)
      self.values, self.states = self._late.update.at(self.old, self._constants).run_shared()
    return self.values


def _released(traced: Traced, late: Late, two_pass: bool, value: int | None, operands: Operands) -> Results:
  """Runs the step and updates each weight inside the backward pass."""
  inputs, old, loss_constants, constants = operands
  shared = _Shared(late, value, old, constants)
  traced, update = traced.at(inputs, loss_constants), late.update.at(shared.old, constants)
  loss = None if value is None else traced.results[0]
  new_weights: dict[int, jax.Array] = {}
  passes = two_passes(traced, update, CALLER) if two_pass else None
  if passes is not None:
    traced, kept, new_weights = _first_pass(traced, passes, shared, loss)
    # Without a barrier, XLA would see that both passes compute the same, and keep all of the first for the second.
    inputs, shared.values = order.barrier(([*inputs, *kept], shared.values))
    loss = None
  groups = groups_of(update) if passes is None else passes.groups

  def of_sites(loss: jax.Array | None) -> list[list[jax.Array]]:
    values = shared.compute(loss)
    return [[values[v] for v in group.shared] for group in groups]

  sites = traced.sites(groups, update.kernels)
  store = stores.Whole(inputs[: len(traced.leaves)], list(shared.old), groups)
  results = evaluate.run(traced.program, sites, inputs, traced.results, store, of_sites, loss=loss)
  shared.compute(results[0])  # if there was nothing to update
  for stored, new in ((store.leaves, new_weights), (store.states, shared.states)):
    for i, x in new.items():
      stored[i] = x
  return results, store.leaves, late.finish(shared.old, store.states, update.program.constants)


def _ordinary(traced: Traced, update: by_leaf.Update, value: int | None, operands: Operands) -> Results:
  """Runs the same step with all gradients first, as `jax.value_and_grad` and `tx.update` do."""
  inputs, old, loss_constants, constants = operands
  count = len(traced.leaves)
  out = jax_forms.call_source(traced.program.replaced(loss_constants), *inputs)
  results, grads = out[: len(out) - count], out[len(out) - count :]
  if value is not None:
    old = [jnp.asarray(results[0], jnp.float32) if j == value else x for j, x in enumerate(old)]
  new = jax_forms.call_source(update.program.replaced(constants), *grads, *inputs[:count], *old)
  return results, new[:count], new[count:]


def two_passes(traced: Traced, update: by_leaf.Update, caller: str) -> coupled.TwoPass | None:
  """Takes an update apart for two passes, where its leaves, or the layers of a stack, depend on each other.

  Stacks that can only be updated whole in one pass are tried in two, and have to be released in both.
  """
  passes = coupled.TwoPass(update, caller) if update.is_coupled else None
  alone = traced.held_stacks(traced.sites(passes.groups if passes else groups_of(update), update.kernels))
  while alone:
    try:
      tried = coupled.TwoPass(update, caller, alone)
    except ValueError:
      break
    held = traced.held_stacks(traced.sites(tried.groups, update.kernels)) | traced.held_stacks(
      traced.sites_of_parts(tried)
    )
    if not held & alone:
      return tried
    alone -= held
  return passes


def _first_pass(
  traced: Traced, passes: coupled.TwoPass, shared: _Shared, loss: Atom | None
) -> tuple[Traced, list[jax.Array], dict[int, jax.Array]]:
  """Runs a forward and a backward pass for the small arrays that couple the leaves, and adds them to what these share.

  Returns:
    The program of the second pass, which has no forward pass; the values that it reads of that of the first; and the
    new weights that are already made, by leaf.
  """
  if traced.effects:
    raise NotImplementedError(
      f"{CALLER}: two_pass runs parts of loss_fn twice, and it has effects: {trees.listed(map(str, traced.effects))}. "
      "Take callbacks and prints out, or use an update that does not couple the leaves."
    )
  sites = traced.sites_of_parts(passes)
  store = stores.Parts(sites)

  def known(loss: jax.Array | None) -> dict[int, jax.Array]:
    return passes.known(shared.compute(loss), traced.leaves, shared.old)

  def of_sites(loss: jax.Array | None) -> list[list[jax.Array]]:
    values = known(loss)
    return [[values[v] for v in (*part.reads, *part.shared)] for part in passes.parts]

  inputs = [*traced.leaves, *traced.lifted]
  weights = traced.program.inputs[: len(traced.leaves)]
  second, kept = traced.after_forward()
  results = [*([] if loss is None else [loss]), *kept]
  results = evaluate.run(traced.program, sites, inputs, results, store, of_sites, weights=weights, loss=loss)
  parts = {
    v: x for part, xs in zip(passes.parts, store.values, strict=True) for v, x in zip(part.outputs, xs, strict=True)
  }
  links, new_weights, new_states = passes.links(parts, known(None if loss is None else results[0]))
  shared.values = {v: links[v] for group in passes.groups for v in group.shared}
  shared.states |= new_states
  return second, results[len(results) - len(kept) :], new_weights
