"""Updates each weight inside the backward pass, as soon as its gradient is complete, for any loss function.

Why: between the backward pass and the update, every gradient is held: 2 to 4 bytes per parameter, at the very moment
of the peak. If each gradient is applied and freed where it is made, only the largest one counts.

How: `jax.value_and_grad(loss_fn)` is traced to a program. `by_leaf` takes the update apart into updates of single
leaves, `planning` finds the place of each in the program, and `evaluate` runs the two together.

References: LOMO (arXiv:2306.09782) and Lewandowski & Kosson (arXiv:2309.12381) update in the backward pass of PyTorch.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import formats, masters
from optax_mpo._core import modules, order, primitives, trees, wrapping
from optax_mpo._program import jax_forms, recompute, residuals
from optax_mpo._program.program import Program
from optax_mpo._stepping import evaluate, first_pass, planning
from optax_mpo._stepping.plan import FOLLOWED
from optax_mpo._stepping.site import Place, Site, of_groups
from optax_mpo._updates import by_leaf, coupled
from optax_mpo._updates.late import Late, take

PyTree = Any

_CALLER = "value_and_update"


class Traced:
  """`jax.value_and_grad(loss_fn)` as a program, for one set of shapes.

  The loss is differentiated with respect to the leaves whose gradients the update reads. The others, such as frozen
  weights, get a gradient of zeros, which nothing reads. It gets params whose dtype has scales decoded, and is
  differentiated with respect to what it gets.
  """

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    has_aux: bool,
    update: by_leaf.Update,
    params: PyTree,
    opt_state: PyTree,
    args: Any,
    kwargs: Any,
  ):
    jax_forms.check_forms(_CALLER)
    scales_of = masters.scales_of(modules.pure(params), modules.pure(opt_state), _CALLER)
    self.leaves, treedef = jax.tree.flatten(params)
    self._trained = [update.needs_gradient(i) for i in range(len(self.leaves))]
    rest, rest_treedef = jax.tree.flatten((args, kwargs))
    scales = [x for x in scales_of if x is not None]
    self.lifted = [*(x for x in rest if trees.is_array(x)), *scales]
    self._out: Any = None

    def decoded(leaves: list[Any], lifted: list[Any]) -> list[Any]:
      values = iter(lifted[len(lifted) - len(scales) :])
      return [formats.decode(p, None if s is None else next(values)) for p, s in zip(leaves, scales_of, strict=True)]

    def loss_of(trained: dict[int, Any], leaves: list[Any], lifted: list[Any]) -> Any:
      values = iter(lifted)
      args, kwargs = rest_treedef.unflatten([next(values) if trees.is_array(x) else x for x in rest])
      return loss_fn(treedef.unflatten([trained.get(i, leaf) for i, leaf in enumerate(leaves)]), *args, **kwargs)

    def arrays_of_loss(leaves: list[Any], lifted: list[Any]) -> list[Any]:
      return [x for x in jax.tree.leaves(loss_of({}, leaves, lifted)) if trees.is_array(x)]

    def flat(leaves: list[Any], lifted: list[Any]) -> tuple[list[Any], list[Any]]:
      leaves = decoded(leaves, lifted)
      trained = {i: leaf for i, leaf in enumerate(leaves) if self._trained[i]}
      out, found = jax.value_and_grad(loss_of, has_aux=has_aux)(trained, leaves, lifted)
      grads = [found[i] if i in found else jnp.zeros_like(leaf) for i, leaf in enumerate(leaves)]
      results, out_treedef = jax.tree.flatten(out)
      self._out = [None if trees.is_array(x) else x for x in results], out_treedef
      return [x for x in results if trees.is_array(x)], grads

    self._arrays_of_loss = arrays_of_loss
    closed = jax.make_jaxpr(flat)(self.leaves, self.lifted)
    for (name, _), leaf in zip(trees.named_leaves(params), self.leaves, strict=True):
      if any(const is leaf for const in closed.consts):
        raise ValueError(
          f"{_CALLER}: loss_fn closes over {name}: it uses the array beside its argument, as a constant that is not "
          "differentiated and that the step is about to overwrite. Use the params that loss_fn is called with."
        )
    self.effects = closed.effects
    count, outputs = len(self.leaves), len(closed.jaxpr.outvars)
    program = jax_forms.flatten_towards(closed, [i >= outputs - count for i in range(outputs)], FOLLOWED)
    beside = program.inputs[len(program.inputs) - len(scales) :]
    program = residuals.without_weights(program, [*program.inputs[:count], *beside])
    decodes = [o for o in program.operations if any(isinstance(a, int) and a in beside for a in o.inputs)]
    self.program = recompute.for_each_use(program, [v for o in decodes if o.name != "scan" for v in o.outputs])
    self.results, self.grads = self.program.outputs[: outputs - count], self.program.outputs[outputs - count :]

  def forward(self) -> Program:
    """The program of `loss_fn` without its derivative; its first inputs are the leaves of the params, decoded."""
    return jax_forms.trace(self._arrays_of_loss, list(map(formats.gradient_like, self.leaves)), self.lifted)[0]

  def sites(self, groups: Sequence[by_leaf.Group], kernels: bool) -> list[Site]:
    """The sites of the weights, with their gradients; `kernels` allows GPU kernels."""
    sites = of_groups(groups, self.grads, self.program.inputs, kernels)
    for site in sites:
      if not any(self._trained[i] for i in site.leaves):
        site.put(Place.WITHOUT_GRADIENT, "its update does not read one")
    return sites

  def sites_of_parts(self, passes: coupled.TwoPass) -> list[Site]:
    """The sites of the first of two passes."""
    return [
      Site((part.leaf,), (self.grads[part.leaf],), (), first_pass.part_step(part, passes.program, gradient))
      for part in passes.parts
      for gradient in (passes.program.inputs[part.leaf],)
    ]

  def held_stacks(self, sites: list[Site]) -> set[int]:
    """The leaves that are stacks of layers and can only be updated whole."""
    planning.make_plan(self.program, sites, self.results)
    return {i for site in sites if site.place is Place.AT_END for i in site.leaves}

  def at(self, inputs: Sequence[Any], constants: dict[int, Any]) -> "Traced":
    """The same program with other values for its inputs and for constants."""
    other = copy.copy(self)
    count = len(self.leaves)
    other.leaves, other.lifted, other.program = (
      list(inputs[:count]),
      list(inputs[count:]),
      self.program.replaced(constants),
    )
    return other

  def output(self, results: Sequence[Any]) -> Any:
    """Puts the arrays of the loss function's result back into its tree."""
    static, treedef = self._out
    values = iter(results)
    return treedef.unflatten([next(values) if x is None else x for x in static])


def groups_of(update: by_leaf.Update) -> list[by_leaf.Group]:
  """Returns the updates of single leaves, or raises ValueError where they are coupled."""
  groups = []
  for leaves in update.components(range(len(update.names))):
    try:
      groups.append(update.group(leaves[:1], _CALLER))
    except ValueError as error:
      try:
        coupled.TwoPass(update, _CALLER)
      except ValueError:
        raise error from None
      raise ValueError(f"{error} Or pass two_pass=True, which runs the backward pass twice.") from None
  return groups


def value_and_update(
  loss_fn: Callable[..., Any], tx: optax.GradientTransformation, has_aux: bool = False, two_pass: bool = False
) -> Callable[..., tuple[Any, PyTree, optax.OptState]]:
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
      at the cost of a second forward and backward pass. The first pass only computes these arrays. Stacks whose layers
      depend on each other in this way (`optax.clip_by_block_rms`) are then updated in their scans, too.

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
  wrapping.check_loss(loss_fn, _CALLER, "loss_fn, tx")
  tx = wrapping.as_transformation(tx, _CALLER, "tx", "loss_fn, tx")

  def step(
    params: PyTree,
    opt_state: optax.OptState,
    *args: Any,
    tx_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
  ) -> tuple[Any, PyTree, optax.OptState]:
    extra = wrapping.extra_args(tx_args, _CALLER)
    update = by_leaf.Update(tx, modules.pure(params), modules.pure(opt_state), _CALLER, extra=extra)
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
    results, leaves, new_states = _differentiated_as(
      functools.partial(_ordinary, traced, update, value),
      functools.partial(_released, traced, late, two_pass, value),
      operands,
    )
    new_state = state_treedef.unflatten(new_states[: len(states)])
    return traced.output(results), jax.tree.structure(params).unflatten(leaves), new_state

  return step


Operands = tuple[list[Any], list[Any], dict[int, Any], dict[int, Any]]
"""Params and arguments; the leaves of the state; the traced constants of the loss function, and those of the update.

A step may be differentiated with respect to all of these, or mapped over them.
"""

Results = tuple[list[Any], list[Any], list[Any]]
"""What the loss function returned, the new weights and the new leaves of the state."""


class _Shared:
  """What the updates of all leaves share. It is computed when the loss is known, since it may depend on it.

  Attributes:
    values: by variable.
    states: the new state that belongs to no leaf, by index.
    old: the leaves of the old state, with the loss among them where the update reads it.
  """

  def __init__(self, late: Late, value: int | None, old: Sequence[Any], constants: dict[int, Any]):
    self._late, self._value, self._constants = late, value, constants
    self.values: dict[int, Any] | None = None
    self.states: dict[int, Any] = {}
    self.old = late.with_parts(old)

  def compute(self, loss: Any) -> dict[int, Any]:
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
  new_weights: dict[int, Any] = {}
  passes = two_passes(traced, update, _CALLER) if two_pass else None
  if passes is not None:
    new_weights = _first_pass(traced, passes, shared, loss)
    # Without a barrier, XLA would see that both passes compute the same, and keep all of the first for the second.
    inputs, shared.values = order.barrier((inputs, shared.values))
    loss = None
  groups = groups_of(update) if passes is None else passes.groups

  def of_sites(loss: Any) -> list[list[Any]]:
    values = shared.compute(loss)
    return [[values[v] for v in group.shared] for group in groups]

  sites = traced.sites(groups, update.kernels)
  store = evaluate.Whole(inputs[: len(traced.leaves)], list(shared.old), groups)
  results = evaluate.run(traced.program, sites, inputs, traced.results, store, of_sites, loss=loss)
  shared.compute(results[0])  # if there was nothing to update
  for kept, new in ((store.leaves, new_weights), (store.states, shared.states)):
    for i, x in new.items():
      kept[i] = x
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


def _differentiated_as(
  ordinary: Callable[[Operands], Results], released: Callable[[Operands], Results], operands: Operands
) -> Results:
  """Returns `released(operands)`, differentiated as `ordinary(operands)`, which computes the same.

  A derivative needs all gradients of the step at once. Also, a released step runs the operations of the update one by
  one, without the calls that they come from, and so without the custom derivatives of these, such as a rounding's.
  """
  leaves, treedef = jax.tree.flatten(operands)

  @jax.custom_jvp
  def step(*leaves: Any) -> Results:
    return released(treedef.unflatten(leaves))

  def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Results, Results]:
    return primitives.jvp_of(lambda *leaves: ordinary(treedef.unflatten(leaves)), primals, tangents)

  step.defjvp(jvp, symbolic_zeros=True)
  return step(*leaves)


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


def _first_pass(traced: Traced, passes: coupled.TwoPass, shared: _Shared, loss: Any) -> dict[int, Any]:
  """Runs the backward pass for the small arrays that couple the leaves, and adds them to what the leaves share.

  Returns:
    The new weights that are already made, by leaf.
  """
  if traced.effects:
    raise NotImplementedError(
      f"{_CALLER}: two_pass runs loss_fn twice, and it has effects: {trees.listed(map(str, traced.effects))}. Take "
      "callbacks and prints out, or use an update that does not couple the leaves."
    )
  sites = traced.sites_of_parts(passes)
  store = evaluate.Parts(sites)

  def known(loss: Any) -> dict[int, Any]:
    return passes.known(shared.compute(loss), traced.leaves, shared.old)

  def of_sites(loss: Any) -> list[list[Any]]:
    values = known(loss)
    return [[values[v] for v in (*part.reads, *part.shared)] for part in passes.parts]

  inputs = [*traced.leaves, *traced.lifted]
  weights = traced.program.inputs[: len(traced.leaves)]
  results = [] if loss is None else [loss]
  results = evaluate.run(traced.program, sites, inputs, results, store, of_sites, weights=weights, loss=loss)
  parts = {
    v: x for part, xs in zip(passes.parts, store.values, strict=True) for v, x in zip(part.outputs, xs, strict=True)
  }
  links, new_weights, new_states = passes.links(parts, known(results[0] if results else None))
  shared.values = {v: links[v] for group in passes.groups for v in group.shared}
  shared.states |= new_states
  return new_weights
