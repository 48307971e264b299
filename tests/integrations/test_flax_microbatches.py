"""Microbatches of the Flax objects equal a loop that adds up gradients in f32, and change other state in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mpo as mpo
from optax_mpo._program import jax_forms
from optax_mpo.flax import Optimizer, TrainState
from tests.helpers import assert_same_bits, quick_jit, relaxed
from tests.integrations.test_flax import Changing, NNXClassifier, batch, cross_entropy, linen_loss, linen_state, sow

K = 4


def make_tx():
  return mpo.compensated(optax.adamw(1e-2))


def clipped():
  return mpo.compensated(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)))


def parts(tree):
  return [jax.tree.map(lambda x, k=k: x[k::K], tree) for k in range(K)]


def updated(tx, sums, params, opt_state):
  updates, opt_state = tx.update(sums, opt_state, params)
  return mpo.apply_updates(params, updates), opt_state


def added(sums, grads):
  grads = jax.tree.map(lambda g: g.astype(jnp.float32) * jnp.float32(1 / K), grads)
  return grads if sums is None else jax.tree.map(jnp.add, sums, grads)


def linen_loop(tx):
  def step(params, opt_state, variables, batch, key):
    sums, values = None, []
    for part, one in zip(parts(batch), jax.random.split(key, K), strict=True):
      (loss, (logits, variables)), grads = jax.value_and_grad(
        lambda p, v=variables, part=part, one=one: linen_loss({"params": p, **v}, part, one), has_aux=True
      )(params)
      sums = added(sums, grads)
      values.append((loss, logits))
    losses, logits = jax.tree.map(lambda *xs: jnp.stack(xs), *values)
    return (jnp.mean(losses), logits), *updated(tx, sums, params, opt_state), variables

  return step


@pytest.mark.parametrize(
  ("fused", "make"), [("auto", make_tx), (None, make_tx), ("off", make_tx), (None, clipped), ("off", clipped)]
)
@pytest.mark.few(1, full=3)
@pytest.mark.filterwarnings("ignore:.*tree of gradients")
def test_linen_equals_a_loop(fused, make):
  tx = make()
  state = linen_state(fused=fused).replace(tx=tx)
  state = state.replace(opt_state=mpo.init(tx, state.masters())[1])
  step = quick_jit(lambda s, b, key: s.step_with(linen_loss, b, key, has_aux=True, mutable=True, microbatches=K))
  loop, want = quick_jit(linen_loop(tx)), (state.params, state.opt_state, state.variables)
  for i in range(2):
    key = jax.random.key(i)
    state, (loss, logits) = step(state, batch(i), key)
    (want_loss, want_logits), *want = loop(*want, batch(i), key)
    assert_same_bits((state.params, state.opt_state), tuple(want[:2]))
    assert_same_bits(logits, want_logits)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)  # the order of the sum of losses
    for a, b in zip(jax.tree.leaves(state.variables), jax.tree.leaves(want[2]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5)  # XLA may sum a mean in another order
  assert int(state.step) == 2


@relaxed
def nnx_loss(model, batch, rngs, metric):
  x, labels = batch
  loss = cross_entropy(model(x + 0.1 * jax.random.normal(rngs(), x.shape)), labels)
  metric.update(values=loss)
  return loss, loss


@pytest.mark.parametrize("fused", [None, "off"])
@pytest.mark.few(1)
def test_nnx_equals_a_loop(fused):
  """Batch statistics, dropout, random streams and metrics change in turn."""
  model, rngs, metric = NNXClassifier(nnx.Rngs(0)), nnx.Rngs(2), nnx.metrics.Average()
  optimizer = Optimizer(model, make_tx(), fused=fused)
  other, other_rngs, other_metric = nnx.clone((model, rngs, metric))
  step = nnx.jit(
    lambda model, optimizer, *args: optimizer.step_with(model, nnx_loss, *args, has_aux=True, microbatches=K)
  )
  one = nnx.jit(nnx.value_and_grad(nnx_loss, has_aux=True))
  for i in range(2):
    old, opt_state = nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)
    nnx.update(other, old)  # so that a last bit does not add up
    loss, losses = step(model, optimizer, batch(i), rngs, metric)
    sums, values = None, []
    for part in parts(batch(i)):
      (value, _), grads = one(other, part, other_rngs, other_metric)
      sums = added(sums, nnx.as_pure(grads))
      values.append(value)
    want, want_state = quick_jit(lambda *given: updated(make_tx(), *given))(sums, old, opt_state)
    np.testing.assert_allclose(losses, np.stack(values), rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(values), rtol=1e-5)
    got_masters = optimizer.masters(model)
    for a, b in zip(jax.tree.leaves(got_masters), jax.tree.leaves(mpo.master_params(want, want_state)), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-3)  # a step of a bias before BatchNorm has the sign of a rounding error
  assert int(rngs.default.count.get_value()) == int(other_rngs.default.count.get_value()) == 2 * K
  assert int(model.dropout.rngs.count.get_value()) == int(other.dropout.rngs.count.get_value())
  assert int(metric.count.get_value()) == int(other_metric.count.get_value()) == 2 * K
  np.testing.assert_allclose(model.norm.mean.get_value(), other.norm.mean.get_value(), rtol=1e-4)
  assert optimizer.step.get_value() == 2


class Linear(nnx.Module):
  """Weights, frozen weights and a count."""

  def __init__(self, change=lambda model: None):
    self.w, self.frozen = nnx.Param(jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)), nnx.Variable(jnp.ones((2, 257)))
    self.count, self.calls, self.change = nnx.BatchStat(jnp.zeros([], jnp.int32)), 0, change

  def __call__(self, x):
    self.count.set_value(self.count.get_value() + 1)
    self.change(self)
    return x.astype(jnp.bfloat16) @ self.w.get_value() @ self.frozen.get_value().astype(jnp.bfloat16)


def linear_loss(model, data, scale):
  return jnp.mean(model(data["x"]).astype(jnp.float32) ** 2) * scale, jnp.sum(data["x"])


def test_the_bits_of_value_and_update_with_its_options():
  how = mpo.Microbatches(K, in_axes=({"x": 0}, None), weight=lambda data, scale: jnp.sum(data["x"] > 0), aux="mean")
  x = jax.random.normal(jax.random.key(0), (2 * K, 3))
  tx, model = make_tx(), Linear()
  frozen = model.frozen.get_value()

  def loss(params, data, scale):
    y = data["x"].astype(jnp.bfloat16) @ params["w"] @ frozen.astype(jnp.bfloat16)
    return jnp.mean(y.astype(jnp.float32) ** 2) * scale, jnp.sum(data["x"])

  params, opt_state = mpo.init(tx, {"w": model.w.get_value()})
  want = quick_jit(mpo.value_and_update(loss, tx, has_aux=True, microbatches=how))(params, opt_state, {"x": x}, 2.0)
  state = TrainState.create(apply_fn=None, params={"w": model.w.get_value()}, tx=tx, variables={"f": {"f": frozen}})
  got = quick_jit(
    lambda s, x: s.step_with(lambda v, *given: loss(v["params"], *given), {"x": x}, 2.0, has_aux=True, microbatches=how)
  )(state, x)
  assert_same_bits((got[1], got[0].params, got[0].opt_state), want)

  graph, start = nnx.split((model, Optimizer(model, tx)))

  def step(start, x):
    model, optimizer = nnx.merge(graph, start)
    value = optimizer.step_with(model, linear_loss, {"x": x}, 2.0, has_aux=True, microbatches=how)
    return value, dict(optimizer.masters(model)), model.count.get_value()

  value, masters, count = quick_jit(step)(start, x)
  assert_same_bits((value, masters), (want[0], mpo.master_params(*want[1:])))
  assert int(count) == K


def test_what_stays_the_same_is_not_carried():
  """A scan would carry a copy of frozen weights."""
  model = Linear()
  optimizer = Optimizer(model, make_tx())
  graph, state = nnx.split((model, optimizer))

  def step(state, x):
    model, optimizer = nnx.merge(graph, state)
    return optimizer.step_with(model, linear_loss, {"x": x}, 1.0, has_aux=True, microbatches=K)

  program, _ = jax_forms.trace(step, state, jnp.ones((2 * K, 3)))
  (scan,) = [o for o in program.operations if o.name == "scan"]
  first, count, _ = jax_forms.scan_counts(scan)
  shapes = [x.aval.shape for x in scan.eqn.invars]
  assert (2, 257) in shapes[:first]
  assert (2, 257) not in shapes[first : first + count]
  assert () in shapes[first : first + count]  # the count


def number(model):
  model.calls += 1


def dtype(model):
  model.count.set_value(model.count.get_value().astype(jnp.float32))


CHANGES = {
  "an attribute": (number, "changes other attributes of the model.* nnx.Variable"),
  "a dtype": (dtype, r"step_with, microbatches: .*at before\['model'\]\['count'\].*int32.*keep its structure"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_microbatches_cannot_make_in_turn(name):
  change, message = CHANGES[name]
  model = Linear(change)
  optimizer = Optimizer(model, make_tx())
  with pytest.raises(ValueError, match=message):
    optimizer.step_with(model, linear_loss, {"x": jnp.ones((2 * K, 3))}, 1.0, has_aux=True, microbatches=K)
  model.change = lambda model: None
  optimizer.step_with(model, linear_loss, {"x": jnp.ones((2 * K, 3))}, 1.0, has_aux=True, microbatches=K)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow..' outside:DeprecationWarning")
def test_sown_variables_are_named():
  model = Changing(sow)
  optimizer = Optimizer(model, make_tx())
  with pytest.raises(ValueError, match=r"microbatches: .*it has before\['model'\]\['sown'\].*sow collects.* as aux"):
    optimizer.step_with(model, relaxed(lambda m, b: cross_entropy(m(b[0]), b[1])), batch(0), microbatches=K)


def test_fused_layers_split_the_batch_themselves():
  state = TrainState.create(apply_fn=None, params={"w": jnp.ones((3, 2))}, tx=make_tx(), fused="layer")

  def loss(count):
    layer = mpo.fused_layer(lambda w, x: jnp.mean((x @ w).astype(jnp.float32) ** 2), microbatches=count, out_axes=None)
    return lambda v, x: layer(v["params"]["w"], x)

  x = jnp.ones((8, 3), jnp.bfloat16)
  with pytest.raises(ValueError, match=r'step_with: with fused="layer".*fused_layer\(fn, microbatches=4\)'):
    state.step_with(loss(1), x, microbatches=K)
  state.step_with(loss(K), x)  # the advice
