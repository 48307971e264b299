"""Layers whose backward pass updates their own weights.

Why: an ordinary step makes the gradients of all weights before it updates the first one, so all of them exist at once:
2 or 4 bytes per parameter. But a layer's gradient is complete as soon as the backward pass has gone through the layer,
and only the optimizer still needs it.

How: a `jax.custom_vjp` whose backward rule computes the gradient of one layer, runs the slice of the optimizer's update
that belongs to it, writes weights and state into their refs in place, and returns the cotangent of the inputs. An
optimization barrier ties this cotangent to what was written, so that XLA has to finish the update before it goes on.
Only a scalar token is differentiated. It exists so that there is a backward pass.

Source: the idea for one layer is that of Lewandowski & Kosson, "Memory Efficient Mixed-Precision Optimizers",
arXiv:2309.12381, and of LOMO, arXiv:2306.09782.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._core import host, modules, order, trees, types
from optax_mpo._core.annotations import PyTree
from optax_mpo._layers import fused_call, handles, microbatch
from optax_mpo._layers.fused_call import Gradients, RefArguments, Remat
from optax_mpo._program import pullbacks


def fused_layer(
  fn: Callable[..., PyTree] | object,
  *,
  remat: Remat = False,
  microbatches: int = 1,
  in_axes: PyTree = 0,
  out_axes: PyTree = 0,
) -> Callable[..., PyTree]:
  """Makes a layer that updates its own weights in the backward pass of a `fused_value_and_update`.

  `layer(params, *inputs, **kwargs)` calls `fn(params, *inputs, **kwargs)`. In place of handles, `fn` gets the arrays,
  and the backward pass through the layer updates these weights. They belong to the layer: nothing else may use them.
  Without handles, `layer` is just `fn`, for evaluation and ordinary training.

  Args:
    fn: a function of a tree of weights and of any inputs, or a Flax module. Inputs and results are pytrees with arrays
      of any dtype, PRNG keys and None; anything else, such as a bool or a string, is static. `fn` may close over
      arrays, which get gradients too. A Linen module is called as `module.apply({"params": params}, ...)`. A mapping
      with a "params" entry is passed as it is: `layer({"params": handle, "batch_stats": stats}, x, mutable=[...])`. An
      NNX module is called as a copy that holds `params`, a State of its `nnx.Param` variables. If it has other
      variables, `params` is `(params, state)` and the result `(out, state)`.
    remat: False keeps the activations that the backward pass needs, but never weights. True keeps only the inputs and
      recomputes the rest. A policy of `jax.checkpoint_policies` chooses.
    microbatches: the number of parts in which the batch goes through the layer, forward and backward, one after the
      other. The gradient is summed over the parts in f32, from the last to the first, and the weights are updated
      once. The backward pass recomputes everything inside, as with `remat=True`, unless `remat` is a policy. A layer
      without handles takes the whole batch.
    in_axes: with microbatches, the batch axis of each input, as in `jax.vmap`; None for one that all parts get.
    out_axes: likewise for each result. With None, floats such as a mean loss are averaged over the parts, and integers
      are summed.

  Returns:
    The layer.

  Raises:
    TypeError: where `fn` is neither a function nor a module, or `remat` neither a bool nor a policy.
    ValueError: where `microbatches` is less than 1, and by the layer, where the batch does not split into them.
    FusedError: by the layer, where an update would be lost or repeated: weights that something else uses too, a handle
      of another step, a call inside a transformation such as `jax.checkpoint` or `lax.scan`.
    ValueError: by the layer, where the optimizer couples its weights to those of other layers.

  Memory: the gradients of one layer in place of the gradients of all: 2 bytes per parameter of that layer where weights
    are bf16. Each layer keeps only activations.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> dense = mpo.fused_layer(lambda w, x: jnp.tanh(x @ w))
    >>> def loss_fn(params, x):  # params: handles in the step below, arrays anywhere else
    ...   for w in params:
    ...     x = dense(w, x)
    ...   return jnp.mean(x.astype(jnp.float32) ** 2)
    >>> tx = mpo.compensated(optax.adamw(1e-2))
    >>> params, opt_state = mpo.init(tx, [jnp.eye(3), jnp.eye(3)])
    >>> step = jax.jit(mpo.fused_value_and_update(loss_fn, tx), donate_argnums=(0, 1))
    >>> for _ in range(3):
    ...   value, params, opt_state = step(params, opt_state, jnp.ones((2, 3), jnp.bfloat16))
    >>> print(f"{value:.2f} {loss_fn(params, jnp.ones((2, 3), jnp.bfloat16)):.2f}")
    0.36 0.33

  References:
    Lewandowski & Kosson, `Memory Efficient Mixed-Precision Optimizers <https://arxiv.org/abs/2309.12381>`_, 2023
  """
  fn = modules.as_function(fn, "fused_layer")
  inner, remat = _in_parts(fn, remat, microbatches, in_axes, out_axes, "fused_layer")

  @functools.wraps(fn)
  def layer(params: PyTree, *inputs: PyTree, **kwargs: PyTree) -> PyTree:
    call = fused_call.Call.take(inner, "fused_layer", (params, inputs, kwargs))
    return fn(params, *inputs, **kwargs) if call is None else _run_layer(call, remat)

  return layer


def fused_scan(
  fn: Callable[..., PyTree] | object,
  *,
  remat: Remat = False,
  reverse: bool = False,
  unroll: int = 1,
  microbatches: int = 1,
  in_axes: PyTree = (0, None),
  out_axes: PyTree = 0,
) -> Callable[..., PyTree]:
  """Makes a stack of equal layers, one `lax.scan`, that updates each layer's weights in the backward pass.

  `stack(params, carry, xs=None) -> (carry, ys)` calls `carry, y = fn(layer_params, carry, x)` for each layer. The
  weights are stacked, `[layers, ...]`, and each layer gets its slice. In a `fused_value_and_update`, with a handle for
  `params`, a layer's slices of weights and optimizer state are read and written in place, one layer at a time.
  Without handles it is `lax.scan` over `(params, xs)`.

  Args:
    fn: as in `fused_layer`, with two inputs and two results: `fn(layer_params, carry, x) -> (carry, y)`.
    remat: as in `fused_layer`.
    reverse: as in `lax.scan`: the last layer of the stack runs first.
    unroll: as in `lax.scan`.
    microbatches: as in `fused_layer`: each layer takes the batch in parts.
    in_axes: for `(carry, x)`; by default the carry is split along its first axis, and `x` goes to all parts.
    out_axes: for `(carry, y)`.

  Returns:
    The stack: a function of a handle or stacked weights, a carry, and `xs`, which is None or any pytree of arrays
    `[layers, ...]`.

  Raises:
    TypeError, FusedError: as `fused_layer`.
    ValueError: as `fused_layer`, and by the stack, where the optimizer cannot update each layer alone (a norm over the
      whole stack, as in lamb or adafactor), with the leaves and the operation.

  Memory: the gradient of one layer, twice at most, in place of the gradients of the whole stack. The gradients of small
    weights (biases, norms) are kept for all layers: at most 1/256 of the stack's elements.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> stack = mpo.fused_scan(lambda w, x, _: (jnp.tanh(x @ w), None), remat=True)
    >>> def loss_fn(params, x):
    ...   return jnp.mean(stack(params, x)[0] ** 2)
    >>> tx = optax.sgd(0.1, momentum=0.9)
    >>> params = jnp.stack([jnp.eye(3)] * 4)
    >>> step = jax.jit(mpo.fused_value_and_update(loss_fn, tx), donate_argnums=(0, 1))
    >>> value, params, opt_state = step(params, tx.init(params), jnp.ones((2, 3)))
    >>> print(value, params.shape)
    0.26277387 (4, 3, 3)
  """
  fn = modules.as_function(fn, "fused_scan")
  inner, remat = _in_parts(fn, remat, microbatches, in_axes, out_axes, "fused_scan")

  @functools.wraps(fn)
  def stack(params: PyTree, carry: PyTree, xs: PyTree = None) -> tuple[PyTree, PyTree]:
    call = fused_call.Call.take(inner, "fused_scan", (params, carry, xs), parts=(1, 2))
    if call is None:
      return lax.scan(lambda c, px: fn(px[0], c, px[1]), carry, (params, xs), reverse=reverse, unroll=unroll)
    return _run_scan(call, call.count_layers(), remat, reverse, unroll)

  return stack


def fused_value(handle: PyTree) -> PyTree:
  """Reads weights that are used in more than one place, such as a tied embedding.

  The arrays can be used anywhere in the loss function, also as inputs of fused layers and inside `jax.checkpoint` or
  `lax.scan`. The gradients of all uses are added up, and then the weight is updated once. Reading it again gives the
  same arrays. A weight that is read but not used is updated with a gradient of zero, as `tx.update` would do it.

  Args:
    handle: a handle, or a pytree of handles. Arrays in it are returned as they are, so that one loss function serves
      all kinds of training.

  Returns:
    The arrays.

  Raises:
    FusedError: where a fused layer uses the weight too, or as in `fused_layer`.
    ValueError: where the optimizer couples it to other weights.

  Memory: the gradient is kept until its last contribution is added; for a tied embedding, for the whole backward pass.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> def loss_fn(params, tokens):
    ...   embedding = mpo.fused_value(params["embedding"])
    ...   logits = embedding[tokens] @ embedding.T
    ...   return -jnp.mean(jax.nn.log_softmax(logits)[0, tokens])
    >>> tx = optax.sgd(0.5)
    >>> params = {"embedding": jnp.eye(3)}
    >>> step = jax.jit(mpo.fused_value_and_update(loss_fn, tx))
    >>> value, params, _ = step(params, tx.init(params), jnp.array([0, 2]))
    >>> print(params["embedding"][0].round(2).tolist())  # the row that was used is changed by both uses
    [0.9199999570846558, -0.10999999940395355, 0.14000000059604645]
  """
  return jax.tree.map(lambda h: _read(h) if handles.is_handle(h) else h, handle, is_leaf=handles.is_handle)


def _in_parts(
  fn: Callable[..., PyTree], remat: Remat, microbatches: int, in_axes: PyTree, out_axes: PyTree, who: str
) -> tuple[Callable[..., PyTree], Remat]:
  """Returns the function to run, which may split its batch, and the `remat` that is still to be applied."""
  if not isinstance(remat, bool) and not callable(remat):
    raise TypeError(f"{who}: remat has to be True, False or a policy of jax.checkpoint_policies, but it is {remat!r}.")
  if not isinstance(microbatches, int) or microbatches < 1:
    raise ValueError(f"{who}: microbatches has to be 1 or more, but it is {microbatches!r}.")
  if microbatches == 1:
    return fn, remat
  policy = None if isinstance(remat, bool) else remat
  return microbatch.split(fn, microbatches, in_axes, out_axes, policy, who), False


# --- The custom_vjps --------------------------------------------------------------------------------------------------


def _read(handle: handles.Handle) -> PyTree:
  """Makes the arrays of `fused_value`: one custom_vjp for each group of leaves that are updated together."""
  step = handles.handle_step(handle)
  for leaves in step.update.components(step.claim_values(handle)):
    refs = fused_call.Refs(step, leaves, [step.update.group(leaves, "fused_value")])
    step.values.update(zip(leaves, _hook(step, refs)(step.token, refs.arguments), strict=True))
  return handles.handle_treedef(handle).unflatten([step.values[i] for i in handles.handle_leaves(handle)])


def _hook(step: handles.Step, refs: fused_call.Refs) -> Callable[..., list[jax.Array]]:
  @jax.custom_vjp
  def hook(token: jax.Array, arguments: RefArguments) -> list[jax.Array]:
    return host.fetched(refs.weights(arguments))

  def hook_fwd(token: jax.Array, arguments: RefArguments) -> tuple[list[jax.Array], RefArguments]:
    return host.fetched(refs.weights(arguments)), arguments

  def hook_bwd(arguments: RefArguments, cotangents: list[jax.Array]) -> tuple[jax.Array, None]:
    step.stepped.update(refs.leaves)
    grads = dict(zip(refs.leaves, cotangents, strict=True))
    refs.update(arguments, grads, ())
    return jnp.float32(0), None

  hook.defvjp(hook_fwd, hook_bwd)
  return hook


def _run_layer(call: fused_call.Call, remat: Remat) -> PyTree:
  step, refs, trained = call.step, call.refs(), call.trained()
  apply, closed = jax.closure_convert(call.apply, call.weights(), call.arrays)

  def fun(weights: list[jax.Array], constants: list[jax.Array], inputs: list[jax.Array]) -> PyTree:
    count = len(call.arrays)
    return fused_call.checkpointed(apply, remat, prevent_cse=True)(weights, inputs[:count], *inputs[count:])

  @jax.custom_vjp
  def layer(token: jax.Array, arguments: RefArguments, inputs: list[jax.Array]) -> PyTree:
    return fun(host.fetched(refs.weights(arguments)), [], inputs)

  def layer_fwd(token: PyTree, arguments: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    arguments = fused_call.values(arguments)
    inputs, active = fused_call.perturbed(inputs)
    weights = host.fetched(refs.weights(arguments))
    pullback = pullbacks.trace(fun, weights, [], inputs, (trained, [], active))
    out, kept = pullback.forward(weights, [], inputs)
    # The refs that the backward pass writes, the activations it needs, the pass, and which inputs get a cotangent.
    return pullback.out_treedef.unflatten(out), (arguments, kept, trees.Static((pullback, active)))

  def layer_bwd(residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, ...]:
    arguments, kept, static = residuals
    pullback, active = static.value
    step.stepped.update(refs.leaves)
    real = fused_call.real_cotangents(jax.tree.leaves(cotangents, is_leaf=fused_call.is_zero), pullback.out_avals)

    def backward(weights: list[jax.Array], kept: PyTree, real: PyTree) -> tuple[list[jax.Array], Gradients]:
      cotangents = fused_call.all_cotangents(real, pullback.out_avals)
      grads, _, onward = pullback.backward(host.fetched(weights), [], kept, cotangents)
      return onward, fused_call.grads_by_leaf(refs.leaves, trained, grads)

    onward = refs.update_within(arguments, backward, kept, real, fused_call.WORTH_A_BARRIER)
    return jnp.float32(0), None, fused_call.spread(onward, active)

  layer.defvjp(layer_fwd, layer_bwd, symbolic_zeros=True)
  return layer(step.token, refs.arguments, [*call.arrays, *closed])


def _run_scan(call: fused_call.Call, layers: int, remat: Remat, reverse: bool, unroll: int) -> PyTree:
  step, refs, trained = call.step, call.refs(), call.trained()
  # A scan returns strong types, so its first carry must have them too.
  carried = [lax.convert_element_type(c, c.dtype) for c in call.arrays_of(1)]
  scanned = call.arrays_of(2)
  count = len(carried)
  slices = [types.struct(x, 0) for x in scanned]
  carry_treedef = call.treedef_of(1)

  def one(weights: list[jax.Array], arrays: list[jax.Array]) -> tuple[list[jax.Array], PyTree]:
    out = call.apply(weights, arrays)
    if not isinstance(out, tuple) or len(out) != 2 or jax.tree.structure(out[0]) != carry_treedef:
      raise TypeError(
        "fused_scan: fn has to return (carry, y) with a carry of the structure it was given, as in lax.scan: "
        f"{carry_treedef}, but it returned {jax.tree.structure(out)}."
      )
    return jax.tree.leaves(out[0]), out[1]

  apply, closed = jax.closure_convert(one, call.weights(without=0), [*map(types.struct, carried), *slices])

  def fun(
    weights: list[jax.Array], constants: list[jax.Array], inputs: list[jax.Array]
  ) -> tuple[list[jax.Array], PyTree]:
    return fused_call.checkpointed(apply, remat, prevent_cse=False)(weights, inputs, *constants)

  def scan(body: Callable[..., PyTree], carry: PyTree, xs: PyTree, backward: bool = False) -> PyTree:
    return lax.scan(body, carry, xs, length=layers, reverse=reverse != backward, unroll=unroll)

  @jax.custom_vjp
  def stack(
    token: jax.Array, arguments: RefArguments, carry: list[jax.Array], xs: list[jax.Array], constants: list[jax.Array]
  ) -> PyTree:
    def body(carry: list[jax.Array], layer: PyTree) -> PyTree:
      weights, x = layer
      return fun(host.fetched(weights), constants, [*carry, *x])

    return scan(body, carry, (refs.weights(arguments), xs))

  def stack_fwd(
    token: PyTree, arguments: PyTree, carry: PyTree, xs: PyTree, constants: PyTree
  ) -> tuple[PyTree, PyTree]:
    arguments, carry = fused_call.values(arguments), fused_call.values(carry)
    xs, active_xs = fused_call.perturbed(xs)
    constants, active_constants = fused_call.perturbed(constants)
    active = (trained, active_constants, [fused_call.is_float(c) for c in carry] + active_xs)
    inputs = [*map(types.struct, carry), *slices]
    pullback = pullbacks.trace(fun, call.weights(without=0), constants, inputs, active)

    def body(carry: list[jax.Array], layer: PyTree) -> tuple[list[jax.Array], PyTree]:
      weights, x = layer
      out, kept = pullback.forward(order.as_they_lie(host.fetched(weights)), constants, [*carry, *x])
      return out[:count], (out[count:], kept)

    carry, (ys, kept) = scan(body, carry, (refs.weights(arguments), xs))
    static = trees.Static((pullback, active_constants, active_xs))
    # The refs that the backward pass writes, what all layers share, their activations, and what is no array.
    return pullback.out_treedef.unflatten([*carry, *ys]), (arguments, constants, kept, static)

  def stack_bwd(residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, ...]:
    arguments, constants, kept, static = residuals
    pullback, active_constants, active_xs = static.value
    avals = pullback.out_avals
    step.stepped.update(refs.leaves)
    cotangents = jax.tree.leaves(cotangents, is_leaf=fused_call.is_zero)
    ct_carry = fused_call.real_cotangents(cotangents[:count], avals[:count])
    # A y that nothing depends on has no cotangent to scan over; the layer makes zeros for it.
    ct_ys = [
      None if fused_call.is_zero(ct) or not fused_call.is_float(a) else ct
      for ct, a in zip(cotangents[count:], avals[count:], strict=True)
    ]
    sizes = [len(ct_carry), sum(active_xs), sum(active_constants)]

    def backward(weights: list[jax.Array], kept: PyTree, cotangents: PyTree) -> tuple[list[jax.Array], Gradients]:
      kept, constants = kept
      ct_carry, ct_ys = cotangents
      sums = [types.zeros(c) for c, flag in zip(constants, active_constants, strict=True) if flag]

      def body(state: PyTree, layer: PyTree) -> PyTree:
        (ct_carry, sums), (weights, kept, ct_ys) = state, layer
        ys = [types.zeros(a) if ct is None else ct for ct, a in zip(ct_ys, avals[count:], strict=True)]
        real = [*ct_carry, *(y for y, a in zip(ys, avals[count:], strict=True) if fused_call.is_float(a))]
        cotangents = fused_call.all_cotangents(real, avals)
        grads, more, onward = pullback.backward(host.fetched(weights), constants, order.in_order(kept), cotangents)
        sums = [a + b for a, b in zip(sums, more, strict=True)]
        return (onward[: len(ct_carry)], sums), (onward[len(ct_carry) :], grads)

      (ct_carry, sums), (ct_xs, grads) = scan(body, (ct_carry, sums), (weights, kept, ct_ys), backward=True)
      return [*ct_carry, *ct_xs, *sums], fused_call.grads_by_leaf(refs.leaves, trained, grads)

    onward = iter(refs.update_within(arguments, backward, (kept, constants), (ct_carry, ct_ys)))
    ct_carry, ct_xs, sums = ([next(onward) for _ in range(size)] for size in sizes)
    in_carry = fused_call.spread(ct_carry, [fused_call.is_float(c) for c in carried])
    return (
      jnp.float32(0),
      None,
      in_carry,
      fused_call.spread(ct_xs, active_xs),
      fused_call.spread(sums, active_constants),
    )

  stack.defvjp(stack_fwd, stack_bwd, symbolic_zeros=True)
  carry, y = stack(step.token, refs.arguments, carried, scanned, closed)
  return carry_treedef.unflatten(carry), y
