"""Sharding of optimizer state, and sharded steps on eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from optax_mpo._transforms import sharding
from tests.helpers import assert_same_bits, ordinary_step

LAYERS, WIDTH, HIDDEN = 2, 64, 128
SPECS = {
  "data_parallel": ((8,), ("data",), lambda name: P()),
  "fsdp": (
    (8,),
    ("data",),
    {"embed": P("data"), "up": P(None, "data"), "down": P(None, None, "data"), "scale": P()}.get,
  ),
  "tensor": (
    (2, 4),
    ("data", "model"),
    {"embed": P(None, "model"), "up": P(None, None, "model"), "down": P(None, "model"), "scale": P()}.get,
  ),
}


def make_params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    "embed": jax.random.normal(keys[0], (WIDTH, WIDTH)) * 0.1,
    "layers": {
      "up": jax.random.normal(keys[1], (LAYERS, WIDTH, HIDDEN)) * 0.1,
      "down": jax.random.normal(keys[2], (LAYERS, HIDDEN, WIDTH)) * 0.1,
      "scale": jnp.ones((LAYERS, WIDTH)),
    },
  }


def loss_fn(params, x):
  def layer(x, p):
    return x + jnp.tanh((x * p["scale"][None]) @ p["up"]) @ p["down"], None

  x = x.astype(params["embed"].dtype) @ params["embed"]
  x, _ = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])
  return jnp.mean(jnp.square((x @ params["embed"].T).astype(jnp.float32)))


def fused_loss(params, x):
  def layer(p, x, _):
    return x + jnp.tanh((x * p["scale"][None]) @ p["up"]) @ p["down"], None

  embed = mpo.fused_value(params["embed"])
  x, _ = mpo.fused_scan(layer)(params["layers"], x.astype(jnp.bfloat16) @ embed)
  return jnp.mean(jnp.square((x @ embed.T).astype(jnp.float32)))


STEPS = {
  "auto": lambda tx: mpo.value_and_update(loss_fn, tx),
  "layer": lambda tx: mpo.fused_value_and_update(fused_loss, tx),
}
OPTIMIZERS = {
  "exact": lambda: mpo.compensated(optax.sgd(1e-1, momentum=0.9)),
  "compact": lambda: mpo.compensated(mpo.quantized_state(optax.adamw(1e-2), min_size=1), extra_bits=8),
  "float8": lambda: mpo.compensated(optax.adam(1e-2)),
}


def put(layout, tx, dtype=jnp.bfloat16):
  """Returns params, state and a batch on the mesh of a layout."""
  shape, names, spec_of = SPECS[layout]
  mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))

  def split(path, leaf):
    return NamedSharding(mesh, spec_of(path[-1].key))

  params, state = mpo.init(tx, make_params(), dtype=dtype)
  params = jax.device_put(params, jax.tree_util.tree_map_with_path(split, params))
  state = jax.device_put(state, mpo.state_sharding(params, state))
  x = jax.random.normal(jax.random.key(1), (16, WIDTH))
  return params, state, jax.device_put(x, NamedSharding(mesh, P("data")))


def test_what_is_shaped_like_a_param_takes_its_sharding():
  params, state, _ = put("fsdp", OPTIMIZERS["compact"]())
  shardings = mpo.state_sharding(params, state)
  adam = shardings.inner_state.inner_state[0]
  assert shardings.compensation["layers"]["up"] == params["layers"]["up"].sharding
  assert adam.mu["layers"]["up"].values == params["layers"]["up"].sharding
  assert adam.nu["layers"]["up"].scales.spec == P(None, "data", None)
  # Two blocks of 32 cannot be split over eight devices.
  assert adam.mu["layers"]["down"].values.spec == P(None, None, "data")
  assert adam.mu["layers"]["down"].scales.spec == P(None, None, None)
  assert adam.count.spec == P()
  assert jax.tree.structure(shardings) == jax.tree.structure(state)


def test_scales_of_float8_take_the_sharding_of_their_param():
  params, state, _ = put("fsdp", OPTIMIZERS["float8"](), jnp.float8_e4m3fn)
  shardings = mpo.state_sharding(params, state).compensation
  assert shardings["embed"].bits == params["embed"].sharding
  assert shardings["embed"].scales.spec == P("data", None)
  assert shardings["layers"]["up"].scales.spec == P(None, "data", None)
  assert shardings["layers"]["down"].scales.spec == P(None, None, None)  # two blocks on eight devices


def test_factored_state_is_replicated_and_accumulated_gradients_are_not():
  tx = optax.MultiSteps(optax.adafactor(1e-2, min_dim_size_to_factor=8), 2)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  params = jax.device_put(make_params(), NamedSharding(mesh, P()))
  params["embed"] = jax.device_put(params["embed"], NamedSharding(mesh, P("data")))
  shardings = mpo.state_sharding(params, tx.init(params))
  assert shardings.acc_grads["embed"].spec == P("data")
  factored = [s for path, s in jax.tree_util.tree_leaves_with_path(shardings) if "v_row" in jax.tree_util.keystr(path)]
  assert {s.spec for s in factored} == {P()}


def test_shapes_will_do_and_init_can_be_compiled_with_them():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  tx = OPTIMIZERS["compact"]()
  shapes = jax.eval_shape(functools.partial(mpo.init, tx), make_params())
  sharded = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P(*[None] * (s.ndim - 1), "data"))),
    shapes[0],
  )
  shardings = (jax.tree.map(lambda s: s.sharding, sharded), mpo.state_sharding(sharded, shapes[1]))
  params, state = jax.jit(functools.partial(mpo.init, tx), out_shardings=shardings)(make_params())
  assert state.compensation["embed"].sharding.spec == P(None, "data")
  assert_same_bits((params, state), mpo.init(tx, make_params()))


CASES = [
  *((fused, layout, "exact") for fused in STEPS for layout in SPECS),
  *((fused, "fsdp", "compact") for fused in STEPS),
  ("auto", "fsdp", "float8"),  # fused layers refuse it
]


@pytest.mark.parametrize(("fused", "layout", "optimizer"), CASES)
@pytest.mark.few(1, full=3)
def test_fused_steps_are_those_of_the_unfused_step(fused, layout, optimizer):
  assert_fused_is_unfused(fused, layout, optimizer)


@pytest.mark.parametrize("fused", STEPS)
@pytest.mark.few(0)
def test_large_scales_whose_blocks_do_not_divide_are_split_along_the_axis_before(fused, monkeypatch):
  monkeypatch.setattr(sharding, "_SMALL", 0)
  _, state, _ = put("fsdp", OPTIMIZERS["compact"]())
  scales = state.inner_state.inner_state[0].mu["layers"]["down"].scales
  assert scales.shape[-1] % 8
  assert scales.sharding.spec == P(None, "data", None)
  assert_fused_is_unfused(fused, "fsdp", "compact")


def test_both_axes_of_scales_may_be_split():
  mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  codes, spec = NamedSharding(mesh, P("data", "model")), P(("data", "model"), None)
  assert sharding._per_block(codes, (2**12, 43)).spec == spec
  assert sharding._per_block(codes, (2**12, 44)).spec == P("data", "model")
  assert sharding._per_block(codes, (2**12 + 2, 43)).spec == P("data", None)
  assert sharding._per_block(NamedSharding(mesh, P("model")), (2**18 + 1,)).spec == P(None)


def assert_fused_is_unfused(fused, layout, optimizer):
  tx = OPTIMIZERS[optimizer]()
  params, state, x = put(layout, tx, jnp.float8_e4m3fn if optimizer == "float8" else jnp.bfloat16)
  options = {
    "out_shardings": (None, *jax.tree.map(lambda a: a.sharding, (params, state))),  # else XLA may change them
    "compiler_options": {
      "xla_allow_excess_precision": False,
      "xla_backend_optimization_level": 0,
      "xla_disable_hlo_passes": "fusion",
    },
  }
  one, other = jax.jit(ordinary_step(loss_fn, tx), **options), jax.jit(STEPS[fused](tx), **options)
  want, got = (None, params, state), (None, params, state)
  for _ in range(3):
    want, got = one(*want[1:], x), other(*got[1:], x)
  assert_same_bits(got, want)


@pytest.mark.parametrize("leaf", [np.ones(3, np.float32), jnp.ones(3)], ids=["numpy", "one device"])
def test_params_without_a_mesh_are_refused(leaf):
  with pytest.raises(ValueError, match=r"params\['w'\] has .*; a NamedSharding is needed"):
    mpo.state_sharding({"w": leaf}, optax.sgd(1.0).init({"w": leaf}))
