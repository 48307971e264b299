"""A training step whose loss function is built from fused layers.

Why: see `layer`.

How: the step makes the refs that the layers write, differentiates once, so that their backward rules run, and checks
that every weight is updated exactly once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import optax

from optax_mpo._backends import step_weight
from optax_mpo._core import host, modules, trees, wrapping
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._layers import fused_call, handles
from optax_mpo._updates import by_leaf
from optax_mpo._updates.late import take


def fused_value_and_update(
  loss_fn: Callable[..., PyTree], tx: optax.GradientTransformation, has_aux: bool = False
) -> Callable[..., tuple[PyTree, PyTree, optax.OptState]]:
  """Makes a training step that updates each layer's weights inside the backward pass, without a tree of gradients.

  `step(params, opt_state, *args, tx_args=None, **kwargs)` calls `loss_fn(handles, *args, **kwargs)`. Handles are
  indexed like the params. `loss_fn` passes them to layers made by `fused_layer` and `fused_scan`, or reads them with
  `fused_value`. From outside, the step is pure. Jit it and donate params and state: their memory is then updated in
  place. It runs the operations of `jax.value_and_grad`, `tx.update` and `apply_updates` and gives the same bits, except
  where XLA fuses the two programs differently (docs/fused_layers.md). The state is the same, so you can switch at any
  step.

  Args:
    loss_fn: returns a scalar, or `(scalar, aux)`. One fused layer or `fused_value` has to use each weight, unless the
      update of the weight reads no gradient.
    tx: an Optax transformation, with or without `compensated` around it, whose update of one layer needs only the
      gradients of that layer. Whether it does is found by tracing `tx.update`.
    has_aux: whether `loss_fn` returns a pair.

  Returns:
    `step`, which returns `(value, params, opt_state)`, or `((value, aux), params, opt_state)` with `has_aux`. Params
    and state keep their structure, shapes and dtypes.

  Raises:
    ValueError: by the step, when it is traced: where the update couples leaves of different layers (as
      `optax.clip_by_global_norm` does), with the leaves and the operation; where `tx` changes the form of its state;
      where the state was made for other params.
    TypeError: by the step: where a leaf of params is not an array, or `tx.update` needs extra arguments that are not in
      `tx_args`, a dict. The loss is not known yet when layers are updated; pass that of the step before as `value`, or
      use `value_and_update`.
    FusedError: by the step: where a weight is not used or used twice, a handle is used outside the loss function or
      inside a transformation, or the step itself is differentiated or mapped.

  Memory: params and state, the activations, and the gradients of one layer, two at most. AdamW with
    `compensated(..., extra_bits=16)` holds 12 bytes per parameter and needs little more (docs/fused_layers.md).

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> layer = mpo.fused_layer(lambda p, x: x @ p["w"] + p["b"], remat=True)
    >>> def loss_fn(params, x, y):
    ...   return jnp.mean((layer(params, x.astype(jnp.bfloat16)).astype(jnp.float32) - y) ** 2)
    >>> tx = mpo.compensated(optax.adamw(1e-2))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)})
    >>> step = jax.jit(mpo.fused_value_and_update(loss_fn, tx), donate_argnums=(0, 1))
    >>> value, params, opt_state = step(params, opt_state, jnp.ones((4, 2)), jnp.ones((4, 1)))
    >>> print(value, params["b"])
    1.0 [0.0100098]

  References:
    Lewandowski & Kosson, `Memory Efficient Mixed-Precision Optimizers <https://arxiv.org/abs/2309.12381>`_, 2023
  """
  wrapping.check_loss(loss_fn, "fused_value_and_update", "loss_fn, tx")
  tx = wrapping.as_transformation(tx, "fused_value_and_update", "tx", "loss_fn, tx")

  def step(
    params: PyTree,
    opt_state: optax.OptState,
    *args: PyTree,
    tx_args: Mapping[str, PyTree] | None = None,
    **kwargs: PyTree,
  ) -> tuple[PyTree, PyTree, optax.OptState]:
    trees.check_arrays(params, "fused_value_and_update", also_numbers=False)
    extra = wrapping.extra_args(tx_args, "fused_value_and_update", loss=False)
    params, opt_state, extra, args, kwargs = _guarded((params, opt_state, extra, args, kwargs))
    pure = modules.pure(params), modules.pure(opt_state)
    late = take(by_leaf.Update(tx, *pure, "fused_value_and_update", extra=extra))
    update = late.update
    shared, shared_states = update.run_shared()
    leaves, treedef = jax.tree.flatten(params)
    old, state_treedef = jax.tree.flatten(opt_state)
    if any(host.is_on_host(x) and not step_weight.is_traced([x]) for x in (*leaves, *old)):
      raise ValueError(
        "fused_value_and_update: params or state are in host memory, from which only compiled steps fetch them. Run "
        "the step under jax.jit."
      )
    states = late.with_parts([*old, *jax.tree.leaves(extra)])
    own = {j: s for j, s in enumerate(states) if j not in shared_states}
    context = handles.Step(update, leaves, own, shared)

    def loss(token: jax.Array) -> PyTree:
      context.enter(token)
      try:
        out = loss_fn(context.handle(treedef), *args, **kwargs)
      finally:
        context.close()
      handles.check_no_handles(out, "the result of loss_fn")
      return out

    value, _ = jax.value_and_grad(loss, has_aux=has_aux)(jnp.float32(0))
    _check_all_used(context)
    rest = [i for i in range(len(leaves)) if i not in context.stepped]
    fused_call.step_unreached(context, rest)
    new_params, own = context.results()
    new_states = [shared_states[j] if j in shared_states else own[j] for j in range(len(states))]
    new_states = late.finish(states, new_states, update.program.constants)
    return value, treedef.unflatten(new_params), state_treedef.unflatten(new_states[: len(old)])

  return step


def _check_all_used(context: handles.Step) -> None:
  lost = [context.update.names[i] for i in context.unused() if context.update.needs_gradient(i)]
  if lost:
    raise handles.FusedError(
      f"fused_value_and_update: the loss does not use {trees.listed(lost)}, so that no backward pass comes by to step "
      "it. Is a layer left out? If it should stay as it is, freeze it: optax.multi_transform with optax.set_to_zero() "
      "for its label, or optax.masked around both. If it should be stepped with a gradient of zero (weight decay, "
      "decaying moments), as tx.update does it, read it: fused_value(handle)."
    )


def _guarded(tree: PyTree) -> PyTree:
  """Returns a tree whose arrays are the same, but cannot be differentiated or mapped."""
  leaves, treedef = jax.tree.flatten(tree)
  arrays = [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]
  for i, value in zip(arrays, _guard(*(leaves[i] for i in arrays)), strict=True):
    leaves[i] = value
  return treedef.unflatten(leaves)


@jax.custom_jvp
def _guard(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return _unmapped(*arrays)


@_guard.defjvp
def _guard_jvp(primals: Values, tangents: Values) -> NoReturn:
  raise handles.FusedError(
    "fused_value_and_update: a fused step cannot be differentiated (jax.grad, jvp, linearize, or remat under one of "
    "them): it has updated its weights already. For gradients, differentiate the loss function with params that are "
    "arrays."
  )


@jax.custom_batching.custom_vmap
def _unmapped(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return arrays


@_unmapped.def_vmap
def _unmapped_rule(axis_size: int, in_batched: Sequence[bool], *arrays: jax.Array) -> NoReturn:
  raise handles.FusedError(
    "fused_value_and_update: a fused step cannot be mapped by jax.vmap. Map inside the loss function, over the batch; "
    "for several models at once use vmap with value_and_grad and tx.update."
  )
