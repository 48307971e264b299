"""Scales and histories of FP8 layers: their gradient is their new value, as in Flax's own train state."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax.linen import fp8_ops
from flax.training import train_state

import optax_mpo as mpo
from tests.helpers import assert_same_bits, exact_jit, relaxed

KEY, WIDTH = fp8_ops.OVERWRITE_WITH_GRADIENT, 16
pytestmark = pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated:DeprecationWarning")


class Layer(nn.Module):
  op: type = fp8_ops.Fp8DirectDotGeneralOp

  @nn.compact
  def __call__(self, x, _=None):
    op = functools.partial(self.op, amax_history_length=4)
    return jnp.tanh(nn.Dense(WIDTH, dtype=jnp.bfloat16, dot_general_cls=op)(x)), None


class Layers(nn.Module):
  op: type = fp8_ops.Fp8DirectDotGeneralOp

  @nn.compact
  def __call__(self, x):
    x, _ = Layer(self.op)(x)
    return Layer(self.op)(x)[0]


class Scanned(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(Layer, variable_axes={"params": 0, KEY: 0}, split_rngs={"params": True}, length=3)
    return scan()(x, None)[0]


MODELS = {"layers": Layers(), "layers, simulated": Layers(nn.Fp8DotGeneralOp), "scanned": Scanned()}


def inputs(i):
  return (i + 1) * jax.random.normal(jax.random.key(i), (8, WIDTH), jnp.bfloat16)


@functools.cache
def variables_of(model):
  return jax.jit(relaxed(model.init))(jax.random.key(0), inputs(0))


def loss_of(model):
  @relaxed
  def loss(variables, x):
    return jnp.mean(jnp.square(model.apply(variables, x).astype(jnp.float32)))

  return loss


@functools.cache
def in_flax(model, count):
  """The run of Flax's own train state with f32 masters: losses and variables."""
  state = train_state.TrainState.create(apply_fn=model.apply, params=variables_of(model), tx=optax.adamw(1e-2))

  @exact_jit
  @relaxed
  def step(state, x):
    value, grads = jax.value_and_grad(lambda v: loss_of(model)(mpo.cast(v), x))(state.params)
    return value, state.apply_gradients(grads=grads)

  values = []
  for i in range(count):
    value, state = step(state, inputs(i))
    values.append(value)
  return values, state.params


def released(loss, tx):
  return exact_jit(relaxed(mpo.value_and_update(loss, tx)))


def ordinary(loss, tx, apply=mpo.apply_updates, outside=False):
  @exact_jit
  @relaxed
  def updated(params, opt_state, x):
    value, grads = jax.value_and_grad(loss)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return value, updates if outside else apply(params, updates), opt_state

  def step(params, opt_state, x):
    value, new, opt_state = updated(params, opt_state, x)
    return value, apply(params, new) if outside else new, opt_state

  return step


STEPS = {
  "released": released,
  "ordinary": ordinary,
  "in two programs": functools.partial(ordinary, outside=True),
  "optax.apply_updates in another program": functools.partial(ordinary, apply=optax.apply_updates, outside=True),
  "in two passes": lambda loss, tx: exact_jit(relaxed(mpo.value_and_update(loss, tx, two_pass=True))),
}


CASES = [(kind, name) for kind in STEPS for name in MODELS]
FAST = [("released", "scanned"), ("in two programs", "layers")]  # the others are in the tier `full`


@pytest.mark.parametrize(
  ("kind", "name"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.full) for case in CASES]
)
def test_trains_as_flax_does(kind, name):
  model = MODELS[name]
  tx = mpo.compensated(optax.adamw(1e-2))
  params, opt_state = mpo.init(tx, variables_of(model))
  assert {x.dtype.name for x in jax.tree.leaves(params[KEY])} == {"float32"}
  assert {x.dtype.name for x in jax.tree.leaves(params["params"])} == {"bfloat16"}
  assert not jax.tree.leaves([opt_state.compensation[KEY], opt_state.inner_state[0].mu[KEY]])
  step, values = STEPS[kind](loss_of(model), tx), []
  for i in range(4):
    value, params, opt_state = step(params, opt_state, inputs(i))
    values.append(value)
  want_values, want = in_flax(model, 4)
  assert_same_bits(values, want_values)
  assert_same_bits(mpo.master_params(params, opt_state), want)
  for old, new in zip(jax.tree.leaves(variables_of(model)[KEY]), jax.tree.leaves(want[KEY]), strict=True):
    assert not np.array_equal(old, new)


def test_stacks_of_scales_are_updated_in_the_scan():
  tx = mpo.compensated(optax.adamw(1e-2))
  params, opt_state = mpo.init(tx, variables_of(Scanned()))
  rows = relaxed(mpo.explain)(loss_of(Scanned()), tx, params, opt_state, inputs(0))
  assert [row.stepped for row in rows if "amax_history" in row.name] == ["in scan"] * 3
  assert {row.stepped for row in rows} <= {"in scan", "after the scan"}
  assert max(row.gradient_bytes for row in rows if KEY in row.name) < 3 * 4 * 4  # a whole stack of histories


def test_a_weight_of_another_transformation():
  tx = optax.multi_transform(
    {
      "a": mpo.compensated(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))),
      "b": mpo.compensated(optax.sgd(1.0)),
    },
    lambda params: {"w": "a", "v": "b", KEY: "b"},
  )
  params, opt_state = mpo.init(tx, {"w": jnp.ones(3), "v": jnp.ones(3), KEY: {"scale": jnp.ones(1)}})
  grads = {"w": jnp.ones(3), "v": jnp.ones(3), KEY: {"scale": jnp.full(1, 1e-20)}}
  updates, opt_state = tx.update(grads, opt_state, params)
  for apply in (mpo.apply_updates, optax.apply_updates):
    new = apply(params, updates)
    assert_same_bits(new[KEY], grads[KEY])
    assert float(new["v"][0]) == 0.0


def test_the_loss_scale_leaves_them_alone():
  tx = mpo.loss_scaled(mpo.compensated(optax.sgd(1.0)), 4.0, dynamic=False)
  params, opt_state = mpo.init(tx, {"w": jnp.ones(3), KEY: {"scale": jnp.full(1, 5.0)}})
  for gradient, weight, scale in ((2.0, 0.5, 7.0), (jnp.inf, 0.5, 7.0), (2.0, 0.0, 3.0)):
    grads = {"w": jnp.full(3, gradient), KEY: {"scale": jnp.full(1, scale if gradient < jnp.inf else 9.0)}}
    updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
    params = mpo.apply_updates(params, updates)
    assert float(params["w"][0]) == weight
    assert float(params[KEY]["scale"][0]) == scale


def test_updates_of_zero_change_nothing():
  tx = optax.MultiSteps(mpo.compensated(optax.sgd(1.0)), 2)
  params, opt_state = mpo.init(tx, {"w": jnp.ones(3), KEY: {"scale": jnp.full(1, 5.0)}})
  old = params
  for scale, want in ((2.0, 5.0), (4.0, 3.0)):  # it averages gradients, these ones too
    grads = {"w": jnp.ones(3), KEY: {"scale": jnp.full(1, scale)}}
    for update in (jax.jit(tx.update), tx.update):
      updates, new_state = update(grads, opt_state, params)
      for apply in (mpo.apply_updates, optax.apply_updates):
        new = apply(params, updates)
        assert float(new[KEY]["scale"][0]) == want
    params, opt_state = new, new_state
  assert float(old["w"][0] - params["w"][0]) == 1.0


def test_updates_may_be_mapped():
  tx = mpo.compensated(optax.sgd(1.0))
  params, opt_state = mpo.init(tx, {"w": jnp.ones((3, 2)), KEY: {"history": jnp.ones((3, 2))}})
  grads = jax.tree.map(lambda p: jnp.full(p.shape, 4.0), params)
  state_axes = jax.tree.map(lambda x: 0 if x.ndim else None, opt_state)
  updates, _ = jax.vmap(tx.update, in_axes=(0, state_axes, 0))(grads, opt_state, params)
  for apply in (mpo.apply_updates, optax.apply_updates, jax.vmap(mpo.apply_updates)):
    assert_same_bits(apply(params, updates)[KEY], grads[KEY])


def test_microbatches_refuse_them():
  layer = mpo.fused_layer(lambda v, x: x @ v["params"] * v[KEY]["s"][None], microbatches=2)
  tx = mpo.compensated(optax.sgd(1.0))
  params, opt_state = mpo.init(tx, {"params": jnp.ones((4, 4)), KEY: {"s": jnp.ones(4)}})
  step = mpo.fused_value_and_update(lambda h, x: jnp.sum(layer(h, x)), tx)
  with pytest.raises(ValueError, match=rf"microbatches add up gradients, and params\['{KEY}'\]\['s'\]"):
    step(params, opt_state, jnp.ones((4, 4), jnp.bfloat16))


@pytest.mark.full
def test_fused_layers():
  model = Layers()
  tx = mpo.compensated(optax.adamw(1e-2))
  layer = mpo.fused_layer(lambda v, x: Layer().apply(v, x)[0])

  @relaxed
  def loss(handles, x):
    for name in ("Layer_0", "Layer_1"):
      x = layer({"params": handles["params"][name], KEY: handles[KEY][name]}, x)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))

  params, opt_state = mpo.init(tx, variables_of(model))
  step = exact_jit(relaxed(mpo.fused_value_and_update(loss, tx)))
  for i in range(4):
    _, params, opt_state = step(params, opt_state, inputs(i))
  assert_same_bits(mpo.master_params(params, opt_state), in_flax(model, 4)[1])


@pytest.mark.full
def test_a_leaf_that_two_uses_share_and_converts_to_flaxs_own_dtype():
  """With Flax's dtype `fm32`, the new value of a scale that is used twice is the larger one."""
  model = Layers()

  @relaxed
  def loss(variables, x):
    fm32 = jax.tree.map(lambda s: jax.lax.convert_element_type(s, fp8_ops.fm32), variables[KEY])

    def part(total, x):
      return total + jnp.mean(jnp.square(model.apply({**variables, KEY: fm32}, x).astype(jnp.float32))), None

    return jax.lax.scan(part, jnp.float32(0), x.reshape(2, 4, WIDTH))[0]

  tx = mpo.compensated(optax.adamw(1e-2))
  runs = []
  for kind in ("released", "ordinary"):
    params, opt_state = mpo.init(tx, variables_of(model))
    step = STEPS[kind](loss, tx)
    for i in range(3):
      value, params, opt_state = step(params, opt_state, inputs(i))
    runs.append((value, params, opt_state))
  assert_same_bits(*runs)
  history = jax.tree.leaves(runs[0][1][KEY])[0]
  assert float(history[0]) == float(jnp.max(jnp.abs(inputs(2))))


def test_they_keep_their_dtype():
  params = {"w": jnp.ones(3), KEY: {"a": jnp.ones(1), "b": jnp.ones(1, jnp.bfloat16)}}
  tx = mpo.compensated(optax.adam(1e-2), extra_bits=8)
  low, opt_state = mpo.init(tx, params)
  for tree in (low, mpo.cast(params), mpo.master_params(low, opt_state)):
    assert {k: x.dtype.name for k, x in tree[KEY].items()} == {"a": "float32", "b": "bfloat16"}
  grads = {"w": jnp.ones(3), KEY: {"a": jnp.full(1, 0.1, jnp.bfloat16), "b": jnp.full(1, 0.1)}}
  updates, opt_state = tx.update(grads, opt_state, low)
  new = mpo.apply_updates(low, updates)
  assert {k: x.dtype.name for k, x in new[KEY].items()} == {"a": "float32", "b": "bfloat16"}
  assert not np.any(jax.tree.leaves(mpo.lost_updates(low, updates, 8)[KEY]))
  masters, state = mpo.convert(mpo.compensated(optax.adam(1e-2)), new, opt_state)
  assert_same_bits(masters[KEY], new[KEY])
  assert not jax.tree.leaves(state.compensation[KEY])


def test_gradients_that_cannot_be_their_values():
  params, opt_state = mpo.init(mpo.compensated(optax.sgd(1.0)), {"w": jnp.ones(3), KEY: {"s": jnp.ones(2)}})
  for wrong, what in ((jnp.ones(3), r"float32\[3\]"), (None, "a NoneType"), (jnp.ones(2, jnp.int32), r"int32\[2\]")):
    with pytest.raises(ValueError, match=rf"params\['{KEY}'\]\['s'\] is overwritten .* its gradient {what}"):
      mpo.compensated(optax.sgd(1.0)).update({"w": jnp.ones(3), KEY: {"s": wrong}}, opt_state, params)


QWIX = {
  "fp8": {"weight_qtype": jnp.float8_e4m3fn, "act_qtype": jnp.float8_e4m3fn, "bwd_qtype": jnp.float8_e5m2},
  "int8, static scales": {"weight_qtype": jnp.int8, "act_qtype": jnp.int8, "act_static_scale": True},
}


class QwixLayer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(WIDTH, dtype=jnp.bfloat16)(jnp.tanh(x)), None


class QwixLayers(nn.Module):
  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, "quant_stats": 0}
    layers = nn.scan(nn.remat(QwixLayer, prevent_cse=False), variable_axes=axes, split_rngs={"params": True}, length=3)
    return nn.Dense(4, dtype=jnp.bfloat16)(layers()(x, None)[0])


@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")  # in qwix itself
@pytest.mark.parametrize("rule", QWIX)
@pytest.mark.few(1)
def test_a_model_that_qwix_quantizes(rule):
  """Its statistics are variables of the forward pass, not leaves whose gradient is their value."""
  model = qwix.quantize_model(QwixLayers(), qwix.QtProvider([qwix.QtRule(module_path=".*", **QWIX[rule])]))
  variables = dict(relaxed(model.init)(jax.random.key(0), inputs(0)))
  params = variables.pop("params")
  assert ("quant_stats" in variables) == (rule != "fp8")

  @relaxed
  def loss(params, stats, x):
    y, stats = model.apply({"params": params, **stats}, x, mutable=["quant_stats"])
    return jnp.mean(y.astype(jnp.float32) ** 2), stats

  tx = mpo.exact(optax.adamw(1e-2))

  def ordinary(params, state, stats, x):
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, x)
    updates, state = tx.update(grads, state, params)
    return (value, stats), mpo.apply_updates(params, updates), state

  released = mpo.value_and_update(loss, tx, has_aux=True)
  want = got = (None, *mpo.init(tx, params))
  stats = other_stats = variables
  steps = exact_jit(ordinary), exact_jit(released)
  for i in range(4):
    want, got = steps[0](*want[1:], stats, inputs(i)), steps[1](*got[1:], other_stats, inputs(i))
    stats, other_stats = want[0][1], got[0][1]
    assert_same_bits(got, want)
  table = mpo.explain(loss, tx, *got[1:], stats, inputs(0), has_aux=True)
  assert {leaf.name: leaf.stepped for leaf in table}[
    "params['ScanCheckpointQwixLayer_0']['Dense_0']['kernel']"
  ] == "in scan"
