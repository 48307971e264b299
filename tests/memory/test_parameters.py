"""Which arrays gpu_memory counts as parameters, and steps jitted by NNX."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optax_mpo as mpo
from optax_mpo._memory import parameters
from optax_mpo.flax import Optimizer, TrainState

COUNT = 8 * 4 + 4
X = jnp.ones((2, 8))


def params():
  return {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}


def tx():
  return mpo.loss_scaled(mpo.compensated(mpo.quantized_state(optax.adamw(1e-2), min_size=1)))


class Run(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any


class Layer(NamedTuple):
  kernel: jax.Array
  bias: jax.Array


class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear, self.again = (layer := nnx.Linear(8, 4, rngs=rngs)), layer
    self.norm = nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)


def ours(**options):
  return TrainState.create(
    apply_fn=nn.Dense(4).apply, params=params(), tx=mpo.compensated(optax.adamw(1e-2)), ema_decay=0.9, **options
  )


def nnx_run():
  model = Net(nnx.Rngs(0))
  return model, Optimizer(model, mpo.compensated(optax.adamw(1e-2)))


TREES = {
  "params": params,
  "a named tuple": lambda: Layer(**params()),
  "a list": lambda: list(params().values()),
  "bf16": lambda: mpo.cast(params()),
  "Linen's variables": lambda: {"params": params(), "batch_stats": {"mean": jnp.zeros(4)}},
  "a pair with state": lambda: mpo.init(tx(), params()),
  "a pair with chained state": lambda: (params(), optax.chain(optax.clip(1.0), optax.adamw(1e-2)).init(params())),
  "a pair with accumulated gradients": lambda: (
    params(),
    optax.MultiSteps(optax.partition({"a": optax.adam(1e-2)}, lambda p: jax.tree.map(lambda _: "a", p)), 2).init(
      params()
    ),
  ),
  "a dict of a run": lambda: {"weights": params(), "state": optax.adam(1e-2).init(params()), "key": jax.random.key(0)},
  "a counter": lambda: (params(), jnp.zeros([], jnp.int32)),
  "a named tuple of a run": lambda: Run(jnp.zeros([], jnp.int32), params(), optax.adam(1e-2).init(params())),
  "TrainState": ours,
  "TrainState with variables": lambda: ours(variables={"batch_stats": jnp.zeros(3)}),
  "Flax's TrainState": lambda: train_state.TrainState.create(
    apply_fn=nn.Dense(4).apply, params=params(), tx=optax.adam(1e-2)
  ),
  "a module": lambda: Net(nnx.Rngs(0)),
  "a module and its optimizer": nnx_run,
  "Flax's optimizer beside": lambda: (m := Net(nnx.Rngs(0)), nnx.Optimizer(m, optax.adam(1e-2), wrt=nnx.Param)),
  "nnx.State": lambda: nnx.state(nnx_run()),
}


@pytest.mark.parametrize("shapes", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_parameters_are_params(name, shapes):
  tree = TREES[name]()
  if shapes:
    tree = nnx.eval_shape(lambda: tree)
  assert parameters.size(parameters.of(tree)) == COUNT


def test_the_report_of_a_train_state_counts_its_params():
  state = ours()

  def loss(variables, x):
    return jnp.mean(state.apply_fn(variables, x.astype(jnp.bfloat16)).astype(jnp.float32) ** 2)

  step = jax.jit(lambda state, x: state.step_with(loss, x), donate_argnums=0)
  report = mpo.gpu_memory(step, state, X, params_argnum=0)
  assert report.parameter_count == COUNT
  assert report.per_parameter(report.argument_bytes) >= 16  # 2 + 2, two moments and an average


def test_the_caller_names_the_tree():
  weights = {"layers": params(), "ema": params()}

  def step(run, x):
    return jax.tree.map(lambda w: w * x.sum(), run)

  report = mpo.gpu_memory(step, weights, X, params=lambda run, x: run["layers"])
  assert report.parameter_count == COUNT
  assert mpo.gpu_memory(step, weights, X, params=weights["layers"]).parameter_count == COUNT
  assert mpo.gpu_memory(step, weights, X, params_argnum=0).parameter_count == 2 * COUNT
  model = Net(nnx.Rngs(0))
  report = mpo.gpu_memory(nnx.jit(lambda model, x: model.linear(x)), model, X, params=model.linear)
  assert report.parameter_count == COUNT


def test_what_cannot_be_told_is_asked_for():
  class State(NamedTuple):
    weights: Any
    momentum: Any

  run = State(params(), params())

  def step(run):
    return jax.tree.map(lambda w: 2 * w, run)

  with pytest.raises(
    ValueError, match=r"argument 0, .* has no arrays in it that are known for parameters.*params=\.\.\."
  ):
    mpo.gpu_memory(step, run, params_argnum=0)
  assert mpo.gpu_memory(step, run, params=lambda run: run.weights).parameter_count == COUNT
  with pytest.raises(ValueError, match="both say what the parameters are"):
    mpo.gpu_memory(step, run, params_argnum=0, params=run.weights)
  with pytest.raises(ValueError, match="what params names has no arrays"):
    mpo.gpu_memory(step, run, params={})


@pytest.mark.parametrize("donated", [False, True])
def test_a_step_that_nnx_jitted(donated):
  model = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
  optimizer = Optimizer(model, mpo.compensated(optax.adam(1e-2)))
  x = jnp.ones((2, 256), jnp.bfloat16)

  def step(model, optimizer, x):
    return optimizer.step_with(model, lambda m, x: jnp.mean(m(x).astype(jnp.float32) ** 2), x)

  report = mpo.gpu_memory(nnx.jit(step, donate_argnums=(0, 1) if donated else ()), model, optimizer, x, params_argnum=0)
  assert report.parameter_count == 256 * 256 + 256
  assert 12 <= report.per_parameter(report.argument_bytes) < 12.1
  assert (report.aliased_bytes > 0) == donated
  assert report.bytes_per_parameter < (14.5 if donated else 27)
  assert model.kernel.get_value().dtype == jnp.bfloat16  # nothing ran
  assert int(optimizer.step.get_value()) == 0


def test_variables_that_are_shared_stay_one():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
      self.b = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
      self.b.kernel = self.a.kernel

  @nnx.jit
  def forward(model, x):
    return model.b(model.a(x))

  report = mpo.gpu_memory(forward, Tied(nnx.Rngs(0)), jnp.ones((1, 64)), params_argnum=0)
  assert report.parameter_count == 64 * 64
  assert report.argument_bytes < 1.1 * 4 * 64 * 64
