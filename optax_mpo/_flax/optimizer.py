"""An optimizer object for Flax NNX. See `optax_mpo.flax`."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from optax_mpo._codecs import formats
from optax_mpo._codecs.masters import master_params
from optax_mpo._core import buffers, trees
from optax_mpo._core.annotations import PyTree
from optax_mpo._flax.steps import Fused, Where, check_options, explain_step, make_step, metrics, updated
from optax_mpo._stepping import explain
from optax_mpo._stepping.microbatches import Microbatches
from optax_mpo._transforms import average, compensated, convert

_STEP = "optax_mpo.flax.Optimizer.step_with"  # the tag of the step's nnx.update_context


class Optimizer(nnx.Pytree):
  """An optimizer for a Flax NNX model: bf16 params with compensation bits, updated in place.

  Its constructor casts the model's params. `step_with` and `update` change the model and this object, also within
  `nnx.jit`.

  Args:
    model: an NNX module with f32 params.
    tx: a transformation with `compensated` in it.
    wrt: which variables are trained.
    fused: the steps of `step_with`: gradient release, "auto" (`value_and_update`) or "layer"
      (`fused_value_and_update`); "off": ordinary steps. None: as "auto" where the update allows it, else as "off", with
      a warning that says why.
    two_pass: as for `value_and_update`.
    ema_decay: the fraction that each step keeps of a moving average of the master weights; None keeps no average.
    ema_bits: of the average, besides bf16: 16 is the f32 average, bit for bit; with 8 it is rounded stochastically.
      None: the average is f32 as it is.
    dtype: of the params, as in `optax_mpo.init`; not float8, since the model computes with its params as they are.
    where: which params are cast, as in `optax_mpo.init`.
    state_memory: "pinned_host" makes the state in the memory of the host, as in `optax_mpo.init`.

  Attributes:
    step: i32[], in a variable: the number of steps done.
    opt_state: the state of `tx`, in variables.
    ema: the moving average, or None. It has the `values`, which are bf16 like the params, and their `compensation`, in
      variables; with `ema_bits=None` it is a tree like the params. `averages()` returns it as f32.

  Raises:
    ValueError: for other values of `fused` or `ema_bits`; and what `optax_mpo.init` raises.

  Memory: that of `optax_mpo.init`, plus 3 bytes per bf16 parameter for `ema` if there is one, or 4 with other
    `ema_bits`.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> from flax import nnx
    >>> from optax_mpo.flax import Optimizer
    >>> model = nnx.Linear(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # else Flax promotes params to f32
    >>> optimizer = Optimizer(model, mpo.compensated(optax.adamw(1e-2)))
    >>> @nnx.jit
    ... def step(model, optimizer, x):
    ...   return optimizer.step_with(model, lambda model, x: jnp.mean(model(x).astype(jnp.float32) ** 2), x)
    >>> loss = step(model, optimizer, jnp.ones((2, 4)))
    >>> model.kernel.get_value().dtype.name, int(optimizer.step.get_value())
    ('bfloat16', 1)

  References:
    `nnx.Optimizer <https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/training/optimizer.html>`_
  """

  def __init__(
    self,
    model: nnx.Module,
    tx: optax.GradientTransformation,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    fused: Fused | None = None,
    two_pass: bool = False,
    ema_decay: float | None = None,
    ema_bits: int | None = 8,
    dtype: DTypeLike = jnp.bfloat16,
    where: Where | None = None,
    state_memory: str | None = None,
    _run: tuple[PyTree, optax.OptState, jax.Array] | None = None,  # params, state and steps of a run under way
  ):
    check_options(fused, ema_decay, ema_bits, "Optimizer")
    if _run is None:
      pure = nnx.as_pure(nnx.state(model, wrt))
      made = compensated.init(tx, pure, dtype=dtype, where=where, state_memory=state_memory)
      _run = *made, jnp.zeros([], jnp.int32)
    params, opt_state, step = _run
    if any(formats.is_scaled(leaf) for leaf in jax.tree.leaves(params)):
      raise ValueError(
        f"Optimizer: with dtype={jnp.dtype(dtype).name} the model would hold codes without their scales, and compute "
        "with them. Use bfloat16 or float16 here, or train pure params with value_and_update."
      )
    nnx.update(model, params)
    self.step = nnx.OptState(step)
    self.opt_state = nnx.data(jax.tree.map(nnx.OptState, opt_state))
    self.fused: Fused | None = fused
    self.tx, self.wrt, self.two_pass = tx, wrt, two_pass
    self.ema_decay, self.ema_bits, self.ema = ema_decay, ema_bits, None
    if ema_decay is not None:
      ema = buffers.own(average.start(params, master_params(params, opt_state), ema_bits), (params, opt_state))
      self.ema = nnx.data(jax.tree.map(nnx.OptState, ema))

  @classmethod
  def from_nnx(
    cls,
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    tx: optax.GradientTransformation | None = None,
    *,
    fused: Fused | None = None,
    two_pass: bool = False,
    ema_decay: float | None = None,
    ema_bits: int | None = 8,
    dtype: DTypeLike = jnp.bfloat16,
    where: Where | None = None,
  ) -> "Optimizer":
    """Takes over a run of `nnx.Optimizer`, with f32 params, in the middle. It casts the model's params.

    Steps, moments and schedules continue, as with `optax_mpo.convert`. With 16 bits and f32 moments, training
    continues as the f32 run, bit for bit, if its loss casts the params as `optax_mpo.cast` does.

    Args:
      model: the model of the run.
      optimizer: its `nnx.Optimizer`, which stays as it is.
      tx: the transformation to continue with: that of `optimizer`, wrapped in `compensated`, with or without
        `quantized_state` inside. None: `compensated(optimizer.tx)`.
      fused: see the class; so are the other arguments. The variables that are trained are those of `optimizer.wrt`.

    Returns:
      The optimizer.

    Raises:
      TypeError: if `optimizer` is not an `nnx.Optimizer`.
      ValueError: if `tx` is not that of the run, or `model` not its model, with the leaf that differs; and what the
        class raises.

    Memory: as `optax_mpo.convert`: both states, and the f32 masters, while it runs.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mpo as mpo
      >>> from flax import nnx
      >>> from optax_mpo.flax import Optimizer
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> old = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      >>> old.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4)))))(model)) and None
      >>> optimizer = Optimizer.from_nnx(model, old)
      >>> model.kernel.get_value().dtype.name, int(optimizer.step.get_value())
      ('bfloat16', 1)
    """
    if not isinstance(optimizer, nnx.Optimizer):
      raise TypeError(
        f"Optimizer.from_nnx: optimizer has to be an nnx.Optimizer, but it is a {type(optimizer).__name__}. For params "
        "and a state of Optax, use optax_mpo.convert."
      )
    old = nnx.as_pure(optimizer.opt_state)
    tx = compensated.wrapped(optimizer.tx, old) if tx is None else tx
    made = convert.convert(tx, nnx.as_pure(nnx.state(model, optimizer.wrt)), old, dtype=dtype, where=where)
    run = *made, jnp.asarray(optimizer.step.get_value(), jnp.int32)
    average_of = {"ema_decay": ema_decay, "ema_bits": ema_bits}
    return cls(model, tx, wrt=optimizer.wrt, fused=fused, two_pass=two_pass, **average_of, _run=buffers.own(run, old))

  def masters(self, model: nnx.Module) -> PyTree:
    """Returns the f32 master weights, as a tree like `nnx.as_pure(nnx.state(model, wrt))`."""
    return master_params(nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state))

  def averages(self) -> PyTree:
    """Returns the moving average as a tree like `masters(model)`, f32[*s].

    For evaluation: `nnx.update(copy, optimizer.averages())`, with `copy = nnx.clone(model)`. In bf16, without a copy:
    `nnx.as_pure(optimizer.ema.values)`.

    Raises:
      ValueError: if there is no average.

    Memory: 4 bytes per parameter.
    """
    if self.ema is None:
      raise ValueError("Optimizer.averages: there is no average. Make the Optimizer with ema_decay=0.999, say.")
    return average.joined(nnx.as_pure(self.ema))

  def update(self, model: nnx.Module, grads: PyTree, /, **kwargs: PyTree) -> optax.Updates:
    """Does one ordinary step with gradients, as `nnx.Optimizer.update`: changes `model` and this object in place.

    Args:
      model: the model that this object was made with.
      grads: its gradients, as `nnx.grad(loss_fn)(model)` returns them.
      **kwargs: further arguments of `tx.update`, such as `value`.

    Returns:
      The updates, a tree like the params, f32. `optax_mpo.apply_updates` knows what they lead to, to the last bit.

    Raises:
      ValueError: if `grads` does not match the params.

    Memory: the tree of gradients, 2 to 4 bytes per parameter. `step_with` does not make it.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mpo as mpo
      >>> from flax import nnx
      >>> from optax_mpo.flax import Optimizer
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, mpo.compensated(optax.sgd(0.5)))
      >>> grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2)))))(model)
      >>> updates = optimizer.update(model, grads)
      >>> model.bias.get_value()
      Array([-0.5, -0.5], dtype=bfloat16)
    """
    params, opt_state = nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state)
    grads = nnx.as_pure(nnx.state(grads, self.wrt))
    updates, params, opt_state = updated(self.tx, grads, opt_state, params, nnx.as_pure(kwargs))
    nnx.update(model, params)
    self._keep(params, opt_state)
    return updates

  def metrics(self, loss: jax.Array | None = None) -> dict[str, jax.Array]:
    """Returns what there is to log of the last step, by name, f32[] each.

    It has the norms of all `record_norms` in `tx`; `learning_rate` where `tx` comes from `optax.inject_hyperparams`,
    with `learning_rate_1` and so on where there are several; and `loss` if it is given.
    """
    return metrics(nnx.as_pure(self.opt_state), loss)

  def step_with(
    self,
    model: nnx.Module,
    loss_fn: Callable[..., PyTree],
    *args: PyTree,
    has_aux: bool = False,
    tx_args: Mapping[str, PyTree] | None = None,
    microbatches: int | Microbatches = 1,
  ) -> PyTree:
    """Does one training step: updates `model` (params, batch statistics, random streams) and this object in place.

    As with `nnx.value_and_grad`, changes that `loss_fn` makes to NNX objects are kept: random streams and metrics among
    `args` are updated, and the model gets the variables that its forward pass makes, as `sow` does.

    Args:
      model: the model that this object was made with.
      loss_fn: `loss_fn(model, *args)`, which returns the loss, f32[], or `(loss, aux)`. It gets copies of the model and
        of other NNX objects, which it may change. With `fused="layer"` it gets handles for the params instead of a
        model, and only the params of the model are updated.
      *args: what `loss_fn` takes: a batch, random keys, `nnx.Rngs`, an `nnx.Metric`, another module.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      tx_args: extra arguments of `tx.update`. `value` is the loss, unless it is given here.
      microbatches: for gradient accumulation, as for `value_and_update`, with `*args` as the batch. NNX objects are not
        split: microbatches change them in turn, and `Microbatches.weight` gets None for them. With `fused="layer"`, the
        layers split the batch instead.

    Returns:
      What `loss_fn` returns; `aux` of microbatches is stacked or averaged.

    Raises:
      ValueError: if `loss_fn` adds or removes trained variables; with `fused="auto"`, if the update does not allow
        gradient release; if a microbatch changes more than values of variables; and what the step raises.

    With `fused=None`, it warns when it is traced, once for each transformation, if it has to be an ordinary step.
    """
    leaves, treedef = jax.tree.flatten(args, is_leaf=_is_node)
    nodes = [x for x in leaves if _is_node(x)]
    others = [None if _is_node(x) else x for x in leaves]
    seen = () if self.fused == "layer" else model  # with handles, loss_fn does not see the model

    # As the transformations of NNX do: split outside, merge and split inside, and a merge outside, which finds the
    # caller's objects by the context and changes them.
    with nnx.update_context(_STEP):
      with nnx.split_context(_STEP) as context:
        graph, weights, rest = context.split(seen, self.wrt, ...)
        nodes_graph, states = context.split(nodes)

      def whole(params: PyTree, state: PyTree, *others: PyTree) -> tuple[jax.Array, PyTree]:
        with nnx.merge_context(_STEP, inner=True) as context:
          copy = context.merge(graph, weights if self.fused == "layer" else params, state["model"])
          copies = context.merge(nodes_graph, state["args"])
        given, values = iter(copies), zip(leaves, treedef.flatten_up_to(others), strict=True)
        args = treedef.unflatten([next(given) if _is_node(x) else other for x, other in values])
        out = loss_fn(params if self.fused == "layer" else copy, *args)
        with nnx.split_context(_STEP) as context:
          new_graph, kept, new = context.split(copy, self.wrt, ...)
          new_nodes_graph, new_states = context.split(copies)
        _check_trained(nnx.as_pure(weights), nnx.as_pure(kept))
        loss, aux = out if has_aux else (out, None)
        return loss, ((aux, (new_graph, new_nodes_graph)), {"model": new, "args": new_states})

      step = make_step(whole, self.tx, self.fused, self.two_pass, "Optimizer.step_with", tx_args, microbatches)
      pure = nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state)
      given = *pure, {"model": rest, "args": states}, *treedef.unflatten(others)
      (loss, ((aux, graphs), state)), new_params, new_state = step(*given)
      if microbatches != 1:
        _check_graphs((graph, nodes_graph), graphs)
      with nnx.merge_context(_STEP, inner=False) as context:
        context.merge(graphs[0], weights if self.fused == "layer" else new_params, state["model"])
        context.merge(graphs[1], state["args"])
    if self.fused == "layer":
      nnx.update(model, new_params)
    self._keep(new_params, new_state)
    return (loss, aux) if has_aux else loss

  def explain(
    self,
    model: nnx.Module,
    loss_fn: Callable[..., PyTree],
    *args: PyTree,
    has_aux: bool = False,
    tx_args: Mapping[str, PyTree] | None = None,
    microbatches: int | Microbatches = 1,
  ) -> explain.Explanation:
    """Tells how `step_with` updates each parameter with gradient release, as `optax_mpo.explain` does. Nothing runs.

    Args:
      model: the model that this object was made with.
      loss_fn: as for `step_with`; so are the other arguments.

    Returns:
      An `Explanation`. Print it to see it as a table.

    Raises:
      ValueError: where the update does not allow gradient release, with the reason.

    Example:
      >>> import jax.numpy as jnp, optax, optax_mpo as mpo
      >>> from flax import nnx
      >>> from optax_mpo.flax import Optimizer
      >>> model = nnx.Linear(4, 2, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
      >>> optimizer = Optimizer(model, mpo.compensated(optax.adam(1e-3)))
      >>> optimizer.explain(model, lambda model, x: jnp.mean(model(x).astype(jnp.float32) ** 2), jnp.ones((8, 4)))
      leaf              shape   stepped  gradient held  why
      params['kernel']  [4, 2]  at once  16 B
      8 parameters; the largest gradient held is 16 B
    """
    leaves, treedef = jax.tree.flatten(args, is_leaf=_is_node)
    graph, _, rest = nnx.split(model, self.wrt, ...)
    nodes_graph, nodes = nnx.split([x for x in leaves if _is_node(x)])

    def whole(params: PyTree, state: tuple[PyTree, PyTree], *others: PyTree) -> tuple[jax.Array, PyTree]:
      given = iter(nnx.merge(nodes_graph, state[1]))
      values = zip(leaves, treedef.flatten_up_to(others), strict=True)
      args = treedef.unflatten([next(given) if _is_node(x) else other for x, other in values])
      out = loss_fn(nnx.merge(graph, params, state[0]), *args)
      loss, aux = out if has_aux else (out, None)
      return loss, (aux, state)

    others = treedef.unflatten([None if _is_node(x) else x for x in leaves])
    pure = nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state)
    explained = explain_step(whole, self.tx, self.two_pass, "Optimizer.explain", tx_args, microbatches)
    return explained(*pure, (rest, nodes), *others)

  def _keep(self, params: PyTree, opt_state: optax.OptState) -> None:
    """Takes the new state, counts the step and moves the average."""
    _set(self.opt_state, opt_state)
    self.step.set_value(self.step.get_value() + 1)
    if self.ema is not None and self.ema_decay is not None:
      masters, step = master_params(params, opt_state), self.step.get_value()
      _set(self.ema, average.moved(nnx.as_pure(self.ema), masters, self.ema_decay, self.ema_bits, step))


def _set(variables: PyTree, values: PyTree) -> None:
  jax.tree.map(lambda old, new: old.set_value(new), variables, values, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _check_trained(before: PyTree, after: PyTree) -> None:
  hint = "Make all trained variables before the Optimizer, which has state for each of them, and keep them."
  trees.flatten_like(before, after, "Optimizer.step_with: the tree of trained variables after loss_fn", hint)


def _check_graphs(before: Sequence[nnx.GraphDef], after: Sequence[nnx.GraphDef]) -> None:
  if any(old != new.with_no_outer_index() for old, new in zip(before, after, strict=True)):
    raise ValueError(
      "Optimizer.step_with: with microbatches, loss_fn may change the values of variables, and it changes other "
      "attributes of the model or of an object among its arguments, such as a Python number. Put the value into an "
      "nnx.Variable, which each microbatch changes in turn."
    )


def _is_node(x: object) -> bool:
  """Whether `x` is an object of NNX that `loss_fn` may change: a module, random streams, a metric, a variable."""
  return isinstance(x, nnx.Pytree | nnx.Variable)
