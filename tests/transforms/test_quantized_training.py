"""Training with 8-bit and 4-bit state against training with f32 state: losses, bad gradients, decay."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from tests.transforms.test_quantized import SMALL, stored, train


@pytest.mark.parametrize(
  "optimizer",
  {
    "adamw": lambda: optax.adamw(3e-3),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "lion": lambda: optax.lion(3e-4),
    "adagrad": lambda: optax.adagrad(3e-2),
    "multi_steps": lambda: optax.MultiSteps(optax.adamw(3e-3), 2),
    "chain": lambda: optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-3, 300), mu_dtype=jnp.bfloat16)
    ),
  }.values(),
)
@pytest.mark.few(1)
def test_training_is_that_with_f32_state(optimizer):
  want, _, _ = train(mpo.compensated(optimizer(), extra_bits=16), 300)
  got, _, state = train(mpo.compensated(SMALL(optimizer()), extra_bits=8), 300)
  assert stored(state)
  assert np.mean(want[-50:]) < 0.75 * np.mean(want[:10])
  assert np.mean(got[-50:]) == pytest.approx(np.mean(want[-50:]), rel=0.05)


def test_four_bits_train_too():
  want, _, _ = train(mpo.compensated(optax.adamw(3e-3), extra_bits=16), 300)
  got, _, state = train(mpo.compensated(SMALL(optax.adamw(3e-3), state_bits=4), extra_bits=8), 300)
  assert {q.values.dtype.name for q in stored(state).values()} == {"int4", "uint4"}
  assert np.mean(got[-50:]) == pytest.approx(np.mean(want[-50:]), rel=0.25)


def test_one_bad_gradient_passes():
  """A gradient that is not finite leaves its block's moments unchanged, and training continues."""
  tx = mpo.compensated(SMALL(optax.adamw(3e-3)), extra_bits=8)
  _, params, state = train(tx, 20)
  grads = jax.tree.map(jnp.ones_like, params)
  grads["a"] = grads["a"].at[0, 0].set(jnp.nan).at[5, 5].set(jnp.inf)
  _, bad = tx.update(grads, state, params)
  chex.assert_tree_all_finite(mpo.dequantized(bad))
  moved, kept = (mpo.dequantized(s).inner_state.inner_state[0].mu["a"] for s in (bad, state))
  assert float(jnp.abs(moved[0, 0] - kept[0, 0])) < 0.02
  values, _, _ = train(tx, 100, (params, bad), start=20)
  assert values[-1] < values[0]


def test_state_decays_without_gradients():
  tx = SMALL(optax.adam(0.0, b1=0.9, b2=0.999))
  params = {"w": jnp.zeros((4, 70))}
  _, state = tx.update({"w": jax.random.normal(jax.random.key(0), (4, 70))}, tx.init(params), params)
  start = mpo.dequantized(state).inner_state[0]
  step = jax.jit(lambda s: tx.update({"w": jnp.zeros((4, 70))}, s, params)[1])
  for _ in range(1000):
    state = step(state)
  end = mpo.dequantized(state).inner_state[0]
  np.testing.assert_allclose(end.nu["w"], start.nu["w"] * 0.999**1000, rtol=0.03)
  assert float(jnp.abs(end.mu["w"]).max()) < 1e-37
