"""`packed`: the same training with fewer arrays."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import optax_mpo as mpo
import optax_mpo.checkpoint
import optax_mpo.flax
from tests.helpers import assert_same_bits, ordinary_step, quick_jit

adamw = optax.adamw(1e-2)
clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(1e-2), optax.adam(1e-2))
STORAGES = {
  "16 bits": lambda tx: mpo.exact(tx),
  "8-bit state": lambda tx: mpo.compact(tx),
  "4 bits": lambda tx: mpo.compensated(tx, extra_bits=4),
  "stochastic": lambda tx: mpo.compensated(tx, extra_bits=0, rounding="stochastic", seed=1),
  "recorded": lambda tx: mpo.compensated(optax.chain(mpo.record_norms(), tx)),
}


def make_params(layers=3):
  def normal(i, *shape):
    return 0.1 * jax.random.normal(jax.random.key(i), shape)

  return {
    f"layer{i}": {"w": normal(i, 128, 128), "b": normal(i, 128), "norm": 1 + normal(i, 128)} for i in range(layers)
  }


def loss_fn(params, x):
  for p in params.values():
    x = jnp.tanh((x * p["norm"][None]) @ p["w"] + p["b"][None])
  return jnp.mean(x.astype(jnp.float32) ** 2)


X = jnp.linspace(-1, 1, 8 * 128).reshape(8, 128).astype(jnp.bfloat16)


def trained(make, tx, steps=3, jit=quick_jit):
  params, state = mpo.init(tx, make_params())
  step = jit(make(loss_fn, tx))
  for _ in range(steps):
    _, params, state = step(params, state, X)
  assert step._cache_size() == 1
  return params, state


@pytest.mark.parametrize("make", [ordinary_step, mpo.value_and_update], ids=["ordinary", "value_and_update"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.few(1, full=5)
def test_training_has_the_bits_that_it_has_without(storage, make):
  store = STORAGES[storage]
  params, state = trained(make, mpo.packed(store(adamw)))
  want, plain = trained(make, store(adamw))
  assert_same_bits(params, want)
  assert_same_bits(mpo.unpacked(state), plain)
  assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(plain)) - 10


@pytest.mark.parametrize("where", ["inside", "outside", "of loss_scaled"])
@pytest.mark.few(1)
def test_coupled_updates_in_two_passes(where):
  tx, want_tx = {
    "inside": (mpo.exact(mpo.packed(clipped)), mpo.exact(clipped)),
    "outside": (mpo.packed(mpo.exact(clipped)), mpo.exact(clipped)),
    "of loss_scaled": (mpo.packed(mpo.loss_scaled(mpo.exact(adamw), 8.0)), mpo.loss_scaled(mpo.exact(adamw), 8.0)),
  }[where]

  def make(loss, tx):
    return mpo.value_and_update(loss, tx, two_pass=True)

  params, state = trained(make, tx)
  want, plain = trained(make, want_tx)
  assert_same_bits(params, want)
  assert_same_bits(mpo.unpacked(state), plain)


def test_gradient_release_is_as_without():
  tables = []
  for tx in (mpo.exact(adamw), mpo.packed(mpo.exact(adamw))):
    params, state = mpo.init(tx, make_params())
    tables.append(str(mpo.explain(loss_fn, tx, params, state, X)))
  assert tables[0] == tables[1]
  assert tables[0].count("at once") == 9


def test_what_is_packed():
  tree = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2)), "c": jnp.ones(5), "n": jnp.int32(7), "big": jnp.ones(6)}
  state = mpo.packed(optax.trace(0.9), at_most=5).init(tree)
  assert [x.shape for x in state.arrays] == [(12,)]  # one array of a dtype stays as it is
  assert state.rest.trace["big"].shape == (6,)
  assert state.rest.trace["n"].shape == ()
  assert_same_bits(mpo.unpacked(state), optax.trace(0.9).init(tree))
  keys = mpo.packed(optax.GradientTransformation(lambda p: p, lambda u, s, p=None: (u, s)))
  tree = {"k": jax.random.key(0), "l": jax.random.key(1), "f": jnp.ones(2, jnp.uint4), "g": jnp.ones(3, jnp.uint4)}
  assert keys.init(tree).arrays == ()
  assert_same_bits(mpo.unpacked(keys.init(tree)), tree)


def test_functions_that_read_a_state():
  store = STORAGES["8-bit state"]
  tx, plain_tx = mpo.packed(store(adamw)), store(adamw)
  params, state = mpo.init(tx, make_params())
  plain = mpo.unpacked(state)
  assert_same_bits(mpo.master_params(params, state), mpo.master_params(params, plain))
  assert_same_bits(mpo.dequantized(state), mpo.dequantized(plain))
  assert_same_bits(mpo.convert(plain_tx, params, state), (params, plain))
  assert_same_bits(mpo.convert(tx, params, plain), (params, state))
  assert_same_bits(mpo.convert(mpo.exact(mpo.packed(adamw)), params, state)[0], params)
  assert_same_bits(pickle.loads(pickle.dumps(state)), state)
  scaled = mpo.packed(mpo.loss_scaled(mpo.exact(adamw), 8.0, growth_interval=1))
  assert float(mpo.loss_scale(mpo.init(scaled, make_params())[1])) == 8
  recording = mpo.packed(STORAGES["recorded"](adamw))
  assert set(mpo.recorded(mpo.init(recording, make_params())[1])) == {"grad_norm"}


def test_a_packed_state_inside_another():
  tx = mpo.packed(mpo.exact(mpo.packed(adamw)))
  params, state = trained(mpo.value_and_update, tx)
  want, plain = trained(mpo.value_and_update, mpo.exact(adamw))
  assert_same_bits((params, mpo.unpacked(state)), (want, plain))
  assert_same_bits(mpo.convert(tx, want, plain)[1], state)


def test_large_leaves_keep_their_shardings():
  mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  for store in (mpo.exact, mpo.compact):
    params, state = jax.eval_shape(lambda p, store=store: mpo.init(mpo.packed(store(adamw)), p), make_params())
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=split), params)
    shardings = mpo.state_sharding(params, state)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    for leaf, sharding in zip(jax.tree.leaves(state.rest), jax.tree.leaves(shardings.rest), strict=True):
      assert (sharding.spec == PartitionSpec("data")) == (leaf.shape[:1] == (128,))
    assert all(s.spec == PartitionSpec() for s in shardings.arrays)


def test_a_checkpoint(tmp_path):
  tx = mpo.packed(mpo.compact(adamw))
  params, state = trained(mpo.value_and_update, tx)
  with mpo.checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, (params, state))
    step, restored = checkpointer.restore((params, state))
  assert step == 3
  assert_same_bits(restored, (params, state))


def test_flax():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([nnx.Linear(128, 128, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
      for layer in self.layers:
        x = layer(x)
      return x

  def run(tx):
    model = Net(nnx.Rngs(0))
    optimizer = mpo.flax.Optimizer(model, tx)
    for _ in range(2):
      optimizer.step_with(model, lambda m, x: jnp.mean(m(x).astype(jnp.float32) ** 2), X)
    return nnx.state(model, nnx.Param)

  for a, b in zip(*(jax.tree.leaves(run(tx)) for tx in (mpo.exact(adamw), mpo.packed(mpo.exact(adamw)))), strict=True):
    np.testing.assert_array_equal(a, b)


def test_errors():
  with pytest.raises(TypeError, match=r"packed: inner has to be an Optax transformation"):
    mpo.packed(1e-3)
  for wrong in (0, 1.5, True):
    with pytest.raises(ValueError, match="packed: at_most has to be a number of elements"):
      mpo.packed(adamw, at_most=wrong)
  params = make_params()
  with pytest.raises(TypeError, match="packed: update was given a tuple"):
    mpo.packed(adamw).update(params, adamw.init(params), params)
  with pytest.raises(ValueError, match="unpacked: nothing in opt_state is packed"):
    mpo.unpacked(adamw.init(params))


@pytest.mark.full
def test_a_gpu_writes_small_leaves_with_fewer_kernels(tmp_path):
  def kernels(name, tx):
    params, state = jax.eval_shape(lambda p: mpo.init(tx, p), make_params(16))
    step = ordinary_step(loss_fn, tx)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    report = mpo.gpu_memory(step, params, state, x, donate_argnums=(0, 1), target="h100", dump_to=tmp_path / name)
    (text,) = (path.read_text() for path in (tmp_path / name).glob("*gpu_after_optimizations.txt"))
    return text[text.index("\nENTRY") :].count(" fusion("), report.total_bytes

  (without, bytes_without), (packed, bytes_packed) = (
    kernels("plain", mpo.exact(adamw)),
    kernels("packed", mpo.packed(mpo.exact(adamw))),
  )
  assert packed <= without - 20
  assert bytes_packed <= bytes_without * 1.01
