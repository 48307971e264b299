"""Gradient accumulation: the batch is split, and one accumulator takes the place of a tree of gradients.

Why: several backward passes add up their gradients. With a tree of gradients beside the sum, that takes twice the
memory of one of them.

How: each backward pass adds a gradient to its sum as soon as it is complete, layer by layer in scans, as if the sum
were the state of an optimizer. The last one takes the sum, adds its own gradient and updates the weight. A sum with
fewer than 16 bits is stored as the master weights of `compensated` are: bf16 and the bits that it cuts off. It is
joined and split where a gradient is added to it, so that no f32 copy of it is made.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from optax_mpo._codecs import codec, formats
from optax_mpo._core import batches, host, modules, order, trees, types, wrapping, xla_cpu
from optax_mpo._core.annotations import Index, PyTree, Shaped
from optax_mpo._program import jax_forms
from optax_mpo._stepping import evaluate, stores
from optax_mpo._stepping.site import Site, Step, Values
from optax_mpo._stepping.traced import CALLER, Traced, differentiated_as
from optax_mpo._updates import by_leaf

Sum = tuple[jax.Array, ...]  # f32 (or wider), bf16, or bf16 and its bits
_Operands = tuple[list[jax.Array], list[Sum], dict[int, jax.Array], jax.Array]
_Results = tuple[list[jax.Array], list[Sum], list[jax.Array]]

_FACTOR, _LOSS = "_optax_mpo_factor", "_optax_mpo_loss"  # extra arguments of the last microbatch's update


@dataclasses.dataclass(frozen=True)
class Microbatches:
  """How `value_and_update` splits a batch, for gradient accumulation.

  Microbatch k has the entries k, k + count, k + 2 count, ... of the batch, so that a batch that is split over devices
  stays so. Each typed random key (`jax.random.key`) among the arguments of the loss is split into one for each
  microbatch. The loss of the step is the sum or mean of the losses, in f32.

  Attributes:
    count: the number of microbatches. It has to divide the batch.
    in_axes: the batch axis of each positional argument of the loss after the params, as in `jax.vmap`; None for what
      all microbatches get. 0 stands for axis 0 of all arrays that have axes. Keyword arguments are split along axis 0,
      also as in `jax.vmap`; scalars go to all.
    weight: `weight(*args, **kwargs)` gives the weight of a microbatch in the mean, a scalar, such as its number of
      tokens. None: all weigh the same. Where all weights are 0, loss and gradients are 0.
    reduce: "mean", of losses and gradients, or "sum".
    aux: "stack" for what the loss returns besides its value, with a new first axis; or "mean", where integers are
      summed and keys are stacked.
    accumulator_bits: how many of the 16 bits that bf16 cuts off an f32 sum of gradients are kept. 16 is f32. With 8 or
      4, the sum is rounded to nearest after each addition but the last, by at most 2^-16 or 2^-12 of itself. 0 is plain
      bf16, which loses gradients below 2^-9 of the sum so far. float64 sums stay as they are.

  Memory: the accumulator, 2 + accumulator_bits / 8 bytes per trained parameter, and what one microbatch takes.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> def loss_fn(params, x):
    ...   return jnp.mean(params["w"] * x)
    >>> tx = mpo.compensated(optax.sgd(1.0))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.ones(())})
    >>> step = mpo.value_and_update(loss_fn, tx, microbatches=mpo.Microbatches(2, reduce="sum"))
    >>> value, params, opt_state = step(params, opt_state, jnp.array([1.0, 2.0, 3.0, 4.0]))
    >>> float(value), float(params["w"])
    (5.0, -4.0)
  """

  count: int
  in_axes: PyTree = 0
  weight: Callable[..., ArrayLike] | None = None
  reduce: Literal["mean", "sum"] = "mean"
  aux: Literal["stack", "mean"] = "stack"
  accumulator_bits: int = 16

  def __post_init__(self):
    if isinstance(self.count, bool) or not (hasattr(self.count, "__index__") and self.count > 0):
      raise ValueError(f"Microbatches: count has to be a positive int, but it is {self.count!r}.")
    if self.weight is not None and not callable(self.weight):
      raise TypeError(f"Microbatches: weight has to be a function of the arguments of the loss, not {self.weight!r}.")
    if self.reduce not in ("mean", "sum"):
      raise ValueError(f"Microbatches: reduce has to be 'mean' or 'sum', but it is {self.reduce!r}.")
    if self.aux not in ("stack", "mean"):
      raise ValueError(f"Microbatches: aux has to be 'stack' or 'mean', but it is {self.aux!r}.")
    bits, widths = self.accumulator_bits, formats.widths(jnp.bfloat16)
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in widths:
      raise ValueError(
        f"Microbatches: accumulator_bits has to be one of {widths}, but it is {bits!r}. It counts the bits that the "
        "sum of gradients keeps beside bf16: 16 is an f32 sum, and 8 takes 3 bytes per parameter."
      )

  @classmethod
  def of(cls, given: "int | Microbatches") -> "Microbatches | None":
    """Returns `given`, or this number of microbatches; None for the number 1, which splits nothing."""
    made = given if isinstance(given, Microbatches) else cls(given)
    return made if made is given or made.count > 1 else None


class _Sums(NamedTuple):
  """State of the last microbatch's update: that of the transformation, and the sums of earlier gradients, by leaf."""

  inner_state: optax.OptState
  sums: dict[int, Sum]


class _Batch:
  """The arguments of the loss, split."""

  def __init__(self, how: Microbatches, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]):
    leaves, self._treedef = jax.tree.flatten((args, kwargs))
    axes = batches.spread(how.in_axes, args, f"{CALLER}: in_axes")
    of_args = jax.tree.leaves(args)
    if how.in_axes == 0:
      axes = [a if trees.is_array(x) and x.ndim else None for x, a in zip(of_args, axes, strict=True)]
    axes += [0 if trees.is_array(x) and x.ndim else None for x in leaves[len(of_args) :]]
    batches.check_size(leaves, axes, how.count, CALLER, how.in_axes)
    self._whole = leaves
    self.parts: list[jax.Array | None] = []
    for x, axis in zip(leaves, axes, strict=True):
      if axis is not None and trees.is_array(x):
        self.parts.append(batches.split(x, axis, how.count, interleaved=True))
      elif trees.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and not x.ndim:
        self.parts.append(jax.random.split(x, how.count))
      else:
        self.parts.append(None)

  def slices(self, index: Index | slice) -> Sequence[jax.Array | None]:
    """The parts of one microbatch, or with a slice those of several."""
    return [None if p is None else p[index] for p in self.parts]

  def arguments(self, part: Sequence[jax.Array | None]) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
    """The arguments of the loss for the parts of one microbatch."""
    return self._treedef.unflatten([x if p is None else p for x, p in zip(self._whole, part, strict=True)])


def step_by_microbatches(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformationExtraArgs,
  has_aux: bool,
  how: Microbatches,
  make: Callable[[optax.GradientTransformation], Callable[..., PyTree]],
  has_carry: bool = False,
) -> Callable[..., PyTree]:
  """Makes the step; `make(tx)` makes the step of the last microbatch.

  With `has_carry`, the first argument of the loss after the params is not split: each microbatch gets what the one
  before has made of it, as in `lax.scan`. Then `loss_fn` returns `(loss, (aux, carry))`, and `has_aux` is true.
  """

  def step(
    params: PyTree, opt_state: PyTree, *args: PyTree, tx_args: Mapping[str, PyTree] | None = None, **kwargs: PyTree
  ) -> tuple[PyTree, PyTree, PyTree]:
    pure = modules.pure(params)
    batches.refuse_overwritten(pure, CALLER)
    carry, args = (args[:1], args[1:]) if has_carry else ((), args)
    batch = _Batch(how, args, kwargs)
    factors = _factors(how, batch)
    extra = wrapping.extra_args(tx_args, CALLER)
    update = by_leaf.Update(tx, pure, modules.pure(opt_state), CALLER, extra=extra)
    trained = [i for i in range(len(update.names)) if update.needs_gradient(i)]
    first_args, first_kwargs = batch.arguments(batch.slices(0))
    traced = Traced(loss_fn, has_aux, update, params, opt_state, (*carry, *first_args), first_kwargs)
    scales = traced.lifted[len(_arrays((carry, first_args, first_kwargs))) :]
    sites = [_site(traced, i, how.accumulator_bits) for i in trained]

    def add(
      so_far: tuple[list[Sum], list[jax.Array]], part: tuple[Sequence[jax.Array | None], jax.Array]
    ) -> tuple[tuple[list[Sum], list[jax.Array]], list[jax.Array]]:
      (sums, carried), (slices, factor) = so_far, part
      inputs = [*traced.leaves, *carried, *_arrays(batch.arguments(slices)), *scales]
      results, sums, _ = differentiated_as(
        lambda given: _ordinary(traced, trained, how.accumulator_bits, given),
        lambda given: _released(traced, sites, given),
        (inputs, sums, traced.program.traced, factor),
      )
      return (sums, _carried_on(traced, carried, results)), results[: len(results) - len(carried)]

    # With a zero that XLA knows, the zeros of a gradient in the last backward pass would be this array, held till then.
    known = [x for x in traced.leaves if not host.is_on_host(x)][:1]
    zero = order.hidden(jnp.int32(0), order.first_elements(known))
    sums = [tuple(x + zero.astype(x.dtype) for x in _zero(traced.leaves[i], how.accumulator_bits)) for i in trained]
    before = batch.slices(slice(how.count - 1)), factors[:-1]
    (sums, carried), results = lax.scan(add, (sums, _arrays(carry)), before)
    loss = jnp.sum(results[0].astype(jnp.float32) * factors[:-1])

    # Without a barrier, XLA runs the last forward pass first, and keeps what its backward pass needs.
    sums, slices = order.barrier((sums, batch.slices(how.count - 1)))
    last_args, last_kwargs = batch.arguments(slices)
    last = make(_summed(tx, trained, how.accumulator_bits, own_value="value" not in (tx_args or {})))
    state = _Sums(opt_state, dict(zip(trained, sums, strict=True)))
    given = {**(tx_args or {}), _FACTOR: factors[-1], _LOSS: loss}
    values = iter(carried)
    carry = jax.tree.map(lambda x: next(values) if trees.is_array(x) else x, carry)
    out, params, new = last(params, state, *carry, *last_args, tx_args=given, **last_kwargs)
    value = out[0] if has_aux else out
    total = (loss + factors[-1] * value.astype(jnp.float32)).astype(value.dtype)
    if not has_aux:
      return total, params, new.inner_state
    _, aux = out
    _, earlier = traced.output([*results, *carried])
    if has_carry:
      (earlier, _), (aux, carry) = earlier, aux
    aux = jax.tree.map(lambda xs, x: _joined(how, xs, x, factors), earlier, aux)
    return (total, (aux, carry) if has_carry else aux), params, new.inner_state

  return step


def _arrays(tree: PyTree) -> list[jax.Array]:
  return [x for x in jax.tree.leaves(tree) if trees.is_array(x)]


def _carried_on(traced: Traced, carried: list[jax.Array], results: list[jax.Array]) -> list[jax.Array]:
  """What the next microbatch gets. Frozen weights come back as they are: `lax.scan` would carry a copy of them.

  Args:
    traced: the loss of one microbatch.
    carried: the arrays that this microbatch got.
    results: what its loss returned, new values of these last.
  """
  given = traced.program.inputs[len(traced.leaves) :][: len(carried)]
  first = len(results) - len(carried)
  made = zip(traced.results[first:], results[first:], strict=True)
  return [old if of == var else new for old, of, (var, new) in zip(carried, given, made, strict=True)]


def _factors(how: Microbatches, batch: _Batch) -> jax.Array:
  """What each loss and gradient is multiplied by, f32[count]."""
  weights = jnp.ones(how.count, jnp.float32)
  if how.weight is not None:
    weigh = how.weight

    def one(part: Sequence[jax.Array | None]) -> jax.Array:
      args, kwargs = batch.arguments(part)
      return jnp.asarray(weigh(*args, **kwargs), jnp.float32)

    weights = lax.map(one, batch.slices(slice(None)))
    if weights.ndim != 1:
      raise ValueError(
        f"{CALLER}: weight of Microbatches has to return a scalar, but it has shape {weights.shape[1:]}."
      )
  total = jnp.sum(weights)
  return weights / jnp.where(total == 0, 1, total) if how.reduce == "mean" else weights


def _wide(x: Shaped) -> DTypeLike:
  return jnp.promote_types(x.dtype, jnp.float32) if x.dtype not in types.LOW_DTYPES else jnp.float32


def _zero(leaf: jax.Array, bits: int) -> Sum:
  """The sum of no gradients of a leaf, as it is stored."""
  wide = _wide(leaf)
  if wide != jnp.float32 or bits == 16:
    return (jnp.zeros_like(leaf, dtype=wide),)
  low = jnp.zeros_like(leaf, dtype=jnp.bfloat16)
  return (low, jnp.zeros_like(leaf, dtype=codec.bits_dtype(bits))) if bits else (low,)


def _plus(total: Sum, gradient: jax.Array, factor: jax.Array) -> jax.Array:
  """A stored sum and one more gradient, f32[*s] or wider."""
  first = total[0]
  if formats.is_low(first):
    # What is made of sums alone would be made of all layers of a stack. XLA removes a selection between equals.
    parts = [jnp.where(gradient == 0, x, x) for x in total]
    first = formats.join(parts[0], parts[1] if len(parts) > 1 else None)
  return first + gradient.astype(first.dtype) * factor.astype(first.dtype)


def _added(total: Sum, gradient: jax.Array, factor: jax.Array, bits: int) -> Sum:
  """`_plus`, as it is stored."""
  new = _plus(total, gradient, factor)
  if not formats.is_low(total[0]):
    return (new,)
  low, kept = formats.split(xla_cpu.held(new, total[0]), jnp.bfloat16, bits)
  # Each is written by a loop of its own. Without a barrier, XLA:GPU keeps `new` for both, in f32.
  return tuple(order.barrier((low, kept))) if bits else (low,)


def _site(traced: Traced, leaf: int, bits: int) -> Site:
  """Adds the gradient of a leaf to its sum, which is the only state. The weight stays as it is."""

  def run(grads: Values, params: Values, states: Values, shared: Values) -> tuple[list[jax.Array], list[jax.Array]]:
    return [], list(_added(tuple(states), grads[0], shared[0], bits))

  grad = types.struct(traced.program.aval(traced.grads[leaf]))
  total = jax.eval_shape(lambda g: _zero(g.astype(_wide(traced.leaves[leaf])), bits), grad)
  step = Step(run, (grad,), (), tuple(map(types.struct, total)), (jax.ShapeDtypeStruct((), jnp.float32),))
  return Site((leaf,), (traced.grads[leaf],), (), step, reads=(traced.program.inputs[leaf],))


def _released(traced: Traced, sites: list[Site], given: _Operands) -> _Results:
  inputs, sums, constants, factor = given
  traced = traced.at(inputs, constants)
  store = stores.Parts(sites, [list(x) for x in sums])
  weights = traced.program.inputs[: len(traced.leaves)]
  shared = [[factor]] * len(sites)
  results = evaluate.run(traced.program, sites, inputs, traced.results, store, shared, weights=weights)
  return results, [tuple(values) for values in store.values], []


def _ordinary(traced: Traced, trained: list[int], bits: int, given: _Operands) -> _Results:
  inputs, sums, constants, factor = given
  out = jax_forms.call_source(traced.program.replaced(constants), *inputs)
  first = len(out) - len(traced.leaves)
  return out[:first], [_added(x, out[first + i], factor, bits) for i, x in zip(trained, sums, strict=True)], []


def _summed(
  tx: optax.GradientTransformationExtraArgs, trained: list[int], bits: int, own_value: bool
) -> optax.GradientTransformationExtraArgs:
  """Returns `tx` for the last microbatch: its gradients are added to the sums in the state.

  With `own_value`, the loss that it hands on is that of all microbatches.
  """

  def init(params: PyTree) -> _Sums:
    leaves = jax.tree.leaves(params)
    return _Sums(tx.init(params), {i: _zero(leaves[i], bits) for i in trained})

  def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
    factor, loss_before, value = (extra.pop(name) for name in (_FACTOR, _LOSS, "value"))
    leaves, treedef = jax.tree.flatten(updates)
    for i, total in state.sums.items():
      leaves[i] = _plus(total, leaves[i], factor)
    value = loss_before + factor * jnp.asarray(value, jnp.float32) if own_value else value
    total = treedef.unflatten(leaves)
    updates, inner = wrapping.update(tx, total, state.inner_state, params, {**extra, "value": value})
    return updates, _Sums(inner, state.sums)

  return optax.GradientTransformationExtraArgs(init, update)


def _joined(how: Microbatches, earlier: PyTree, last: PyTree, factors: jax.Array) -> PyTree:
  if not trees.is_array(last):
    return last
  every = jnp.concatenate([earlier, last[None]])
  if how.aux == "stack":
    return every
  if jnp.issubdtype(every.dtype, jax.dtypes.prng_key):
    return every
  if not jnp.issubdtype(every.dtype, jnp.inexact):
    return jnp.sum(every, axis=0)
  total = jnp.sum(factors)
  shares = factors / jnp.where(total == 0, 1, total)
  return jnp.tensordot(shares.astype(every.dtype), every, axes=1)
