"""compensated around params that are all f32 saves nothing. It warns if that is an accident, and only then."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optax_mpo as mpo
from optax_mpo.flax import Optimizer, TrainState

PARAMS = {"w": jnp.full((8, 8), 0.1), "b": jnp.zeros(8)}


def make_tx():
  return mpo.compensated(optax.adam(1e-2))


def f32(path, leaf):
  return False


def flax_train_state():
  model = nn.Dense(8, dtype=jnp.bfloat16)
  params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
  return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=make_tx())


ACCIDENTS = {
  "tx.init": lambda: make_tx().init(PARAMS),
  "chain": lambda: optax.chain(optax.clip(1.0), make_tx()).init(PARAMS),
  "loss_scaled": lambda: mpo.loss_scaled(make_tx()).init(PARAMS),
  "MultiSteps": lambda: optax.MultiSteps(make_tx(), 2).init(PARAMS),
  "jit": lambda: jax.jit(make_tx().init)(PARAMS),
  "Flax's TrainState": flax_train_state,
  "nnx.Optimizer": lambda: nnx.Optimizer(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), make_tx(), wrt=nnx.Param),
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_f32_params_by_accident(name):
  with pytest.warns(UserWarning, match=r"compensated saves no memory.*optax_mpo\.init\(tx, params\)") as found:
    ACCIDENTS[name]()
  assert len(found) == 1


def parts(tx):
  return optax.multi_transform({"low": make_tx(), "f32": tx}, {"w": "low", "b": "f32"})


def steps_in_f32(step):
  """Makes a step with params that are f32 on purpose. It calls `tx.init` for the structure of the state."""
  params, state = mpo.init(make_tx(), PARAMS, where=f32)
  loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"][None]) ** 2)  # noqa: E731
  return step(loss, make_tx(), params, state)


CHOICES = {
  "mpo.init, as the warning recommends": lambda: mpo.init(make_tx(), PARAMS),
  "f32, as the warning recommends": lambda: mpo.init(make_tx(), PARAMS, where=f32),
  "TrainState, as the warning recommends": lambda: TrainState.create(apply_fn=None, params=PARAMS, tx=make_tx()),
  "Optimizer, as the warning recommends": lambda: Optimizer(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), make_tx()),
  "tx.init of low params": lambda: make_tx().init(mpo.cast(PARAMS)),
  "tx.init of some": lambda: make_tx().init(mpo.cast(PARAMS, where=lambda path, leaf: leaf.ndim > 1)),
  "tx.init of none": lambda: make_tx().init({}),
  "parts": lambda: parts(make_tx()).init(mpo.cast(PARAMS, where=lambda path, leaf: leaf.ndim > 1)),
  "masked": lambda: optax.masked(make_tx(), {"w": True, "b": False}).init(PARAMS),
  "convert": lambda: mpo.convert(make_tx(), PARAMS, optax.adam(1e-2).init(PARAMS)),
  "convert to f32": lambda: mpo.convert(optax.adam(1e-2), *mpo.init(make_tx(), PARAMS, where=f32)),
  "convert f32": lambda: mpo.convert(make_tx(), *mpo.init(make_tx(), PARAMS, where=f32), where=f32),
  "shapes": lambda: jax.eval_shape(lambda p: mpo.init(make_tx(), p, where=f32), PARAMS),
  "value_and_update": lambda: steps_in_f32(
    lambda loss, tx, p, s: jax.jit(mpo.value_and_update(loss, tx))(p, s, jnp.ones((2, 8)))
  ),
  "fused_value_and_update": lambda: mpo.fused_value_and_update(
    lambda p, x: jnp.mean(mpo.fused_layer(lambda p, x: x @ p["w"] + p["b"][None])(p, x)), make_tx()
  )(*mpo.init(make_tx(), PARAMS, where=f32), jnp.ones((2, 8))),
  "explain": lambda: steps_in_f32(lambda loss, tx, p, s: mpo.explain(loss, tx, p, s, jnp.ones((2, 8)))),
  "8-bit state around": lambda: (tx := mpo.quantized_state(make_tx(), min_size=1)).update(
    PARAMS, mpo.init(tx, PARAMS, where=f32)[1], PARAMS
  ),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.few(2, full=7)
def test_f32_params_by_choice(name):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    CHOICES[name]()
