"""What users of Flax type: gradients given to the object, the default kind of step, runs taken over."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import fp8_ops
from flax.training import train_state

import optax_mpo as mpo
from optax_mpo._program import jax_forms
from optax_mpo.flax import Optimizer, TrainState
from tests.helpers import assert_same_bits, exact_jit, relaxed

KEY = fp8_ops.OVERWRITE_WITH_GRADIENT


def masters():
  return {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.full(4, 0.1)}


def inputs(i=0):
  return jax.random.normal(jax.random.key(i), (8, 3), jnp.bfloat16)


def loss_of(p, x):
  return jnp.mean(jnp.square((jnp.tanh(x @ p["w"]) + p["b"][None] - 1).astype(jnp.float32)))


def linen_loss(variables, x):
  return loss_of(variables["params"], x)


def make(tx, **options):
  return TrainState.create(apply_fn=None, params=masters(), tx=tx, **options)


class Model(nnx.Module):
  def __init__(self):
    self.w, self.b = nnx.Param(masters()["w"]), nnx.Param(masters()["b"])


def nnx_loss(model, x):
  return loss_of({"w": model.w.get_value(), "b": model.b.get_value()}, x)


def adam():
  return mpo.compensated(optax.adamw(1e-2))


def clipped():
  return mpo.compensated(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)))


# --- Gradients given to the object ------------------------------------------------------------------------------------


def test_apply_gradients():
  state = given = make(adam(), ema_decay=0.5)
  step = exact_jit(lambda s, x: s.step_with(linen_loss, x)[0])
  apply = exact_jit(lambda s, x: s.apply_gradients(grads=jax.grad(loss_of)(s.params, x)))
  for i in range(3):
    state, given = step(state, inputs(i)), apply(given, inputs(i))
  assert_same_bits(given, state)
  assert int(given.apply_gradients(grads=given.params, step=jnp.int32(9), variables={"a": 1}).step) == 9
  with pytest.raises(TypeError, match="positional"):
    given.apply_gradients(given.params)
  with pytest.raises(ValueError, match=r"nothing at params\['b'\]"):
    given.apply_gradients(grads={"w": given.params["w"]})


def test_update():
  runs = []
  for with_gradients in (False, True):
    model = Model()
    optimizer = Optimizer(model, adam(), ema_decay=0.5)

    @nnx.jit
    def step(model, optimizer, x, with_gradients=with_gradients):
      if not with_gradients:
        optimizer.step_with(model, nnx_loss, x)
        return None
      return optimizer.update(model, nnx.grad(nnx_loss)(model, x))

    updates = [step(model, optimizer, inputs(i)) for i in range(3)]
    runs.append(nnx.as_pure(nnx.state((model, optimizer))))
  assert_same_bits(*runs)
  assert {k: (x.shape, x.dtype.name) for k, x in updates[0].items()} == {
    "w": ((3, 4), "float32"),
    "b": ((4,), "float32"),
  }


def test_update_hands_further_arguments_on():
  model = Model()
  inner = optax.GradientTransformationExtraArgs(
    lambda _: optax.EmptyState(), lambda u, s, p=None, *, value: (jax.tree.map(lambda x: -value * x, u), s)
  )
  optimizer = Optimizer(model, mpo.compensated(inner))
  ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
  optimizer.update(model, ones, value=nnx.Variable(jnp.float32(2)))
  np.testing.assert_array_equal(optimizer.masters(model)["w"], masters()["w"] - 2)


# --- The default kind of step -----------------------------------------------------------------------------------------


def linen_step(tx, loss=linen_loss, **options):
  state = make(tx, **options)
  return exact_jit(lambda s, x: s.step_with(loss, x))(state, inputs())[0].masters()


def nnx_step(tx, loss=linen_loss, **options):
  model = Model()
  optimizer = Optimizer(model, tx, **options)
  optimizer.step_with(model, lambda m, x: loss({"params": {"w": m.w.get_value(), "b": m.b.get_value()}}, x), inputs())
  return optimizer.masters(model)


@pytest.mark.parametrize("step", [linen_step, nnx_step])
def test_the_default_releases_where_it_can_and_else_says_so_once(step):
  caller = "TrainState" if step is linen_step else "Optimizer"
  step(adam())  # no warning
  tx = clipped()
  with pytest.warns(
    UserWarning, match=rf"{caller}.step_with: .*tree of gradients, .*\"off\".*couples.*two_pass=True"
  ) as told:
    got = step(tx)
  assert told[0].filename == __file__
  assert_same_bits(step(tx), got)  # no second warning
  assert_same_bits(step(tx, fused="off"), got)
  step(clipped(), two_pass=True)
  with pytest.raises(ValueError, match=r'couples .*two_pass=True.* fused="off"'):
    step(clipped(), fused="auto")


def test_the_default_is_gradient_release():
  def text(fused):
    return str(jax.make_jaxpr(lambda s, x: s.step_with(linen_loss, x))(make(adam(), fused=fused), inputs()))

  assert make(adam()).fused is None
  assert "optimization_barrier" in text(None)  # between the updates
  assert text(None) == text("auto")
  assert "optimization_barrier" not in text("off")


def test_a_jax_that_cannot_be_read(monkeypatch):
  def check(caller):
    raise NotImplementedError(f"{caller}: an unknown form")

  monkeypatch.setattr(jax_forms, "check_forms", check)
  with pytest.warns(UserWarning, match="not possible.*an unknown form"):
    got = linen_step(adam())
  assert_same_bits(got, linen_step(adam(), fused="off"))
  with pytest.raises(NotImplementedError, match='an unknown form Or make this object with fused="off"'):
    linen_step(adam(), fused="auto")


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
@pytest.mark.parametrize("tx", [adam, clipped])
@pytest.mark.filterwarnings("ignore:.*tree of gradients")
def test_errors_of_the_loss_are_raised(tx, error):
  calls = []

  def loss(variables, x):
    calls.append(1)
    raise error("mine")

  with pytest.raises(error, match=r"^mine"):
    linen_step(tx(), loss)
  assert len(calls) == 1


def test_a_state_of_another_transformation_is_an_error():
  state = make(adam())
  with pytest.raises(ValueError, match=r"TrainState\.step_with: opt_state"):
    state.replace(opt_state=mpo.compensated(optax.sgd(1.0)).init(state.params)).step_with(linen_loss, inputs())


def test_pickles_name_the_public_module():
  assert {TrainState.__module__, Optimizer.__module__} == {"optax_mpo.flax"}
  state = make(adam()).replace(tx=None)  # Optax's functions have no names of their own
  data = pickle.dumps(jax.tree.map(np.asarray, state))
  assert b"optax_mpo.flax" in data
  assert b"_flax" not in data
  assert_same_bits(pickle.loads(data).params, state.params)


# --- Runs taken over --------------------------------------------------------------------------------------------------


def f32_linen(count, tx=None):
  """A run of Flax's own train state, with f32 params that the loss casts."""
  state = train_state.TrainState.create(apply_fn=len, params=masters(), tx=tx or optax.adamw(1e-2))
  step = exact_jit(relaxed(lambda s, x: s.apply_gradients(grads=jax.grad(lambda p: loss_of(mpo.cast(p), x))(s.params))))
  for i in range(count):
    state = step(state, inputs(i))
  return state


def test_from_flax_continues_the_run():
  old = f32_linen(2)
  state = TrainState.from_flax(old, ema_decay=0.9, variables={"batch_stats": {"mean": jnp.ones(2)}})
  assert int(state.step) == 2
  assert state.apply_fn is len
  assert_same_bits(state.masters(), old.params)
  assert_same_bits(state.ema, old.params)
  step = exact_jit(lambda s, x: s.step_with(linen_loss, x)[0])
  for i in (2, 3):
    state = step(state, inputs(i))
  want = f32_linen(4)
  assert_same_bits(state.masters(), want.params)
  assert_same_bits(state.opt_state.inner_state, want.opt_state)
  assert int(state.step) == 4
  assert not old.params["w"].is_deleted()
  compact = TrainState.from_flax(old, mpo.compensated(mpo.quantized_state(optax.adamw(1e-2), min_size=1), extra_bits=8))
  assert isinstance(compact.opt_state.inner_state, mpo.QuantizedState)
  assert compact.opt_state.compensation["w"].dtype == jnp.uint8
  again = train_state.TrainState(1, None, state.params, state.tx, state.opt_state)
  assert_same_bits(TrainState.from_flax(again).opt_state, state.opt_state)  # it has a `compensated` of its own


def test_from_flax_with_scales():
  """Flax's state is that of `params["params"]` alone."""
  params = {"params": masters(), KEY: {"scale": jnp.ones(2)}}
  old = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adamw(1e-2))
  state = TrainState.create(
    apply_fn=None, params=masters(), variables={KEY: params[KEY], "other": {}}, tx=mpo.compensated(optax.adamw(1e-2))
  )
  assert jax.tree.structure(state.params) == jax.tree.structure(params)
  assert set(state.variables) == {"other"}
  taken = TrainState.from_flax(old, ema_decay=0.5)
  for i in range(3):
    grads = {"params": jax.tree.map(lambda x, i=i: x + i, masters()), KEY: {"scale": jnp.full(2, 3.0 + i)}}
    old = relaxed(old.apply_gradients)(grads=grads)
    state, taken = state.apply_gradients(grads=grads), taken.apply_gradients(grads=grads)
    if i == 1:
      taken = TrainState.from_flax(old, ema_decay=0.5)
  assert_same_bits(state.masters(), old.params)
  assert_same_bits((taken.params, taken.opt_state), (state.params, state.opt_state))
  assert_same_bits(taken.ema[KEY], {"scale": jnp.full(2, 5.0)})
  seen = []
  state.step_with(lambda v, x: seen.append(set(v)) or loss_of(v["params"], x) + 0 * v[KEY]["scale"][0], inputs())
  assert seen[0] == {"params", KEY, "other"}


def test_from_nnx_continues_the_run():
  def loss(model, x):
    return loss_of(mpo.cast({"w": model.w.get_value(), "b": model.b.get_value()}), x)

  def run(count):
    model = Model()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    step = nnx.jit(relaxed(lambda m, o, x: o.update(m, nnx.grad(loss)(m, x)) and None))
    for i in range(count):
      step(model, optimizer, inputs(i))
    return model, optimizer

  model, old = run(2)
  optimizer = Optimizer.from_nnx(model, old, ema_decay=0.9, ema_bits=16)
  assert int(optimizer.step.get_value()) == 2
  step = nnx.jit(lambda m, o, x: o.step_with(m, nnx_loss, x))
  for i in (2, 3):
    step(model, optimizer, inputs(i))
  want, want_optimizer = run(4)
  assert_same_bits(optimizer.masters(model), nnx.as_pure(nnx.state(want, nnx.Param)))
  kept = nnx.as_pure(optimizer.opt_state)
  assert_same_bits(jax.tree.leaves(kept.inner_state), jax.tree.leaves(nnx.as_pure(want_optimizer.opt_state)))
  assert int(optimizer.step.get_value()) == 4


def test_runs_that_do_not_fit():
  old = f32_linen(0)
  with pytest.raises(ValueError, match=r"convert: .*opt_state"):
    TrainState.from_flax(old, mpo.compensated(optax.sgd(1e-2, momentum=0.9)))
  with pytest.raises(ValueError, match=r"convert: .*mu\['w'\] is \[3, 4\], but .* \[4, 3\]"):
    TrainState.from_flax(old.replace(params={**old.params, "w": old.params["w"].T}))
  with pytest.raises(TypeError, match=r"has to be a flax.training.train_state.TrainState, but it is a dict"):
    TrainState.from_flax(masters())
  with pytest.raises(ValueError, match=r"\.from_flax: fused has to be"):
    TrainState.from_flax(old, fused="on")
  with pytest.raises(TypeError, match=r"has to be an nnx\.Optimizer, but it is a TrainState"):
    Optimizer.from_nnx(Model(), old)
  optimizer = nnx.Optimizer(Model(), optax.adam(1e-2), wrt=nnx.Param)
  with pytest.raises(ValueError, match=r"convert: .*opt_state"):
    Optimizer.from_nnx(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), optimizer)


@pytest.mark.parametrize("rate", [0.125, optax.constant_schedule(0.125)], ids=["number", "schedule"])
def test_metrics_and_extra_arguments(rate):
  """Norms, learning rate and loss of the last step, and the loss as `value`, on both objects and by each route."""

  def make():
    return mpo.compensated(
      optax.chain(
        mpo.record_norms(),
        optax.inject_hyperparams(optax.sgd)(learning_rate=rate),
        optax.contrib.reduce_on_plateau(patience=1, factor=0.5),
        mpo.record_norms("update_norm"),
      )
    )

  def loss(variables):
    return jnp.sum(variables["params"]["w"].astype(jnp.float32) * jnp.array([3.0, 4.0]))

  want = {"loss": 7.0, "grad_norm": 5.0, "update_norm": 0.625, "learning_rate": 0.125}
  for fused in (None, "off"):
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=make(), fused=fused)
    state, value = state.step_with(loss)
    assert {k: float(x) for k, x in state.metrics(value).items()} == want
    assert "loss" not in state.metrics()
    state, _ = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=make(), fused=fused).step_with(
      loss, tx_args={"value": jnp.float32(2)}
    )
    assert float(optax.tree.get(state.opt_state, "best_value")) == 2.0

  class Model(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.ones(2))

  model = Model()
  optimizer = Optimizer(model, make())
  value = optimizer.step_with(model, lambda model: jnp.sum(model.w[...].astype(jnp.float32) * jnp.array([3.0, 4.0])))
  assert {k: float(x) for k, x in optimizer.metrics(value).items()} == want


def test_decays_and_extra_arguments_are_checked():
  tx = mpo.compensated(optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau()))
  with pytest.raises(ValueError, match="ema_decay has to be None, or at least 0 and below 1, but it is"):
    TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx, ema_decay=1.5)
  state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
  for name in ("params", "updates", "state"):
    with pytest.raises(TypeError, match=f"^tx_args: '{name}' cannot be an extra argument"):
      state.apply_gradients(grads={"w": jnp.ones(2)}, tx_args={"value": jnp.float32(2), name: jnp.ones(2)})
    with pytest.raises(TypeError, match=f"^tx_args: '{name}' cannot be an extra argument"):
      state.replace(fused="off").step_with(lambda v: jnp.sum(v["params"]["w"]), tx_args={name: jnp.ones(2)})
  model = Model()
  with pytest.raises(TypeError, match=r"^tx_args: 'params' cannot be an extra argument"):
    Optimizer(model, adam()).update(model, nnx.grad(nnx_loss)(model, inputs()), params=jnp.ones(2))
  state = state.apply_gradients(grads={"w": jnp.ones(2)}, tx_args={"value": jnp.float32(2)})
  assert float(optax.tree.get(state.opt_state, "best_value")) == 2.0


@relaxed
def test_explain_of_linen_tells_what_optax_mpo_explain_does():
  def loss_fn(variables, x):
    return jnp.mean((x @ variables["params"]["w"] + variables["stats"]["mean"]) ** 2), {"stats": variables["stats"]}

  state = TrainState.create(
    apply_fn=None, params={"w": jnp.ones((4, 2))}, tx=adam(), variables={"stats": {"mean": jnp.ones(2)}}
  )
  x = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
  told = state.explain(loss_fn, x, mutable=True)

  def pure(params, x):
    return loss_fn({"params": params, "stats": {"mean": jnp.ones(2)}}, x)[0]

  assert told == mpo.explain(pure, state.tx, state.params, state.opt_state, x)
  assert told[0].stepped == "at once"
  assert told.passes == 1
  in_parts = state.explain(loss_fn, x, mutable=True, microbatches=4)
  assert in_parts == told
  assert in_parts.accumulator_bytes == 4 * 4 * 2
  clips = TrainState.create(apply_fn=None, params={"v": jnp.ones((40, 30)), "w": jnp.ones((40, 30))}, tx=clipped())
  with pytest.raises(ValueError, match=r"couples .*clip_by_delayed_norm.*two_pass=True"):
    clips.explain(lambda variables: sum(jnp.sum(w) for w in variables["params"].values()))
  twice = clips.replace(two_pass=True).explain(lambda variables: sum(jnp.sum(w) for w in variables["params"].values()))
  assert twice.passes == 2


@relaxed
def test_explain_of_nnx_takes_what_step_with_takes_and_changes_nothing():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(4, 2, dtype=jnp.bfloat16, rngs=rngs)
      self.norm = nnx.BatchNorm(2, dtype=jnp.bfloat16, rngs=rngs)

  def loss_fn(model, x, rngs, teacher, scale):
    y = model.norm(model.linear(x)) * jax.random.bernoulli(rngs.dropout(), 0.5, (8, 2)).astype(jnp.bfloat16)
    return scale * jnp.mean((y - teacher(x)) ** 2).astype(jnp.float32), y

  model, rngs = Model(nnx.Rngs(0)), nnx.Rngs(1)
  teacher = nnx.Linear(4, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(2))
  optimizer = Optimizer(model, adam())
  before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state((model, rngs, optimizer))))
  told = optimizer.explain(model, loss_fn, jnp.ones((8, 4)), rngs, teacher, 2.0, has_aux=True)
  assert {leaf.name: leaf.stepped for leaf in told} == {
    f"params['{layer}']['{name}']": "at once"
    for layer, names in (("linear", ("bias", "kernel")), ("norm", ("bias", "scale")))
    for name in names
  }
  in_parts = optimizer.explain(model, loss_fn, jnp.ones((16, 4)), rngs, teacher, 2.0, has_aux=True, microbatches=2)
  assert in_parts == told
  assert in_parts.accumulator_bytes == 4 * sum(leaf.parameters for leaf in told)
  jax.tree.map(assert_same_bits, nnx.as_pure(nnx.state((model, rngs, optimizer))), before)
  optimizer.step_with(model, loss_fn, jnp.ones((8, 4)), rngs, teacher, 2.0, has_aux=True)
