"""A train state for Flax Linen, and an optimizer object for Flax NNX.

Why: Flax's own `TrainState.create` and `nnx.Optimizer` call `tx.init(params)`, which cannot know the bits that a cast
cut off. And both take a tree of gradients, which steps with gradient release never have.

How: both are thin. They hold what `optax_mpo.init` makes. Their `step_with(loss_fn, ...)` is one of the steps of this
library; what `loss_fn` changes besides the params (batch statistics, random streams, metrics) is returned as aux.

Needs flax: `pip install 'optax_mpo[flax]'`. `import optax_mpo` alone does not import it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from optax_mpo._codecs import apply, formats, masters
from optax_mpo._core import buffers, trees
from optax_mpo._layers import fused_step
from optax_mpo._stepping import value_and_update
from optax_mpo._transforms import compensated

PyTree = Any
Fused = Literal["auto", "layer", "off"]
Where = Callable[[tuple[Any, ...], jax.Array], bool]

_STEP = "optax_mpo.flax.Optimizer.step_with"  # the tag of the step's nnx.update_context


def _make_step(loss_fn: Callable[..., Any], tx: Any, fused: Fused, two_pass: bool) -> Callable[..., Any]:
  """Makes one of the three kinds of step, for a loss function that returns `(loss, aux)`."""
  if fused == "auto":
    return value_and_update.value_and_update(loss_fn, tx, has_aux=True, two_pass=two_pass)
  if fused == "layer":
    return fused_step.fused_value_and_update(loss_fn, tx, has_aux=True)

  def step(params: PyTree, opt_state: optax.OptState, *args: Any) -> tuple[Any, PyTree, optax.OptState]:
    value, grads = jax.value_and_grad(loss_fn, has_aux=True)(masters.decode(params, opt_state, "step_with"), *args)
    updates, opt_state = tx.update(grads, opt_state, params)
    return value, apply.apply_updates(params, updates), opt_state

  return step


def _check_fused(fused: str, caller: str) -> None:
  if fused not in ("auto", "layer", "off"):
    raise ValueError(f"{caller}: fused has to be 'auto', 'layer' or 'off', but it is {fused!r}.")


class TrainState(struct.PyTreeNode):
  """A train state for Flax Linen: bf16 params with compensation bits, and steps with gradient release.

  It is an immutable pytree: `step_with` returns a new one. Donate it to the jitted step.

  Attributes:
    step: i32[], the number of steps done.
    params: the params, bf16 by default.
    opt_state: the state of `tx`.
    variables: the model's other collections, such as `{"batch_stats": ...}`.
    ema: a moving average of the f32 master weights, or None.
    apply_fn: the model's `apply`, or any function; stored for convenience.
    tx: the transformation.
    fused: gradient release, "auto" (`value_and_update`) or "layer" (`fused_value_and_update`); "off": ordinary steps.
    two_pass: as for `value_and_update`.
    ema_decay: the fraction of `ema` that each step keeps.

  Memory: that of `optax_mpo.init`, plus 4 bytes per parameter for `ema` if there is one.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> from optax_mpo.flax import TrainState
    >>> model = nn.Dense(3, dtype=jnp.bfloat16)  # else Flax promotes params to the f32 of the input
    >>> x = jnp.ones((2, 4))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> tx = mpo.compensated(optax.adamw(1e-2))
    >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    >>> def loss_fn(variables, x):
    ...   return jnp.mean(state.apply_fn(variables, x).astype(jnp.float32) ** 2)
    >>> step = jax.jit(lambda state, x: state.step_with(loss_fn, x), donate_argnums=0)
    >>> state, loss = step(state, x)
    >>> int(state.step), state.params["kernel"].dtype.name
    (1, 'bfloat16')

  References:
    `flax.training.train_state <https://flax-linen.readthedocs.io>`_
  """

  step: jax.Array
  params: PyTree
  opt_state: optax.OptState
  variables: PyTree
  ema: PyTree
  apply_fn: Callable[..., Any] = struct.field(pytree_node=False)
  tx: optax.GradientTransformation = struct.field(pytree_node=False)
  fused: Fused = struct.field(pytree_node=False, default="auto")
  two_pass: bool = struct.field(pytree_node=False, default=False)
  ema_decay: float | None = struct.field(pytree_node=False, default=None)

  @classmethod
  def create(
    cls,
    *,
    apply_fn: Callable[..., Any],
    params: PyTree,
    tx: optax.GradientTransformation,
    variables: Mapping[str, PyTree] | None = None,
    fused: Fused = "auto",
    two_pass: bool = False,
    ema_decay: float | None = None,
    dtype: Any = jnp.bfloat16,
    where: Where | None = None,
    **kwargs: Any,
  ) -> "TrainState":
    """Makes a state from f32 params, with `optax_mpo.init`.

    Args:
      apply_fn: usually `model.apply`.
      params: the collection `params` of the model's variables, in f32.
      tx: a transformation with `compensated` in it.
      variables: the other collections: `{k: v for k, v in model.init(...).items() if k != "params"}`.
      fused: see the class.
      two_pass: see the class.
      ema_decay: for a moving average of the master weights; None keeps none.
      dtype: of the params, as in `optax_mpo.init`.
      where: which params are cast, as in `optax_mpo.init`.
      **kwargs: fields of a subclass.

    Returns:
      The state. It can be donated: it shares no buffer with the arguments.

    Raises:
      ValueError: for other values of `fused`; and what `optax_mpo.init` raises.
    """
    _check_fused(fused, "TrainState.create")
    low, opt_state = compensated.init(tx, params, dtype=dtype, where=where)
    made = cls(
      step=jnp.zeros([], jnp.int32),
      params=low,
      opt_state=opt_state,
      variables=dict(variables or {}),
      ema=None if ema_decay is None else compensated.master_params(low, opt_state),
      apply_fn=apply_fn,
      tx=tx,
      fused=fused,
      two_pass=two_pass,
      ema_decay=ema_decay,
      **kwargs,
    )
    return buffers.own(made, (params, variables, kwargs))

  def masters(self) -> PyTree:
    """Returns the f32 master weights, for evaluation or export."""
    return compensated.master_params(self.params, self.opt_state)

  def decoded(self) -> PyTree:
    """Returns the weights to apply the model with: `params`, with float8 leaves times their scales, in bf16."""
    return masters.decoded(self.params, self.opt_state)

  def step_with(
    self, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False, mutable: bool = False
  ) -> tuple["TrainState", Any]:
    """Does one training step.

    `loss_fn(variables, *args)` gets `{"params": params, **self.variables}`, for `model.apply`. With `fused="layer"`,
    `params` are handles for `fused_layer`, `fused_scan` and `fused_value`. float8 params are decoded.

    Args:
      loss_fn: returns the loss, f32[]; or `(loss, aux)` with `has_aux`; or `(loss, updates)` with `mutable`, where
        `updates` are the changed collections as `model.apply(..., mutable=[...])` returns them; or `(loss, (aux,
        updates))` with both.
      *args: what `loss_fn` takes: a batch, keys for dropout such as `jax.random.fold_in(key, state.step)`.
      has_aux: see above.
      mutable: see above.

    Returns:
      The new state and the loss. With `has_aux`, the new state and `(loss, aux)`.

    Raises:
      ValueError: if `updates` has a collection that `variables` does not have; and what the step raises.
    """

    def whole(params: PyTree, variables: PyTree, *args: Any) -> tuple[jax.Array, tuple[Any, PyTree]]:
      out = loss_fn({"params": params, **variables}, *args)
      rest: Any
      loss, rest = out if has_aux or mutable else (out, None)
      aux: Any = None
      updates: Any = {}
      if has_aux and mutable:
        aux, updates = rest
      elif has_aux:
        aux = rest
      elif mutable:
        updates = rest
      unknown = set(updates) - set(variables)
      if unknown:
        raise ValueError(
          f"TrainState.step_with: loss_fn returns the collections {sorted(unknown)}, and the state has "
          f"{sorted(variables)}. Pass them to TrainState.create as variables=..."
        )
      return loss, (aux, {**variables, **updates})

    step = _make_step(whole, self.tx, self.fused, self.two_pass)
    (loss, (aux, variables)), params, opt_state = step(self.params, self.opt_state, self.variables, *args)
    new = self.replace(step=self.step + 1, params=params, opt_state=opt_state, variables=variables)
    if self.ema_decay is not None:
      new = new.replace(ema=optax.incremental_update(new.masters(), self.ema, 1 - self.ema_decay))
    return new, (loss, aux) if has_aux else loss


class Optimizer(nnx.Pytree):
  """An optimizer for a Flax NNX model: bf16 params with compensation bits, updated in place.

  Its constructor casts the model's params. `step_with` updates the model and this object, also within `nnx.jit`.

  Args:
    model: an NNX module with f32 params.
    tx: a transformation with `compensated` in it.
    wrt: which variables are trained.
    fused: gradient release, "auto" (`value_and_update`) or "layer" (`fused_value_and_update`); "off": ordinary steps.
    two_pass: as for `value_and_update`.
    dtype: of the params, as in `optax_mpo.init`; not float8, since the model computes with its params as they are.
    where: which params are cast, as in `optax_mpo.init`.

  Raises:
    ValueError: for other values of `fused`, for float8; and what `optax_mpo.init` raises.

  Memory: that of `optax_mpo.init`.

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
    wrt: Any = nnx.Param,
    fused: Fused = "auto",
    two_pass: bool = False,
    dtype: Any = jnp.bfloat16,
    where: Where | None = None,
  ):
    _check_fused(fused, "Optimizer")
    params, opt_state = compensated.init(tx, nnx.as_pure(nnx.state(model, wrt)), dtype=dtype, where=where)
    if any(formats.is_scaled(leaf) for leaf in jax.tree.leaves(params)):
      raise ValueError(
        f"Optimizer: with dtype={jnp.dtype(dtype).name} the model would hold codes without their scales, and compute "
        "with them. Use bfloat16 or float16 here, or train pure params with value_and_update."
      )
    nnx.update(model, params)
    self.step = nnx.OptState(jnp.zeros([], jnp.int32))
    self.opt_state = nnx.data(jax.tree.map(nnx.OptState, opt_state))
    self.fused: Fused = fused
    self.tx, self.wrt, self.two_pass = tx, wrt, two_pass

  def masters(self, model: nnx.Module) -> PyTree:
    """Returns the f32 master weights, as a tree like `nnx.as_pure(nnx.state(model, wrt))`."""
    return compensated.master_params(nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state))

  def step_with(self, model: nnx.Module, loss_fn: Callable[..., Any], *args: Any, has_aux: bool = False) -> Any:
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

    Returns:
      What `loss_fn` returns.

    Raises:
      ValueError: if `loss_fn` adds or removes trained variables; and what the step raises.
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

      def whole(params: PyTree, rest: PyTree, states: PyTree, others: list[Any]) -> tuple[jax.Array, Any]:
        with nnx.merge_context(_STEP, inner=True) as context:
          copy = context.merge(graph, weights if self.fused == "layer" else params, rest)
          copies = context.merge(nodes_graph, states)
        given, values = iter(copies), zip(leaves, others, strict=True)
        args = treedef.unflatten([next(given) if _is_node(x) else other for x, other in values])
        out = loss_fn(params if self.fused == "layer" else copy, *args)
        with nnx.split_context(_STEP) as context:
          new_graph, kept, *new = context.split(copy, self.wrt, ...)
          changed = (new_graph, *new), context.split(copies)
        _check_trained(nnx.as_pure(weights), nnx.as_pure(kept))
        loss, aux = out if has_aux else (out, None)
        return loss, (aux, changed)

      step = _make_step(whole, self.tx, self.fused, self.two_pass)
      pure = nnx.as_pure(nnx.state(model, self.wrt)), nnx.as_pure(self.opt_state)
      (loss, (aux, changed)), new_params, new_state = step(*pure, rest, states, others)
      (graph, rest), (nodes_graph, states) = changed
      with nnx.merge_context(_STEP, inner=False) as context:
        context.merge(graph, weights if self.fused == "layer" else new_params, rest)
        context.merge(nodes_graph, states)
    if self.fused == "layer":
      nnx.update(model, new_params)
    jax.tree.map(
      lambda old, new: old.set_value(new), self.opt_state, new_state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    self.step.set_value(self.step.get_value() + 1)
    return (loss, aux) if has_aux else loss


def _check_trained(before: PyTree, after: PyTree) -> None:
  hint = "Make all trained variables before the Optimizer, which has state for each of them, and keep them."
  trees.flatten_like(before, after, "Optimizer.step_with: the tree of trained variables after loss_fn", hint)


def _is_node(x: Any) -> bool:
  """Whether `x` is an object of NNX that `loss_fn` may change: a module, random streams, a metric, a variable."""
  return isinstance(x, nnx.Pytree | nnx.Variable)
