"""Train states for Linen and optimizers for NNX: the same results as the functions, for each value of `fused`."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mpo as mpo
from optax_mpo.flax import Optimizer, TrainState
from tests.helpers import assert_same_bits, quick_jit, relaxed

CLASSES, FEATURES = 3, 8

# AdamW makes a full step from a gradient that is zero except for rounding (a bias before BatchNorm), and fused loops
# round in another order.


def batch(i):
  rng = np.random.default_rng(i)
  return jnp.asarray(rng.normal(size=(16, FEATURES)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, 16))


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def make_tx():
  return mpo.compensated(optax.adamw(1e-2))


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(16)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(CLASSES)(x)


def linen_state(**options):
  model = Classifier()
  variables = model.init(jax.random.key(0), batch(0)[0], train=False)
  rest = {k: v for k, v in variables.items() if k != "params"}
  return TrainState.create(apply_fn=model.apply, params=variables["params"], tx=make_tx(), variables=rest, **options)


def linen_loss(variables, batch, key):
  x, labels = batch
  logits, updates = Classifier().apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
  return cross_entropy(logits, labels), (logits, updates)


def linen_steps(state, count=5):
  @quick_jit
  def step(state, batch):
    key = jax.random.fold_in(jax.random.key(1), state.step)
    return state.step_with(linen_loss, batch, key, has_aux=True, mutable=True)

  values = []
  for i in range(count):
    state, value = step(state, batch(i))
    values.append(value)
  return state, values


def test_linen_with_batch_statistics_dropout_and_aux():
  got, values = linen_steps(linen_state())
  want, unfused = linen_steps(linen_state(fused="off"))
  assert_same_bits((got.params, got.opt_state, values), (want.params, want.opt_state, unfused))
  # The step with gradient release is another program, in which XLA may sum a mean in another order.
  for a, b in zip(jax.tree.leaves(got.variables), jax.tree.leaves(want.variables), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  start = linen_state()
  assert int(got.step) == 5
  assert got.params["Dense_0"]["kernel"].dtype == jnp.bfloat16
  assert not np.array_equal(
    got.variables["batch_stats"]["BatchNorm_0"]["mean"], start.variables["batch_stats"]["BatchNorm_0"]["mean"]
  )
  logits = got.apply_fn({"params": got.masters(), **got.variables}, batch(0)[0], train=False)
  assert logits.shape == (16, CLASSES)


def test_float8_params_are_decoded_for_the_model():
  got, values = linen_steps(linen_state(dtype=jnp.float8_e4m3fn), 2)
  want, unfused = linen_steps(linen_state(dtype=jnp.float8_e4m3fn, fused="off"), 2)
  assert_same_bits((got.params, got.opt_state, values), (want.params, want.opt_state, unfused))
  assert got.params["Dense_0"]["kernel"].dtype == jnp.float8_e4m3fn
  logits = got.apply_fn({"params": got.decoded(), **got.variables}, batch(0)[0], train=False)
  exact = got.apply_fn({"params": got.masters(), **got.variables}, batch(0)[0], train=False)
  np.testing.assert_allclose(logits, exact, atol=0.3)  # 4 significand bits
  assert_same_bits(linen_state().decoded(), linen_state().params)


def test_an_nnx_model_cannot_hold_float8():
  model = NNXClassifier(nnx.Rngs(0))
  before = nnx.as_pure(nnx.state(model))
  with pytest.raises(ValueError, match="Optimizer: with dtype=float8_e4m3fn the model would hold codes"):
    Optimizer(model, make_tx(), dtype=jnp.float8_e4m3fn)
  assert jax.tree.map(lambda x: x.dtype, before) == jax.tree.map(lambda x: x.dtype, nnx.as_pure(nnx.state(model)))


@pytest.mark.full
def test_ema_is_of_the_masters_in_f32():
  state, _ = linen_steps(linen_state(ema_decay=0.9), 3)
  want, _ = linen_steps(linen_state(), 3)
  assert_same_bits(state.params, want.params)
  averages = jax.tree.map(jnp.asarray, linen_state().masters())
  one = linen_state()
  for i in range(3):
    one, _ = quick_jit(
      lambda s, b: s.step_with(linen_loss, b, jax.random.fold_in(jax.random.key(1), s.step), has_aux=True, mutable=True)
    )(one, batch(i))
    averages = jax.tree.map(lambda a, m: 0.9 * a + 0.1 * m, averages, one.masters())
  for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(averages), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # it has one product fewer than the average above


def layer_loss(variables, batch):
  x, labels = batch
  p = variables["params"]
  x = mpo.fused_layer(nn.Dense(16))(p["Dense_0"], x.astype(jnp.bfloat16))
  return cross_entropy(mpo.fused_layer(nn.Dense(CLASSES))(p["Dense_1"], nn.relu(x)), labels)


@pytest.mark.parametrize("fused", ["auto", "layer", "off"])
@pytest.mark.few(1)
def test_three_ways_one_result(fused):
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.relu(nn.Dense(16)(x))
      return nn.Dense(CLASSES)(x)

  params = Plain().init(jax.random.key(0), batch(0)[0])["params"]
  state = TrainState.create(apply_fn=Plain().apply, params=params, tx=make_tx(), fused=fused)
  step = quick_jit(lambda state, batch: state.step_with(layer_loss, batch))
  tx = make_tx()
  low, opt_state = mpo.init(tx, params)

  @quick_jit
  def plain(low, opt_state, batch):
    value, grads = jax.value_and_grad(lambda p: layer_loss({"params": p}, batch))(low)
    updates, opt_state = tx.update(grads, opt_state, low)
    return value, mpo.apply_updates(low, updates), opt_state

  for i in range(3):
    state, value = step(state, batch(i))
    want, low, opt_state = plain(low, opt_state, batch(i))
    assert_same_bits((value, state.params, state.opt_state), (want, low, opt_state))


def test_collections_that_the_state_does_not_have():
  model = Classifier()
  variables = model.init(jax.random.key(0), batch(0)[0], train=False)
  state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=make_tx())

  def loss(v, batch):
    return linen_loss({**v, "batch_stats": variables["batch_stats"]}, batch, jax.random.key(0))

  with pytest.raises(ValueError, match=r"returns the collections \['batch_stats'\], and the state has \[\]"):
    state.step_with(loss, batch(0), has_aux=True, mutable=True)


class NNXClassifier(nnx.Module):
  def __init__(self, rngs):
    self.first, self.last = nnx.Linear(FEATURES, 16, rngs=rngs), nnx.Linear(16, CLASSES, rngs=rngs)
    self.norm, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@relaxed
def nnx_loss(model, batch):
  x, labels = batch
  logits = model(x)
  return cross_entropy(logits, labels), logits


def nnx_steps(fused, count=5):
  model = NNXClassifier(nnx.Rngs(0))
  optimizer = Optimizer(model, make_tx(), fused=fused)

  @nnx.jit
  def step(model, optimizer, batch):
    return optimizer.step_with(model, nnx_loss, batch, has_aux=True)

  return model, optimizer, [step(model, optimizer, batch(i)) for i in range(count)]


def test_nnx_with_batch_statistics_and_dropout():
  model, optimizer, values = nnx_steps("auto")
  want_model, want_optimizer, want_values = nnx_steps("off")
  assert int(optimizer.step.get_value()) == 5
  assert model.first.kernel.get_value().dtype == jnp.bfloat16
  assert_same_bits(nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(nnx.state(want_model, nnx.Param)))
  assert_same_bits(nnx.as_pure(optimizer.opt_state), nnx.as_pure(want_optimizer.opt_state))
  assert_same_bits(values, want_values)
  start = NNXClassifier(nnx.Rngs(0))
  assert not np.array_equal(model.norm.mean.get_value(), start.norm.mean.get_value())
  assert int(model.dropout.rngs.count.get_value()) == int(start.dropout.rngs.count.get_value()) + 5
  masters = optimizer.masters(model)
  assert {x.dtype.name for x in jax.tree.leaves(masters)} == {"float32"}


def test_nnx_fused_layers_get_handles():
  class Plain(nnx.Module):
    def __init__(self, rngs):
      self.first, self.last = nnx.Linear(FEATURES, 16, rngs=rngs), nnx.Linear(16, CLASSES, rngs=rngs)

  def loss(handles, batch):
    model = Plain(nnx.Rngs(0))
    x = mpo.fused_layer(model.first)(handles["first"], batch[0].astype(jnp.bfloat16))
    return cross_entropy(mpo.fused_layer(model.last)(handles["last"], nnx.relu(x)), batch[1])

  losses = {}
  for fused in ("layer", "auto"):
    model = Plain(nnx.Rngs(0))
    optimizer = Optimizer(model, make_tx(), fused=fused)

    def of_model(model, batch):
      return cross_entropy(model.last(nnx.relu(model.first(batch[0].astype(jnp.bfloat16)))), batch[1])

    chosen = loss if fused == "layer" else of_model
    step = nnx.jit(lambda model, optimizer, batch, chosen=chosen: optimizer.step_with(model, chosen, batch))
    losses[fused] = [float(step(model, optimizer, batch(i))) for i in range(3)]
  np.testing.assert_allclose(losses["layer"], losses["auto"], rtol=1e-2)  # XLA may leave out other bf16 roundings


class Changing(nnx.Module):
  """A model whose forward pass changes more than values: `change` adds and removes variables and modules."""

  def __init__(self, change=lambda model, x: None):
    self.linear, self.rngs = nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0)), nnx.Rngs(1)
    self.removed, self.calls, self.change = nnx.BatchStat(jnp.zeros(2)), 0, change

  def __call__(self, x):
    self.calls += 1
    self.change(self, x)
    return self.linear(x)


def sow(model, x):
  model.sow(nnx.Intermediate, "sown", x)


def make_variable(model, x):
  model.made = nnx.Cache({"mean": x.mean(), "pair": (x.min(), x.max())})


def make_module(model, x):
  model.made = nnx.BatchNorm(FEATURES, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
  model.again = model.made
  model.made(x)


def remove_variable(model, x):
  if hasattr(model, "removed"):
    del model.removed


def draw(model, rngs):
  jax.random.normal(rngs(), (2,))


def average(model, inputs):
  inputs["metric"].update(values=jnp.float32(3))


def count(model, variable):
  variable.set_value(variable.get_value() + 1)


# What the forward pass does to the model; what loss_fn does to a further argument, and that argument.
CHANGES = {
  "sow": (sow, None, lambda model: ()),
  "a new variable": (make_variable, None, lambda model: ()),
  "a new module, twice": (make_module, None, lambda model: ()),
  "a variable removed": (remove_variable, None, lambda model: ()),
  "streams": (sow, draw, lambda model: (nnx.Rngs(2).fork(),)),
  "a metric in a dict with other things": (
    *(sow, average),
    lambda model: ({"metric": nnx.metrics.Average(), "name": "text", "fn": jnp.tanh, "none": None, "x": jnp.ones(2)},),
  ),
  "a variable": (sow, count, lambda model: (nnx.Variable(jnp.zeros([])),)),
  "another model": (sow, lambda model, other: other(jnp.ones((1, FEATURES))), lambda model: (Changing(make_variable),)),
}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow..' outside:DeprecationWarning")
@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.few(8)
def test_nnx_objects_change_as_with_value_and_grad(name, fused):
  change, use, make_args = CHANGES[name]

  @relaxed
  def loss(model, batch, *args):
    for arg in args:
      use(model, arg)
    return cross_entropy(model(batch[0]), batch[1])

  def run(step):
    model = Changing(change)
    optimizer, args = Optimizer(model, make_tx(), fused=fused), make_args(model)
    values = [step(optimizer, model, loss, batch(i), *args) for i in range(2)]
    graph, params, rest = nnx.split((model, args), lambda path, x: path[:2] == (0, "linear"), ...)
    return params, (graph, nnx.as_pure(rest), values[0])

  params, got = run(lambda optimizer, *given: optimizer.step_with(*given))
  old_params, want = run(lambda optimizer, model, loss, *args: nnx.value_and_grad(loss)(model, *args)[0])
  assert got[0] == want[0]
  assert_same_bits(got[1:], want[1:])
  assert not np.array_equal(jax.tree.leaves(params)[1], jax.tree.leaves(old_params)[1])


@pytest.mark.filterwarnings("ignore:Using 'Module.sow..' outside:DeprecationWarning")
@pytest.mark.parametrize("fused", ["auto", "layer", "off"])
def test_nnx_objects_change_under_jit(fused):
  @relaxed
  def loss(model, batch, rngs, metric):
    x = (batch[0] + jax.random.normal(rngs(), batch[0].shape)).astype(jnp.bfloat16)
    logits = mpo.fused_layer(linear)(model["linear"], x) if fused == "layer" else model(x)
    value = cross_entropy(logits, batch[1])
    metric.update(values=value)
    return value

  @nnx.jit
  def step(model, optimizer, batch, rngs, metric):
    return optimizer.step_with(model, loss, batch, rngs, metric)

  model, rngs, metric = Changing(sow), nnx.Rngs(2), nnx.metrics.Average()
  linear, optimizer = nnx.clone(model.linear), Optimizer(model, make_tx(), fused=fused)
  values = []
  for i in range(3):
    values.append(step(model, optimizer, batch(i), rngs, metric))
    sown = jax.tree.leaves(nnx.pop(model, nnx.Intermediate))
    assert [x.shape for x in sown] == ([] if fused == "layer" else [(16, FEATURES)])
  assert int(rngs.default.count.get_value()) == 3
  assert values[0] != values[1]
  np.testing.assert_allclose(relaxed(metric.compute)(), np.mean(values), rtol=1e-6)


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_an_object_that_the_model_and_an_argument_share_stays_one(fused):
  @relaxed
  def loss(model, batch, rngs):
    assert rngs is model.rngs
    draw(model, rngs)
    draw(model, model.rngs)
    return cross_entropy(model(batch[0]), batch[1])

  model = Changing()
  Optimizer(model, make_tx(), fused=fused).step_with(model, loss, batch(0), model.rngs)
  assert int(model.rngs.default.count.get_value()) == 2


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_trained_variables_that_the_forward_pass_makes_are_named(fused):
  def change(model, x):
    model.late = nnx.Param(jnp.ones(3))

  model = Changing(change)
  optimizer = Optimizer(model, make_tx(), fused=fused)
  with pytest.raises(ValueError, match=r"step_with: .* it has params\['late'\], .*before the Optimizer"):
    optimizer.step_with(model, relaxed(lambda model, batch: cross_entropy(model(batch[0]), batch[1])), batch(0))


@pytest.mark.parametrize(
  "make", [lambda **o: linen_state(**o), lambda **o: Optimizer(NNXClassifier(nnx.Rngs(0)), make_tx(), **o)]
)
def test_modes_that_there_are_not(make):
  with pytest.raises(ValueError, match="fused has to be None, 'auto', 'layer' or 'off', but it is 'on'"):
    make(fused="on")


def test_importing_the_package_imports_neither_flax_nor_orbax():
  code = "import sys, optax_mpo; assert not {'flax', 'orbax'} & set(sys.modules); optax_mpo.flax.TrainState"
  subprocess.run([sys.executable, "-c", code], check=True)
