"""On CPUs, a large gradient is transposed once, where it is written, and not in each loop that reads it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from benchmarks.models import language_model
from benchmarks.step_time import mlp
from optax_mpo._core import xla_cpu
from tests.helpers import ordinary_step

EXACT = {"xla_allow_excess_precision": False}
MODELS = {
  "mlp": lambda: mlp(512, 2, 64),
  "unrolled": lambda: language_model("125m", layers=2, width=256, heads=4, hidden=512, vocab=512, batch=1, scan=False),
  "scan": lambda: language_model("125m", layers=3, width=256, heads=4, hidden=512, vocab=512, batch=1),
}


def masters(model, tx):
  def step(params, state, batch):
    value, grads = jax.value_and_grad(lambda p: model.loss(mpo.cast(p), batch))(params)
    updates, state = tx.update(grads, state, params)
    return value, optax.apply_updates(params, updates), state

  return step


ROUTES = {
  "unfused": lambda model, tx: ordinary_step(model.loss, tx),
  "value_and_update": lambda model, tx: mpo.value_and_update(model.loss, tx),
  "fused_value_and_update": lambda model, tx: mpo.fused_value_and_update(model.fused_loss, tx),
}


def given(model):
  """Returns f32 weights and a batch."""
  keys = iter(jax.random.split(jax.random.key(0), 100))
  weights = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape) * 0.05, model.params)
  if model.batch.dtype == jnp.int32:
    return weights, jax.random.randint(next(keys), model.batch.shape, 0, 512)
  return weights, jax.random.normal(next(keys), model.batch.shape)


def turned_round(program) -> list[str]:
  """Finds the transposing copies in a program. They are copies of gradients."""
  return re.findall(r"\[512,512\]\{1,0\} copy\(", program.as_text() or "")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.few(1)
def test_loops_read_gradients_in_order(route, monkeypatch):
  model, tx = MODELS["mlp"](), mpo.compensated(optax.adamw(1e-2))
  weights, batch = given(model)

  def compiled():
    return jax.jit(ROUTES[route](model, tx)).lower(*mpo.init(tx, weights), batch).compile()

  assert len(turned_round(compiled())) == 2  # one for each gradient, where it is written
  monkeypatch.setattr(xla_cpu, "laid_out", lambda x: x)
  assert len(turned_round(compiled())) == 4  # one for each gradient and moment


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.few(1, full=3)
def test_large_models_equal_f32_masters(name, route):
  model, inner = MODELS[name](), optax.adamw(1e-2, weight_decay=0.1)
  weights, batch = given(model)
  tx = mpo.compensated(inner)
  one = jax.jit(masters(model, inner), compiler_options=EXACT)
  other = jax.jit(ROUTES[route](model, tx), compiler_options=EXACT)
  want, want_state = weights, inner.init(weights)
  got, state = mpo.init(tx, weights)
  for _ in range(3):
    want_value, want, want_state = one(want, want_state, batch)
    value, got, state = other(got, state, batch)
    assert float(value) == float(want_value)
  jax.tree.map(np.testing.assert_array_equal, mpo.master_params(got, state), want)
  jax.tree.map(np.testing.assert_array_equal, state.inner_state, want_state)


def test_derivatives_and_batches_pass_through():
  x = jnp.arange(2.0**17, dtype=jnp.float32).reshape(2, 256, 256)
  np.testing.assert_array_equal(jax.jit(jax.vmap(xla_cpu.laid_out, 0, 0))(x), x)
  np.testing.assert_array_equal(jax.jit(jax.vmap(xla_cpu.laid_out, 2, 2))(x), x)
  np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(xla_cpu.laid_out(x) ** 2)))(x), 2 * x)


def test_a_step_can_be_exported_and_kept():
  x = jnp.ones((512, 512))
  kept = jax.export.export(jax.jit(xla_cpu.laid_out), platforms=["cpu"])(x).serialize()
  np.testing.assert_array_equal(jax.export.deserialize(kept).call(x), x)
