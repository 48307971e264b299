"""A train state for Flax Linen. See `optax_mpo.flax`."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state
from jax.typing import DTypeLike

from optax_mpo._codecs import masters
from optax_mpo._codecs.masters import master_params
from optax_mpo._core import buffers, overwritten
from optax_mpo._core.annotations import PyTree
from optax_mpo._flax.steps import Fused, Where, check_options, explain_step, make_step, metrics, updated
from optax_mpo._stepping import explain
from optax_mpo._stepping.microbatches import Microbatches
from optax_mpo._transforms import average, compensated, convert


class TrainState(struct.PyTreeNode):
  """A train state for Flax Linen: bf16 params with compensation bits, and steps with gradient release.

  It is an immutable pytree: `step_with` returns a new one. Donate it to the jitted step.

  Attributes:
    step: i32[], the number of steps done.
    params: the params, bf16 by default. With FP8 layers `{"params": ..., "_overwrite_with_gradient": ...}`, as in
      Flax's own state; the scales and histories in the latter stay f32, and become their gradients in each step.
    opt_state: the state of `tx`.
    variables: the model's other collections, such as `{"batch_stats": ...}`.
    ema: a moving average of the f32 master weights, or None; `averages()` returns it as f32. It is a tree like the
      params, f32; with `ema_bits` it has `values`, bf16, and their `compensation`. Of scales and histories it has their
      newest values.
    apply_fn: the model's `apply`, or any function; stored for convenience.
    tx: the transformation.
    fused: the steps of `step_with`: gradient release, "auto" (`value_and_update`) or "layer"
      (`fused_value_and_update`); "off": ordinary steps. None: as "auto" where the update allows it, else as "off", with
      a warning that says why.
    two_pass: as for `value_and_update`.
    ema_decay: the fraction of `ema` that each step keeps.
    ema_bits: of `ema`, besides bf16: with 8 it is rounded stochastically; 16 is the f32 average, bit for bit. None: it
      is f32 as it is.

  Memory: that of `optax_mpo.init`, plus 4 bytes per parameter for `ema` if there is one, or 3 with `ema_bits=8`.

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
  apply_fn: Callable[..., PyTree] = struct.field(pytree_node=False)
  tx: optax.GradientTransformation = struct.field(pytree_node=False)
  fused: Fused | None = struct.field(pytree_node=False, default=None)
  two_pass: bool = struct.field(pytree_node=False, default=False)
  ema_decay: float | None = struct.field(pytree_node=False, default=None)
  ema_bits: int | None = struct.field(pytree_node=False, default=None)

  @classmethod
  def create(
    cls,
    *,
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    tx: optax.GradientTransformation,
    variables: Mapping[str, PyTree] | None = None,
    fused: Fused | None = None,
    two_pass: bool = False,
    ema_decay: float | None = None,
    ema_bits: int | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    where: Where | None = None,
    state_memory: str | None = None,
    **kwargs: PyTree,
  ) -> "TrainState":
    """Makes a state from f32 params, with `optax_mpo.init`.

    Args:
      apply_fn: usually `model.apply`.
      params: the collection `params` of the model's variables, in f32; or, as for Flax's own state, a mapping of that
        and of `_overwrite_with_gradient`.
      tx: a transformation with `compensated` in it.
      variables: the other collections: `{k: v for k, v in model.init(...).items() if k != "params"}`. If
        `_overwrite_with_gradient` is one of them, it is trained with the params.
      fused: see the class.
      two_pass: see the class.
      ema_decay: for a moving average of the master weights; None keeps none.
      ema_bits: see the class.
      dtype: of the params, as in `optax_mpo.init`.
      where: which params are cast, as in `optax_mpo.init`.
      state_memory: "pinned_host" makes the optimizer's state in the memory of the host, as in `optax_mpo.init`.
      **kwargs: fields of a subclass.

    Returns:
      The state. It can be donated: it shares no buffer with the arguments.

    Raises:
      ValueError: for other values of `fused` or `ema_bits`; and what `optax_mpo.init` raises.
    """
    check_options(fused, ema_decay, ema_bits, "TrainState.create")
    given, rest = (params, variables, kwargs), dict(variables or {})
    if overwritten.KEY in rest and not overwritten.is_in(params):
      params = {"params": params, overwritten.KEY: rest.pop(overwritten.KEY)}
    low, opt_state = compensated.init(tx, params, dtype=dtype, where=where, state_memory=state_memory)
    options = {"fused": fused, "two_pass": two_pass, "ema_decay": ema_decay, "ema_bits": ema_bits}
    return cls._made(
      given, jnp.zeros([], jnp.int32), low, opt_state, rest, apply_fn=apply_fn, tx=tx, **options, **kwargs
    )

  @classmethod
  def _made(
    cls,
    given: PyTree,
    step: jax.Array,
    params: PyTree,
    opt_state: optax.OptState,
    variables: Mapping[str, PyTree],
    **fields: PyTree,
  ) -> "TrainState":
    """A state that shares no buffer with the trees in `given`."""
    ema = None
    if fields["ema_decay"] is not None:
      ema = average.start(params, master_params(params, opt_state), fields["ema_bits"])
    made = cls(step=step, params=params, opt_state=opt_state, variables=dict(variables), ema=ema, **fields)
    return buffers.own(made, given)

  @classmethod
  def from_flax(
    cls,
    state: train_state.TrainState,
    tx: optax.GradientTransformation | None = None,
    *,
    variables: Mapping[str, PyTree] | None = None,
    fused: Fused | None = None,
    two_pass: bool = False,
    ema_decay: float | None = None,
    ema_bits: int | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    where: Where | None = None,
    **kwargs: PyTree,
  ) -> "TrainState":
    """Takes over a run of Flax's own train state, with f32 params, in the middle.

    Steps, moments and schedules continue, as with `optax_mpo.convert`. With 16 bits and f32 moments, training
    continues as the f32 run, bit for bit, if its loss casts the params as `optax_mpo.cast` does.

    Args:
      state: a `flax.training.train_state.TrainState`, or one of a subclass.
      tx: the transformation to continue with: that of `state`, wrapped in `compensated`, with or without
        `quantized_state` inside. None: `compensated(state.tx)`.
      variables: as for `create`. Of a subclass: `variables={"batch_stats": state.batch_stats}`.
      fused: see the class.
      two_pass: see the class.
      ema_decay: as for `create`; the average starts at the weights of `state`.
      ema_bits: see the class.
      dtype: of the params, as in `optax_mpo.init`.
      where: which params are cast, as in `optax_mpo.init`.
      **kwargs: fields of a subclass.

    Returns:
      The state. It can be donated: it shares no buffer with the arguments.

    Raises:
      TypeError: if `state` is not a train state of Flax.
      ValueError: if `tx` is not that of the run, with the leaf that differs; for other values of `fused`; and what
        `optax_mpo.convert` raises.

    Memory: as `optax_mpo.convert`: both states, and the f32 masters, while it runs.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
      >>> from flax.training import train_state
      >>> from optax_mpo.flax import TrainState
      >>> params = {"w": jnp.full(3, 0.1)}
      >>> old = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-2))
      >>> old = old.apply_gradients(grads={"w": jnp.ones(3)})
      >>> state = TrainState.from_flax(old)
      >>> int(state.step), state.params["w"].dtype.name, bool((state.masters()["w"] == old.params["w"]).all())
      (1, 'bfloat16', True)
    """
    check_options(fused, ema_decay, ema_bits, "TrainState.from_flax")
    if not isinstance(state, train_state.TrainState):
      raise TypeError(
        "TrainState.from_flax: state has to be a flax.training.train_state.TrainState, but it is a "
        f"{type(state).__name__}. For params and a state of Optax, use optax_mpo.convert."
      )
    tx = compensated.wrapped(state.tx, state.opt_state) if tx is None else tx
    low, opt_state = convert.convert(tx, state.params, state.opt_state, dtype=dtype, where=where)
    options = {"fused": fused, "two_pass": two_pass, "ema_decay": ema_decay, "ema_bits": ema_bits}
    step = jnp.asarray(state.step, jnp.int32)
    given = state, variables, kwargs
    return cls._made(given, step, low, opt_state, variables or {}, apply_fn=state.apply_fn, tx=tx, **options, **kwargs)

  def masters(self) -> PyTree:
    """Returns the f32 master weights, for evaluation or export."""
    return master_params(self.params, self.opt_state)

  def averages(self) -> PyTree:
    """Returns the moving average as a tree like `masters()`, f32[*s], for evaluation or export.

    Raises:
      ValueError: if there is no average.

    Memory: 4 bytes per parameter, or none with `ema_bits=None`.
    """
    if self.ema is None:
      raise ValueError("TrainState.averages: there is no average. Make the state with ema_decay=0.999, say.")
    return average.joined(self.ema)

  def decoded(self) -> PyTree:
    """Returns the weights to apply the model with: `params`, with float8 leaves times their scales, in bf16."""
    return masters.decoded(self.params, self.opt_state)

  def metrics(self, loss: jax.Array | None = None) -> dict[str, jax.Array]:
    """Returns what there is to log of the last step, by name, f32[] each.

    It has the norms of all `record_norms` in `tx`; `learning_rate` where `tx` comes from `optax.inject_hyperparams`,
    with `learning_rate_1` and so on where there are several; and `loss` if it is given.
    """
    return metrics(self.opt_state, loss)

  def step_with(
    self,
    loss_fn: Callable[..., PyTree],
    *args: PyTree,
    has_aux: bool = False,
    mutable: bool = False,
    tx_args: Mapping[str, PyTree] | None = None,
    microbatches: int | Microbatches = 1,
  ) -> tuple["TrainState", PyTree]:
    """Does one training step.

    `loss_fn(variables, *args)` gets `{"params": params, **self.variables}`, for `model.apply`. With `fused="layer"`,
    `params` are handles for `fused_layer`, `fused_scan` and `fused_value`. float8 params are decoded. With FP8 layers,
    `variables` has the collection `_overwrite_with_gradient` as well.

    Args:
      loss_fn: returns the loss, f32[]; or `(loss, aux)` with `has_aux`; or `(loss, updates)` with `mutable`, where
        `updates` are the changed collections as `model.apply(..., mutable=[...])` returns them; or `(loss, (aux,
        updates))` with both.
      *args: what `loss_fn` takes: a batch, keys for dropout such as `jax.random.fold_in(key, state.step)`.
      has_aux: see above.
      mutable: see above.
      tx_args: extra arguments of `tx.update`. `value` is the loss, unless it is given here.
      microbatches: for gradient accumulation, as for `value_and_update`, with `*args` as the batch. Microbatches change
        the collections in turn. With `fused="layer"`, the layers split the batch instead.

    Returns:
      The new state and the loss. With `has_aux`, the new state and `(loss, aux)`.

    Raises:
      ValueError: if `updates` has a collection that `variables` does not have; with `fused="auto"`, if the update does
        not allow gradient release; if a microbatch changes the structure or shapes of collections; and what the step
        raises.

    With `fused=None`, it warns when it is traced, once for each transformation, if it has to be an ordinary step.
    """
    whole = _pure(loss_fn, has_aux, mutable)
    step = make_step(whole, self.tx, self.fused, self.two_pass, "TrainState.step_with", tx_args, microbatches)
    (loss, (aux, variables)), params, opt_state = step(self.params, self.opt_state, self.variables, *args)
    return self._next(params, opt_state, variables=variables), (loss, aux) if has_aux else loss

  def explain(
    self,
    loss_fn: Callable[..., PyTree],
    *args: PyTree,
    has_aux: bool = False,
    mutable: bool = False,
    tx_args: Mapping[str, PyTree] | None = None,
    microbatches: int | Microbatches = 1,
  ) -> explain.Explanation:
    """Tells how `step_with` updates each parameter with gradient release, as `optax_mpo.explain` does. Nothing runs.

    Args:
      loss_fn: as for `step_with`; so are the other arguments.
      *args: arrays or ShapeDtypeStructs.

    Returns:
      An `Explanation`. Print it to see it as a table.

    Raises:
      ValueError: where the update does not allow gradient release, with the reason.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
      >>> from optax_mpo.flax import TrainState
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones((4, 2))}, tx=mpo.compensated(optax.adam(1e-3)))
      >>> loss_fn = lambda variables, x: jnp.mean((x @ variables["params"]["w"]).astype(jnp.float32) ** 2)
      >>> state.explain(loss_fn, jnp.ones((8, 4), jnp.bfloat16))
      leaf         shape   stepped  gradient held  why
      params['w']  [4, 2]  at once  16 B
      8 parameters; the largest gradient held is 16 B
    """
    whole = _pure(loss_fn, has_aux, mutable)
    explained = explain_step(whole, self.tx, self.two_pass, "TrainState.explain", tx_args, microbatches)
    return explained(self.params, self.opt_state, self.variables, *args)

  def apply_gradients(
    self, *, grads: PyTree, tx_args: Mapping[str, PyTree] | None = None, **kwargs: PyTree
  ) -> "TrainState":
    """Does one ordinary step with a tree of gradients, as Flax's `TrainState.apply_gradients`.

    Args:
      grads: a tree like `params`: gradients with respect to `params`, in any floating dtype.
      tx_args: extra arguments of `tx.update`, such as the loss as `value`.
      **kwargs: fields to replace, such as `variables`.

    Returns:
      The new state.

    Raises:
      ValueError: if `grads` does not match `params`.

    Memory: the tree of gradients, 2 to 4 bytes per parameter. `step_with` does not make it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
      >>> from optax_mpo.flax import TrainState
      >>> tx = mpo.compensated(optax.sgd(0.5))
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
      >>> grads = jax.grad(lambda params: jnp.sum(params["w"]))(state.params)
      >>> state.apply_gradients(grads=grads).params["w"]
      Array([0.5, 0.5], dtype=bfloat16)
    """
    _, params, opt_state = updated(self.tx, grads, self.opt_state, self.params, tx_args or {})
    return self._next(params, opt_state, **kwargs)

  def _next(self, params: PyTree, opt_state: optax.OptState, **fields: PyTree) -> "TrainState":
    new = self.replace(step=self.step + 1, params=params, opt_state=opt_state)
    if self.ema_decay is not None:
      new = new.replace(ema=average.moved(self.ema, new.masters(), self.ema_decay, self.ema_bits, new.step))
    return new.replace(**fields)


def _pure(
  loss_fn: Callable[..., PyTree], has_aux: bool, mutable: bool
) -> Callable[..., tuple[jax.Array, tuple[PyTree, PyTree]]]:
  """Returns `whole(params, variables, *args) -> (loss, (aux, variables))` for a loss as `step_with` takes it."""

  def whole(params: PyTree, variables: PyTree, *args: PyTree) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    trained = params if overwritten.is_in(params) else {"params": params}
    out = loss_fn({**trained, **variables}, *args)
    rest: PyTree
    loss, rest = out if has_aux or mutable else (out, None)
    aux: PyTree = None
    updates: PyTree = {}
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

  return whole
