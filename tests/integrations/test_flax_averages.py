"""Moving averages of the weights: of both Flax objects, in f32 and in bf16 with bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_mpo._transforms import average
from optax_mpo.flax import Optimizer
from tests.helpers import assert_same_bits, exact_jit, relaxed
from tests.integrations.test_flax_routes import Model, adam, inputs, linen_loss, make, nnx_loss


@pytest.mark.parametrize("bits", [16, 8])
def test_the_average_of_nnx(bits):
  model = Model()
  optimizer = Optimizer(model, adam(), ema_decay=0.9, ema_bits=bits, where=lambda path, leaf: leaf.ndim == 2)
  state = make(adam(), ema_decay=0.9, where=lambda path, leaf: leaf.ndim == 2)
  step = jax.jit(lambda s, x: s.step_with(relaxed(linen_loss), x)[0])
  nnx_step = nnx.jit(lambda m, o, x: o.step_with(m, relaxed(nnx_loss), x))
  for i in range(4):
    state = step(state, inputs(i))
    nnx_step(model, optimizer, inputs(i))
  averages, low = optimizer.averages(), nnx.as_pure(optimizer.ema)
  assert {k: x.dtype.name for k, x in low.values.items()} == {"w": "bfloat16", "b": "float32"}
  assert low.compensation["w"].dtype.itemsize == bits // 8
  if bits == 16:
    assert_same_bits(dict(averages), state.ema)
  else:
    assert {x.dtype.name for x in jax.tree.leaves(averages)} == {"float32"}
    np.testing.assert_allclose(averages["w"], state.ema["w"], rtol=4 * 2.0**-15)
    assert not np.array_equal(averages["w"], state.ema["w"])
    assert_same_bits(averages["b"], state.ema["b"])
  nnx.update(nnx.clone(model), averages)


def test_an_average_follows_steps_far_below_its_resolution():
  """Weights 1 % away, at a decay of 0.9999: each step is a fifteenth of what bf16 and 8 bits resolve."""
  params, count = {"w": jnp.ones(4096, jnp.bfloat16)}, 2000
  target = {"w": jnp.full(4096, 1.01)}
  start = average.start(params, {"w": jnp.ones(4096)}, 8)
  end = jax.jit(
    lambda a: jax.lax.fori_loop(0, count, lambda i, a: average.moved(a, target, 0.9999, 8, i.astype(jnp.int32)), a)
  )(start)
  got, want = np.asarray(average.joined(end)["w"], np.float64), 1.01 - 0.01 * 0.9999**count
  assert abs(got.mean() - want) < 5e-5  # rounded to nearest, it would still be 1, off by 2e-3
  assert np.abs(got - want).max() < 2e-3
  assert got.std() < 3e-4


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.few(1)
def test_the_average_of_linen(bits, dtype):
  """16 bits are the f32 average, and NNX has the same."""
  options = {"ema_decay": 0.9, "where": lambda path, leaf: leaf.ndim == 2}
  state, wide = make(adam(), ema_bits=bits, dtype=dtype, **options), make(adam(), dtype=dtype, **options)
  model = Model()
  optimizer = Optimizer(model, adam(), ema_bits=bits, **options)
  step = exact_jit(lambda s, x: s.step_with(relaxed(linen_loss), x)[0])
  for i in range(4):
    state, wide = step(state, inputs(i)), step(wide, inputs(i))
    if dtype == jnp.bfloat16:
      optimizer.step_with(model, relaxed(nnx_loss), inputs(i))
  assert_same_bits((state.params, state.opt_state), (wide.params, wide.opt_state))
  assert {k: x.dtype.name for k, x in state.ema.values.items()} == {"w": "bfloat16", "b": "float32"}
  assert state.ema.values["w"].nbytes + state.ema.compensation["w"].nbytes == (2 + bits // 8) * 12
  averages = state.averages()
  assert_same_bits(wide.averages(), wide.ema)  # without bits, an f32 tree as it was
  assert {x.dtype.name for x in jax.tree.leaves(averages)} == {"float32"}
  if bits == 16:
    assert_same_bits(averages, wide.ema)
  else:
    np.testing.assert_allclose(averages["w"], wide.ema["w"], rtol=4 * 2.0**-15)
    assert not np.array_equal(averages["w"], wide.ema["w"])
  if dtype == jnp.bfloat16:  # without jit, bf16 roundings of the loss may differ
    np.testing.assert_allclose(optimizer.averages()["w"], averages["w"], rtol=1e-2, atol=1e-3)


def test_an_f32_average_of_nnx():
  model = Model()
  optimizer = Optimizer(model, adam(), ema_decay=0.9, ema_bits=None)
  state = make(adam(), ema_decay=0.9)
  nnx.jit(lambda m, o, x: o.step_with(m, relaxed(nnx_loss), x))(model, optimizer, inputs())
  state = jax.jit(lambda s, x: s.step_with(relaxed(linen_loss), x)[0])(state, inputs())
  assert_same_bits(dict(optimizer.averages()), state.ema)
  assert sorted(nnx.as_pure(optimizer.ema)) == ["b", "w"]


def test_averages_that_there_are_not():
  with pytest.raises(ValueError, match=r"TrainState.averages: there is no average.*ema_decay"):
    make(adam()).averages()
  with pytest.raises(ValueError, match=r"TrainState.create: ema_bits has to be None, 8 or 16, but it is 4"):
    make(adam(), ema_decay=0.9, ema_bits=4)
  with pytest.raises(ValueError, match=r"no average.*ema_decay"):
    Optimizer(Model(), adam()).averages()
  with pytest.raises(ValueError, match="ema_bits has to be None, 8 or 16, but it is 4"):
    Optimizer(Model(), adam(), ema_decay=0.9, ema_bits=4)
