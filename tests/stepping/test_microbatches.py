"""Gradient accumulation with one accumulator: the bits of a loop that adds up gradients, and its losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_mpo as mpo
from optax_mpo._codecs import bf16
from tests.helpers import assert_same_bits, quick_jit
from tests.stepping.test_stack_scalars import with_others
from tests.stepping.test_stacks import D

K = 4


def accumulated(loss, tx, count=K, reduce="mean", weight=None, extra_args=None, bits=16):
  """The ordinary step: one backward pass for each microbatch, a sum in f32 or rounded to `bits`, one update."""

  def rounded(x):
    return bf16.join(*bf16.split(x, bits)) if bits < 16 else x

  def step(params, opt_state, x):
    parts = [x[k::count] for k in range(count)]
    weights = jnp.stack([jnp.float32(1 if weight is None else weight(p)) for p in parts])
    factors = weights / jnp.sum(weights) if reduce == "mean" else weights
    total, value = None, []
    for part, factor in zip(parts, factors, strict=True):
      one, grads = jax.value_and_grad(loss)(params, part)
      grads = jax.tree.map(lambda g, f=factor: g.astype(jnp.float32) * f, grads)
      total = grads if total is None else jax.tree.map(lambda t, g: rounded(t) + g, total, grads)
      value.append(one * factor)
    value = sum(value[1:-1], value[0]) + value[-1]
    updates, opt_state = tx.update(total, opt_state, params, **({} if extra_args is None else extra_args(value)))
    return value, mpo.apply_updates(params, updates), opt_state

  return step


def same(loss, params, tx, microbatches=K, steps=3, **options):
  one = quick_jit(accumulated(loss, tx, **options))
  other = quick_jit(mpo.value_and_update(loss, tx, microbatches=microbatches))
  params, state = mpo.init(tx, params)
  want, got = (None, params, state), (None, params, state)
  for i in range(steps):
    x = jax.random.normal(jax.random.key(100 + i), (2 * K, D))
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got[1:], want[1:])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)  # the order of the sum of losses
  return got


@pytest.mark.parametrize("way", ["first axis", "cut", "two levels"])
@pytest.mark.few(1)
def test_the_bits_of_a_loop_over_microbatches(way):
  loss, params = with_others(way)
  same(loss, params, mpo.compensated(optax.adamw(1e-2)), steps=30)


@pytest.mark.parametrize(
  "tx",
  [
    lambda: mpo.compensated(mpo.quantized_state(optax.adamw(1e-2)), extra_bits=8),
    lambda: mpo.compensated(optax.chain(mpo.record_norms(), mpo.clip_by_delayed_norm(0.01), optax.adamw(1e-2))),
    lambda: mpo.with_kernels(mpo.compensated(optax.sgd(0.1))),
  ],
  ids=["8-bit state", "norms", "kernels"],
)
@pytest.mark.few(1)
def test_with_other_transformations(tx):
  loss, params = with_others("first axis")
  same(loss, params, tx())


def test_sums_and_weights():
  loss, params = with_others("first axis")
  tx = mpo.compensated(optax.adamw(1e-2))
  same(loss, params, tx, mpo.Microbatches(K, reduce="sum"), reduce="sum")

  def tokens(x):
    return jnp.sum(x > 0)

  same(loss, params, tx, mpo.Microbatches(K, weight=tokens), weight=tokens)


@pytest.mark.parametrize("way", ["first axis", "cut", "two levels"])
@pytest.mark.parametrize("bits", [8, 4, 0, 16])
@pytest.mark.few(1, full=3)
def test_sums_in_low_precision(bits, way):
  loss, params = with_others(way)
  same(loss, params, mpo.compensated(optax.adamw(1e-2)), mpo.Microbatches(K, accumulator_bits=bits), bits=bits)


@pytest.mark.parametrize(
  "tx",
  [
    lambda: mpo.compensated(mpo.quantized_state(optax.adamw(1e-2)), extra_bits=8),
    lambda: mpo.with_kernels(mpo.compensated(optax.sgd(0.1))),
  ],
  ids=["8-bit state", "kernels"],
)
@pytest.mark.few(1)
def test_sums_in_low_precision_with_other_transformations(tx):
  loss, params = with_others("first axis")
  same(loss, params, tx(), mpo.Microbatches(K, accumulator_bits=8), bits=8)


def kept_gradients():
  """Keeps the gradients of the last step as its state, and changes no weight."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
  )


@pytest.mark.parametrize("bits", [8, 4, 0])
def test_sums_in_low_precision_are_near_those_in_f32(bits):
  """bf16 and its bits have 8 + bits significant bits, so each stored sum is off by at most 2^-(8 + bits) of itself.

  The error of the last sum is at most the total of these. 1.1 is for the magnitudes that are off themselves, by
  (1 + 2^-8)^15 = 1.06 without bits, and for the rounding of f32. The gradients are f32: sums of bf16 would seldom need
  more bits.
  """
  count = 16
  x = jax.random.normal(jax.random.key(0), (count, 4096))
  tx, params = kept_gradients(), {"w": jnp.ones(4096)}
  how = mpo.Microbatches(count, accumulator_bits=bits)
  step = quick_jit(mpo.value_and_update(lambda p, x: jnp.mean(x @ p["w"]), tx, microbatches=how))
  _, _, state = step(params, tx.init(params), x)
  each = np.asarray(x, np.float64) / count  # the gradients of microbatches, times their factor
  allowed = np.sum(np.abs(np.cumsum(each, 0))[:-1], axis=0) * 2.0 ** -(8 + bits)
  error = np.abs(np.asarray(state["w"], np.float64) - each.sum(0))
  assert np.all(error <= 1.1 * allowed)
  assert np.mean(error / allowed) > 0.01  # they are rounded at all


def test_sums_of_f32_and_infinite_gradients_in_low_precision():
  tx = kept_gradients()
  params = {"w": jnp.ones(2)}
  how = mpo.Microbatches(2, reduce="sum", accumulator_bits=8)
  step = mpo.value_and_update(lambda p, x: jnp.sum(x @ p["w"]), tx, microbatches=how)
  x = jnp.array([[1 + 2.0**-20, jnp.inf], [1.0, 1.0]])
  _, _, state = step(params, tx.init(params), x)
  assert state["w"].tolist() == [2.0, jnp.inf]


def test_the_loss_of_all_microbatches_is_handed_on():
  loss, params = with_others("first axis")
  plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, rtol=1.0)
  tx = mpo.compensated(optax.chain(optax.adamw(1e-2), plateau))
  _, _, state = same(loss, params, tx, extra_args=lambda value: {"value": value}, steps=4)
  assert state.inner_state[1].scale < 1


def test_clipping_by_the_norm_of_the_sum_takes_two_passes():
  loss, params = with_others("first axis")
  tx = mpo.compensated(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)))
  params, state = mpo.init(tx, params)
  x = jax.random.normal(jax.random.key(0), (2 * K, D))
  with pytest.raises(ValueError, match="two_pass=True"):
    mpo.value_and_update(loss, tx, microbatches=K)(params, state, x)
  got = quick_jit(mpo.value_and_update(loss, tx, microbatches=K, two_pass=True))(params, state, x)
  want = quick_jit(accumulated(loss, tx))(params, state, x)
  masters = [mpo.master_params(*result[1:]) for result in (got, want)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *masters)  # norms of stacks, by layers


def test_aux_keys_and_axes():
  def loss(params, x, key, scale):
    noise = jax.random.normal(key)
    return jnp.sum(params["w"].astype(x.dtype) * x) * scale, {
      "noise": noise,
      "count": x.shape[1],
      "kind": "aux",
      "n": jnp.int32(1),
    }

  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jnp.ones(())})
  x, key = jnp.arange(8.0).reshape(1, 8), jax.random.key(0)
  how = mpo.Microbatches(K, in_axes=(1, None, None))
  step = mpo.value_and_update(loss, tx, has_aux=True, microbatches=how)
  (value, aux), _, _ = step(params, state, x, key, 2.0)
  assert float(value) == 14.0  # the mean of four sums of two, doubled
  assert_same_bits(aux["noise"], jax.vmap(jax.random.normal)(jax.random.split(key, K)))
  assert aux["kind"] == "aux"
  averaged = mpo.value_and_update(
    loss, tx, has_aux=True, microbatches=mpo.Microbatches(K, in_axes=(1, None, None), aux="mean")
  )
  (_, mean), _, _ = averaged(params, state, x, key, 2.0)
  np.testing.assert_allclose(mean["noise"], jnp.mean(aux["noise"]), rtol=1e-6)
  assert int(mean["n"]) == K


def mean_of_squares(p, x, y):
  return jnp.mean((x @ p["w"] - y) ** 2)


def test_keyword_arguments_are_split_as_well():
  tx, params = optax.sgd(0.1), {"w": jnp.ones((2, 1))}
  x, y = jax.random.normal(jax.random.key(0), (4, 2)), jnp.ones((4, 1))
  step = mpo.value_and_update(mean_of_squares, tx, microbatches=4)
  assert_same_bits(step(params, tx.init(params), x, y=y), step(params, tx.init(params), x, y))


def test_one_microbatch_is_weighed_and_stacked_too():
  def loss(p, x):
    return jnp.mean(p["w"] * x), jnp.sum(x)

  tx, params = optax.sgd(1.0), {"w": jnp.ones(())}
  for count in (1, 2):
    how = mpo.Microbatches(count, weight=lambda x: 1.0 * x.size, reduce="sum")
    step = mpo.value_and_update(loss, tx, has_aux=True, microbatches=how)
    (value, aux), params_after, _ = step(params, tx.init(params), jnp.arange(4.0))
    assert (float(value), float(params_after["w"]), aux.shape) == (6.0, -5.0, (count,))


def test_extra_arguments_of_any_name_reach_the_transformation():
  def update(updates, state, params=None, *, factor=1.0, loss_before=0.0, **extra_args):
    return jax.tree.map(lambda u: -(factor + loss_before) * u, updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params = {"w": jnp.ones(2)}
  step = mpo.value_and_update(lambda p, x: jnp.mean(x @ p["w"]), tx, microbatches=2)
  _, params, _ = step(params, tx.init(params), jnp.ones((4, 2)), tx_args={"factor": 3.0, "loss_before": 1.0})
  assert_same_bits(params, {"w": jnp.full(2, -3.0)})


def test_a_batch_without_any_weight_changes_nothing():
  tx, params = optax.sgd(0.1), {"w": jnp.ones((2, 1))}
  how = mpo.Microbatches(2, weight=lambda x, y: jnp.sum(y > 1))
  step = mpo.value_and_update(mean_of_squares, tx, microbatches=how)
  value, new, _ = step(params, tx.init(params), jnp.ones((4, 2)), jnp.ones((4, 1)))
  assert float(value) == 0.0
  assert_same_bits(new, params)


def test_frozen_leaves_have_no_sum():
  loss, params = with_others("first axis")
  labels = {k: "frozen" if k in ("w", "last") else "trained" for k in params}
  tx = optax.multi_transform({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labels)
  same(loss, params, mpo.compensated(tx))


STORED = [
  (16, mpo.exact),
  (8, mpo.exact),
  (8, lambda tx: mpo.compensated(mpo.quantized_state(tx, min_size=1), extra_bits=8)),
]


@pytest.mark.parametrize(("bits", "stored"), STORED)
@pytest.mark.few(1)
def test_over_eight_devices(bits, stored):
  """Each microbatch spans all devices."""
  loss, params = with_others("first axis")
  tx = stored(optax.sgd(0.1, momentum=0.9))
  params, state = mpo.init(tx, params)
  x = jax.random.normal(jax.random.key(0), (8 * K, D))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  step = quick_jit(mpo.value_and_update(loss, tx, microbatches=mpo.Microbatches(K, accumulator_bits=bits)))
  want = step(params, state, x)
  with jax.set_mesh(mesh):
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    compiled = step.lower(params, state, split).compile()
    got = compiled(params, state, split)
  assert "all-gather" not in compiled.as_text()
  masters = [mpo.master_params(*result[1:]) for result in (got, want)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *masters)  # sums over devices, in bf16


@pytest.mark.parametrize(("bits", "stored"), STORED)
@pytest.mark.few(1)
def test_models_at_once(bits, stored):
  loss, params = with_others("first axis")
  tx = stored(optax.adamw(1e-2))
  models = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
  params, state = jax.vmap(lambda p: mpo.init(tx, p))(models)
  x = jax.random.normal(jax.random.key(0), (2 * K, D))
  one, other = (
    quick_jit(jax.vmap(s, (0, 0, None)))
    for s in (
      accumulated(loss, tx, bits=bits),
      mpo.value_and_update(loss, tx, microbatches=mpo.Microbatches(K, accumulator_bits=bits)),
    )
  )
  assert_same_bits(other(params, state, x)[1:], one(params, state, x)[1:])


@pytest.mark.parametrize("bits", [16, 8])
def test_a_step_has_its_derivative(bits):
  def loss(params, x):
    return jnp.mean((x @ params["w"]) ** 2)

  tx = optax.adam(0.1)
  params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
  x = jax.random.normal(jax.random.key(1), (2 * K, 4))

  def after(step, params):
    return jnp.sum(step(params, tx.init(params), x)[1]["w"] ** 2)

  want = jax.grad(functools.partial(after, accumulated(loss, tx, bits=bits)))(params)
  how = mpo.Microbatches(K, accumulator_bits=bits)
  got = jax.grad(functools.partial(after, mpo.value_and_update(loss, tx, microbatches=how)))(params)
  np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)  # cotangents are summed in another order


def test_explain_tells_of_the_last_microbatch_and_of_the_accumulator():
  loss, params = with_others("first axis")
  tx = mpo.compensated(optax.adam(1e-3))
  params, state = jax.eval_shape(functools.partial(mpo.init, tx), params)
  x = jax.ShapeDtypeStruct((2 * K, D), jnp.float32)
  one = mpo.explain(loss, tx, params, state, x)
  for how, size in ((K, 4), (mpo.Microbatches(K, accumulator_bits=8), 3)):
    told = mpo.explain(loss, tx, params, state, x, microbatches=how)
    assert told == one
    assert told.accumulator_bytes == size * sum(leaf.parameters for leaf in told)
    assert "held in an accumulator of" in str(told)
  assert not one.accumulator_bytes
  assert "accumulator" not in str(one)
  clipped = mpo.compensated(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)))
  state = jax.eval_shape(clipped.init, params)
  assert mpo.explain(loss, clipped, params, state, x, microbatches=K, two_pass=True).passes == 2
  with pytest.raises(ValueError, match="a batch of 8 does not split into 3 microbatches"):
    mpo.explain(loss, clipped, params, state, x, microbatches=3, two_pass=True)


def test_misuse_is_named():
  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jnp.ones(3)})

  def loss(p, x):
    return jnp.sum(p["w"].astype(x.dtype) * jnp.sum(x))

  with pytest.raises(ValueError, match="a batch of 6 does not split into 4 microbatches"):
    mpo.value_and_update(loss, tx, microbatches=4)(params, state, jnp.ones(6))
  with pytest.raises(ValueError, match="share one batch axis"):
    mpo.value_and_update(lambda p, x, y: loss(p, x), tx, microbatches=2)(params, state, jnp.ones(6), jnp.ones(4))
  with pytest.raises(ValueError, match="count has to be a positive int, but it is 0"):
    mpo.value_and_update(loss, tx, microbatches=0)
  with pytest.raises(ValueError, match="weight of Microbatches has to return a scalar"):
    mpo.value_and_update(loss, tx, microbatches=mpo.Microbatches(2, weight=lambda x: x))(params, state, jnp.ones(6))
  for axis in (5, "x", 1.0):
    with pytest.raises(ValueError, match="which is none of its axes"):
      mpo.value_and_update(loss, tx, microbatches=mpo.Microbatches(2, in_axes=axis))(params, state, jnp.ones(6))
  with pytest.raises(TypeError, match="weight has to be a function"):
    mpo.Microbatches(2, weight=3.0)
  for bits in (12, True, "8", 8.0, None):
    with pytest.raises(ValueError, match=r"accumulator_bits has to be one of \(0, 4, 8, 16\), but it is "):
      mpo.Microbatches(2, accumulator_bits=bits)
  for wrong in ({"reduce": "max"}, {"aux": "sum"}):
    with pytest.raises(ValueError, match="has to be"):
      mpo.Microbatches(2, **wrong)
