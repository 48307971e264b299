"""Optax training with bf16 weights whose f32 master is kept as compensation bits.

Why: mixed precision holds every weight twice, in bf16 to compute with and in f32 to update. The two share their upper
half. `compensated` stores that half once, as the params, and the rest as compensation bits in the optimizer state. The
wrapped transformation still sees f32 master weights and f32 gradients. With 16 bits, training equals training with f32
masters bit for bit.

Memory: 2 bytes per parameter for the weight and extra_bits / 8 for the compensation bits. The f32 view is an integer
expression of the two. XLA fuses it into the update, so that no f32 copy is stored.

Source: Lewandowski & Kosson, "Memory Efficient Mixed-Precision Optimizers", arXiv:2309.12381.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_mpo._backends import step_weight
from optax_mpo._codecs import blocks, cast, checks, formats, known_weights, stochastic_rounding
from optax_mpo._codecs.masters import CompensatedState, states_in
from optax_mpo._core import host, overwritten, renames, trees, types, wrapping, xla_cpu
from optax_mpo._core.annotations import KeyPath, PyTree, PyTreeDef, Values
from optax_mpo._stepping import leafwise
from optax_mpo._transforms import initialise, probes
from optax_mpo._transforms.sharding import state_sharding


class RoundingState(NamedTuple):
  """Step counter and inner state of `compensated(..., rounding="stochastic")`.

  Attributes:
    step: i32[], the number of updates.
    inner_state: the state of the wrapped transformation.
  """

  step: jax.Array
  inner_state: optax.OptState


@renames.renamed(bits="extra_bits")
def compensated(
  inner: optax.GradientTransformation,
  extra_bits: int = 16,
  *,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Runs `inner` on f32 master weights that are stored as bf16 (or fp16, float8) params and compensation bits.

  `inner` may be any Optax transformation, including chains, wrappers and `optax.MultiSteps`. Its `init` and `update`
  see f32 params and f32 gradients, whatever the dtype of the incoming gradients. Params that are f32 already stay
  ordinary f32 leaves.

  Put everything that should compute in f32 inside: `compensated(optax.chain(optax.clip(1.0), optax.adamw(1e-3)))`.
  Nothing may change the updates between this transformation and the params: the bits belong to the weights that exactly
  these updates lead to.

  Leaves under the key `_overwrite_with_gradient` (scales and histories of Flax's FP8 layers) become their gradients.
  `inner` does not see them: its params, gradients and state have `optax.MaskedNode`s in their places. Nothing around
  `compensated` may change these gradients (`loss_scaled` does not).

  Args:
    inner: the transformation to wrap.
    extra_bits: how many of the 16 bits that bf16 cuts off are kept. 16 is exact: training equals f32-master Optax bit
      for bit. With 8 or 4, master weights are rounded to a 24- or 20-bit number after every step. 0 keeps no bits:
      plain bf16 training whose updates are computed in f32.
    rounding: how weights are rounded to what they can hold: "nearest", or "stochastic": up or down at random, in
      proportion, so that updates too small for the bits count on average. Without bits, "nearest" loses small updates.
    seed: of the stochastic rounding. The random bits depend only on the seed, the step number, the leaf and the
      position of the weight: they are reproducible, and do not depend on how the arrays are sharded.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `CompensatedState`; with stochastic rounding its
    `inner_state` is a `RoundingState` around that of `inner`. Its updates are f32. Apply them with
    `optax_mpo.apply_updates`, or with `optax.apply_updates`, which differs for weights that one step makes 65536
    times smaller (see `apply_updates`).

  Raises:
    ValueError: for unsupported values of `extra_bits`, `rounding` or `seed`.
    TypeError: if `inner` is not an Optax transformation.

    `init` warns if all params are f32 (use `optax_mpo.init`, which casts them to bf16), and if rounding would drop the
    weight decay of `inner`.

    `init` and `update` raise TypeError for params of a dtype other than bfloat16, float16, float8_e4m3fn and float32
    and for float8 gradients, and ValueError for trees that do not match. Both name the leaf.

  Memory: 2 + extra_bits / 8 bytes per bf16 or fp16 parameter, 1.03 + extra_bits / 8 per float8 one, plus the state of
    `inner`.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.compensated(optax.sgd(1e-3), extra_bits=16)
    >>> params, state = mpo.init(tx, {"w": jnp.ones(3)})
    >>> for _ in range(4):  # each step is a quarter of what bf16 can resolve at 1
    ...   updates, state = tx.update({"w": jnp.ones(3)}, state, params)
    ...   params = mpo.apply_updates(params, updates)
    >>> params["w"].dtype.name, mpo.master_params(params, state)["w"].tolist()[0]
    ('bfloat16', 0.9960000514984131)

  References:
    Lewandowski & Kosson, `Memory Efficient Mixed-Precision Optimizers <https://arxiv.org/abs/2309.12381>`_, 2023
  """
  bits = extra_bits
  if not isinstance(bits, int) or isinstance(bits, bool) or bits not in formats.BITS:
    raise ValueError(
      f"compensated: extra_bits has to be one of {formats.BITS}, but it is {bits!r}. It is a Python int and static: "
      "under optax.inject_hyperparams, name it in static_args."
    )
  if rounding not in ("nearest", "stochastic"):
    raise ValueError(f"compensated: rounding has to be 'nearest' or 'stochastic', but it is {rounding!r}.")
  if not isinstance(seed, int) or isinstance(seed, bool):
    raise ValueError(f"compensated: seed has to be a Python int, but it is {seed!r}.")
  inner = wrapping.as_transformation(inner, "compensated")
  stochastic = rounding == "stochastic"
  tried: list[bool] = []  # not empty once `init` has looked for lost weight decay

  def init(params: PyTree) -> CompensatedState:
    named, treedef = trees.named_leaves(params), jax.tree.structure(params)
    replaced = overwritten.flags(params)
    for (leaf_name, leaf), is_replaced in zip(named, replaced, strict=True):
      if not is_replaced:
        checks.check_param("compensated", leaf_name, leaf, bits)
    initialise.warn_of_f32(params)
    made = [
      (optax.MaskedNode(), optax.MaskedNode()) if is_replaced else initialise.claimed(leaf_name, leaf, bits)
      for (leaf_name, leaf), is_replaced in zip(named, replaced, strict=True)
    ]
    masters, kept = zip(*made, strict=True) if made else ((), ())
    if probes.is_trying():
      return CompensatedState(treedef.unflatten(kept), optax.EmptyState())
    if not (stochastic or tried):
      tried.append(True)
      probes.warn_of_lost_decay(inner, _without(replaced, treedef.flatten_up_to(params), treedef), bits)
    inner_state = inner.init(treedef.unflatten(masters))
    if stochastic:
      inner_state = RoundingState(jnp.zeros([], jnp.int32), inner_state)
    return CompensatedState(treedef.unflatten(kept), inner_state)

  def update(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: PyTree
  ) -> tuple[optax.Updates, optax.OptState]:
    def plain(updates: optax.Updates, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, PyTree]:
      steps, new_state = update_all(updates, host.fetched(state), host.fetched(params), **extra_args)
      return steps, host.stored_like(new_state, state)

    if any(map(host.is_on_host, jax.tree.leaves(state))) or _is_slow_in_one_piece(state, params):
      taken = optax.GradientTransformation(init, plain)
      return leafwise.update(taken, updates, state, params, "compensated", kernels=False)
    return plain(updates, state, params)

  def update_all(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: PyTree
  ) -> tuple[optax.Updates, optax.OptState]:
    state = wrapping.own_state(state, CompensatedState, "compensated")
    if params is None:
      raise ValueError("compensated: update needs the params. Call tx.update(grads, state, params).")
    if probes.is_trying():
      ones, counted = probes.tried_update(params, state.compensation)
      return ones, CompensatedState(counted, state.inner_state)
    kept, grads = checks.check_update(updates, state.compensation, params, bits)
    leaves, treedef = jax.tree.flatten(params)
    replaced = overwritten.flags(params)
    masters = [_master(*pair) for pair in zip(leaves, kept, strict=True)]
    wide = [xla_cpu.laid_out(jnp.asarray(g)).astype(jnp.float32) for g in grads]

    before = state.inner_state
    _check_rounding(before, stochastic)
    steps, inner_state = inner.update(
      _without(replaced, wide, treedef),
      before.inner_state if isinstance(before, RoundingState) else before,
      _without(replaced, masters, treedef),
      **extra_args,
    )

    steps = trees.flatten_like(params, steps, "compensated: the update of the inner transformation", "")
    random: list[jax.Array | None] = [None] * len(leaves)
    if isinstance(before, RoundingState):
      inner_state = RoundingState(jnp.asarray(optax.safe_increment(before.step)), inner_state)
      random = [stochastic_rounding.random_bits(seed, before.step, i, leaf.shape) for i, leaf in enumerate(leaves)]
    stepped = [
      (overwritten.NewValue(jnp.asarray(g).astype(leaf.dtype)), optax.MaskedNode())
      if is_replaced
      else _step(leaf, master, step, bits, r)
      for is_replaced, g, leaf, master, step, r in zip(replaced, grads, leaves, masters, steps, random, strict=True)
    ]
    return (
      treedef.unflatten([s[0] for s in stepped]),
      CompensatedState(treedef.unflatten([s[1] for s in stepped]), inner_state),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _is_slow_in_one_piece(state: optax.OptState, params: PyTree) -> bool:
  """Whether this machine is slow to update the 8-bit state of an ordinary step as a whole."""
  found = jax.tree.leaves(state, is_leaf=blocks.is_quantized)
  largest = max((x.values.size for x in found if blocks.is_quantized(x)), default=0)
  return step_weight.is_better_by_rows(largest) and not any(types.is_split(x) for x in jax.tree.leaves(params))


def _without(replaced: list[bool], leaves: Values, treedef: PyTreeDef) -> PyTree:
  """The tree of leaves as the inner transformation sees it, without those that are overwritten."""
  return treedef.unflatten(
    [optax.MaskedNode() if masked else leaf for masked, leaf in zip(replaced, leaves, strict=True)]
  )


def _master(leaf: jax.Array, kept: PyTree) -> jax.Array:
  """The f32 master weight of a leaf: f32[*s] unchanged, low[*s] joined with its bits."""
  return formats.join(leaf, checks.bits_or_none(kept)) if formats.is_low(leaf) else leaf


def _step(
  leaf: jax.Array, master: jax.Array, step: jax.Array, bits: int, random: jax.Array | None
) -> tuple[jax.Array, PyTree]:
  """Returns the update f32[*s] of one leaf, and the bits of its new weight."""
  if not formats.is_low(leaf):
    return step, optax.MaskedNode()
  new = xla_cpu.held(formats.add(master, step).astype(jnp.float32), leaf)
  update, low, kept = formats.step(leaf, new, bits, random)
  known_weights.remember(update, leaf, low)
  return update, checks.bits_or_masked(kept)


def _check_rounding(inner_state: PyTree, stochastic: bool) -> None:
  if isinstance(inner_state, RoundingState) != stochastic:
    was, now = ("nearest", "stochastic") if stochastic else ("stochastic", "nearest")
    raise ValueError(
      f"compensated: the state was made with rounding={was!r}, but this transformation has rounding={now!r}. The inner "
      "state is the same but for the number of steps: wrap it in optax_mpo.RoundingState(step, inner_state) or take it "
      "out of one, with state._replace(inner_state=...)."
    )


def init(
  tx: optax.GradientTransformation,
  params: PyTree,
  *,
  dtype: DTypeLike = jnp.bfloat16,
  where: Callable[[KeyPath, jax.Array], bool] | None = None,
  state_memory: str | None = None,
) -> tuple[PyTree, optax.OptState]:
  """Casts f32 params to low precision and makes `tx`'s state, with the bits that the cast cuts off.

  Use this instead of `tx.init(params)`, which sees only the rounded weights. Every `compensated` inside `tx` (in a
  chain, masked, multi_transform, inject_hyperparams, MultiSteps, ...) finds the bits of its leaves. To continue with
  params that are bf16 or fp16 already, use `tx.init(params)`: their bits start at zero.

  Args:
    tx: a transformation with `compensated` in it.
    params: a tree of f32 params. Leaves of other dtypes, and leaves under the key `_overwrite_with_gradient`, stay as
      they are.
    dtype: the low precision, bfloat16, float16 or, experimental and with 16 or 8 bits only, float8_e4m3fn
      (docs/compact.md has the bounds of these two). A loss gets float8 params from `decoded`.
    where: `where(path, leaf) -> bool` says which f32 leaves are cast, as in `cast`. None: all of them.
    state_memory: "pinned_host" makes the state in the memory of the host, where `state_sharding` with this
      `memory_kind` would put it, leaf by leaf. docs/offload.md says what it saves and costs.

  Returns:
    `(params, opt_state)`, where `opt_state` has the structure that `tx.init` makes. Both can be donated: they share no
    buffer with each other or with the argument `params`.

  Raises:
    ValueError: for another `dtype`, or if a leaf is cast that no `compensated` in `tx` trains (its bits would be lost)
      or that two train.
    TypeError: for a leaf that cannot be trained, such as a function, or an integer or float64 array, with its path.

    It warns if something around `compensated` changes its updates.

  Memory: 2 + extra_bits / 8 bytes per parameter, in float8 1.03 + extra_bits / 8, plus the state of what is wrapped.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.compensated(optax.adamw(3e-4))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.full(2, 0.1)})
    >>> params
    {'w': Array([0.100098, 0.100098], dtype=bfloat16)}
    >>> bool((mpo.master_params(params, opt_state)["w"] == jnp.full(2, 0.1)).all())
    True
  """
  tx = wrapping.as_transformation(tx, "init", "tx", "tx, params")
  if state_memory is None:
    new, opt_state = initialise.initialised(tx, params, dtype, where)
  else:
    new, opt_state = _on_host(tx, params, dtype, where, state_memory)
  probes.warn_of_changes(tx, new)
  return new, opt_state


def _on_host(
  tx: optax.GradientTransformation, params: PyTree, dtype: DTypeLike, where: cast.Where | None, memory_kind: str
) -> tuple[PyTree, optax.OptState]:
  """As `initialise.initialised`, in one compiled program that makes the state where it stays."""
  if step_weight.is_traced(jax.tree.leaves(params)):
    raise ValueError(
      "init: state_memory needs params that are arrays, and these are traced. Call init outside of jit, or leave "
      "state_memory out and jit with out_shardings=(..., state_sharding(params, opt_state, memory_kind=...))."
    )
  params = jax.tree.map(jnp.asarray, params)
  new, opt_state = jax.eval_shape(lambda params: initialise.initialised(tx, params, dtype, where), params)
  kept = jax.tree.map(lambda x: x.sharding, params)
  laid_out = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), new, kept)
  shardings = kept, state_sharding(laid_out, opt_state, memory_kind=memory_kind)
  return jax.jit(lambda params: initialise.initialised(tx, params, dtype, where), out_shardings=shardings)(params)


def wrapped(tx: optax.GradientTransformation, opt_state: optax.OptState) -> optax.GradientTransformation:
  """Returns `tx` in `compensated`, unless its state shows that there is one in it already."""
  return tx if states_in(opt_state) else compensated(tx)
