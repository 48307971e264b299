"""Storage through the public API: what is stored, that small updates survive, and the errors."""

import dataclasses
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_mpo as mpo
from optax_mpo._codecs import fp16
from tests import reference

BITS = (0, 4, 8, 16)
KEPT_DTYPES = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}


def is_masked_node(x) -> bool:
  return isinstance(x, optax.MaskedNode)


# --- Small updates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_small_updates_survive(bits):
  """Makes 200 updates of 2^-11.2 to weights between 1 and 2. Half a bf16 ulp is 2^-8, so plain bf16 does not move.

  The bound: each step rounds the master to the nearest number with 8 + bits significand bits. It is at most half an
  ulp of [1, 2) away, 2^-(8 + bits), so 200 steps add up to 200 times that. (f32's own rounding, 2^-24 per step on
  both sides, is within the added 2^-16.) From 4 bits on, this is less than the total distance.
  """
  steps, size = 200, 2.0**-11.2
  start = jnp.linspace(1.2, 1.9, 1001)
  tx = mpo.compensated(optax.sgd(size), extra_bits=bits)
  params, state = mpo.init(tx, start)
  first = params

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jnp.ones_like(params), state, params)
    return mpo.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  if bits == 0:
    np.testing.assert_array_equal(params, first)
    return
  way = steps * size
  error = np.abs(np.asarray(mpo.master_params(params, state)) - (np.asarray(start) - way))
  bound = (steps + 1) * 2.0 ** -(8 + bits) * (bits < 16) + 2.0**-16
  assert error.max() <= bound
  assert bound < 0.6 * way


# --- What is kept -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
  w: Any
  b: Any


jax.tree_util.register_dataclass(Layer, data_fields=["w", "b"], meta_fields=[])


@flax.struct.dataclass
class Block:
  layer: Any
  name: str = flax.struct.field(pytree_node=False, default="block")


SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), 1e-45, -1e-40, 3.4028235e38, -3.3961777e38, 1.00390625, 1 / 3]
shapes = st.sampled_from([(), (0,), (1,), (7,), (3, 2), (7, 3), (0, 2), (1, 1), (2, 3, 7), (3, 1, 2)])  # few to compile
seeds = st.integers(0, 2**31)


@st.composite
def arrays(draw):
  shape, rng = draw(shapes), np.random.default_rng(draw(seeds))
  x = np.asarray(rng.integers(0, 1 << 32, shape, dtype=np.uint64)).astype(np.uint32).view(np.float32)
  special = np.asarray(rng.choice(np.float32(SPECIAL), shape))
  return jnp.asarray(np.where(np.isnan(x) | np.asarray(rng.random(shape) < 0.2), special, x).astype(np.float32))


# In a dict, since Optax takes params=None to mean that there are no params.
trees = st.recursive(
  arrays() | st.none(),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    | st.tuples(inner, inner)
    | st.builds(Layer, inner, inner)
    | st.builds(Block, inner)
  ),
  max_leaves=6,
).map(lambda tree: {"tree": tree})


@settings(deadline=None, max_examples=40, derandomize=True)
@given(params=trees, bits=st.sampled_from(BITS))
def test_any_tree_is_stored_as_the_reference_rounds_it(params, bits):
  tx = mpo.compensated(optax.identity(), extra_bits=bits)
  low, state = mpo.init(tx, params)

  chex.assert_trees_all_equal_structs(low, params)
  assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(low))
  if bits:
    chex.assert_trees_all_equal_structs(state.compensation, params)
    assert all(c.dtype == KEPT_DTYPES[bits] for c in jax.tree.leaves(state.compensation))
    chex.assert_trees_all_equal_shapes(state.compensation, params)
  else:
    assert not jax.tree.leaves(state.compensation)

  def check(x, master):
    np.testing.assert_array_equal(np.asarray(master, np.float64), reference.to_stored(np.asarray(x), bits))
    np.testing.assert_array_equal(np.signbit(master), np.signbit(x))

  jax.tree.map(check, params, mpo.master_params(low, state))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(params=trees, bits=st.sampled_from(BITS))
def test_updates_of_zero_change_nothing(params, bits):
  # No subnormal weights: XLA:CPU flushes them in the inner transformation's own addition, as in plain f32 Optax.
  # codecs/test_bf16.py tests the codec on subnormals.
  params = jax.tree.map(lambda p: jnp.where(jnp.abs(p) < 2.0**-126, 0, p), params)
  tx = mpo.compensated(optax.scale(0.0), extra_bits=bits)
  low, state = mpo.init(tx, params)
  grads = jax.tree.map(jnp.ones_like, low)
  updates, new_state = tx.update(grads, state, low)
  for apply_updates in (mpo.apply_updates, optax.apply_updates):
    chex.assert_trees_all_equal(apply_updates(low, updates), low)
  chex.assert_trees_all_equal(new_state, state)


def test_mixed_trees_keep_bits_for_what_goes_low():
  params = {"w": jnp.ones((3, 5)), "scale": jnp.ones(5), "frozen": None, "empty": {}}
  tx = mpo.compensated(optax.adam(1e-3), extra_bits=4)
  low, state = mpo.init(tx, params, where=lambda path, leaf: "scale" not in jax.tree_util.keystr(path))
  assert (low["w"].dtype, low["scale"].dtype, low["frozen"]) == (jnp.bfloat16, jnp.float32, None)
  assert state.compensation["w"].dtype == jnp.uint4
  assert is_masked_node(state.compensation["scale"])
  assert all(m.dtype == jnp.float32 for m in jax.tree.leaves(state.inner_state[0].mu))
  updates, state = tx.update(low, state, low)
  assert jax.tree.structure(mpo.apply_updates(low, updates)) == jax.tree.structure(low)


def test_init_sees_the_f32_weights_inside():
  seen = []
  spy = optax.GradientTransformation(lambda p: (seen.append(p), optax.EmptyState())[1], optax.identity().update)
  x = {"w": jnp.float32([1 / 3, 1e-3])}
  mpo.init(optax.chain(mpo.compensated(spy)), x)
  chex.assert_trees_all_equal(seen, [x])


def test_tx_init_starts_from_the_rounded_weights():
  low = mpo.cast({"w": jnp.float32([1 / 3, 1e-3])})
  state = mpo.compensated(optax.adam(1e-3)).init(low)
  chex.assert_trees_all_equal(mpo.master_params(low, state), jax.tree.map(lambda p: p.astype(jnp.float32), low))


def test_continuing_from_params_that_are_low_already():
  low = mpo.cast({"w": jnp.float32([1 / 3])})
  again, state = mpo.init(mpo.compensated(optax.adam(1e-3)), low)
  chex.assert_trees_all_equal(again, low)
  chex.assert_trees_all_equal(state.compensation, {"w": jnp.zeros(1, jnp.uint16)})


def test_frozen_leaves_in_low_precision():
  """As in LoRA: leaves that are cast before init take 2 bytes and need no bits."""
  params = {"base": mpo.cast(jnp.ones(3)), "lora": jnp.ones(3)}
  tx = optax.multi_transform(
    {"train": mpo.compensated(optax.sgd(1e-3)), "freeze": optax.set_to_zero()}, {"base": "freeze", "lora": "train"}
  )
  params, state = mpo.init(tx, params)
  updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  new = mpo.apply_updates(params, updates)
  chex.assert_trees_all_equal(new["base"], params["base"])
  np.testing.assert_array_equal(mpo.master_params(new, state)["lora"], np.float32(1) - np.float32(1e-3))


def test_8_bits_round_once_more_before_bf16():
  # bf16 alone rounds 1 + 2^-8 - 2^-20 down. 24 bits round it up to the tie 1 + 2^-8, and bf16 rounds that away from 0.
  x = jnp.float32(1 + 2.0**-8 - 2.0**-20)
  low, state = mpo.init(mpo.compensated(optax.identity(), extra_bits=8), x)
  assert float(low) == 1 + 2.0**-7
  assert float(mpo.master_params(low, state)) == 1 + 2.0**-8


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_master_rounds_to_params_after_optax_apply_updates_at_extreme_ratios(bits):
  rng = np.random.default_rng(0)
  master = (rng.normal(size=4096) * 2.0 ** rng.integers(-60, 60, 4096)).astype(np.float32)
  master[:1024] = np.float32(2.0) ** rng.integers(-60, 60, 1024)  # the worst case, which needs 25 bits
  tx = mpo.compensated(optax.scale(-1.0), extra_bits=bits)
  params, state = mpo.init(tx, jnp.asarray(master))
  grads = jnp.nextafter(mpo.master_params(params, state), jnp.inf) * jnp.float32(1 + 2.0**-22)
  updates, state = tx.update(grads, state, params)
  new = jnp.abs(mpo.master_params(mpo.apply_updates(params, updates), state))
  assert float(jnp.max(new / jnp.abs(master))) < 2.0**-16  # the ratios are extreme
  result = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(mpo.cast(mpo.master_params(result, state)), result)


def test_extreme_ratio_is_exact_with_mpo_apply_updates():
  # The master is 1 - 3 2^-24, its bf16 is 1, and the new weight is -3 2^-24. The difference of the two needs 25 bits.
  master = jnp.float32([1 - 3 * 2.0**-24])
  tx = mpo.compensated(optax.identity())
  params, state = mpo.init(tx, master)
  updates, state = tx.update(jnp.float32([-1.0]), state, params)
  exact = mpo.apply_updates(params, updates)
  np.testing.assert_array_equal(mpo.master_params(exact, state), np.float32([-3 * 2.0**-24]))
  near = optax.apply_updates(params, updates)
  assert abs(float(near[0]) + 3 * 2.0**-24) <= 2.0**-13


# --- Derivatives ------------------------------------------------------------------------------------------------------


def test_cast_has_the_derivative_of_astype():
  """With f32 masters and a cast inside the loss, mpo.cast has the same gradients as astype."""
  params = {"w": jnp.float32([0.3, -1.7]), "b": jnp.float32(0.1)}

  def loss(params, cast):
    return sum(jnp.sum(p.astype(jnp.float32) ** 2) for p in jax.tree.leaves(cast(params)))

  got = jax.jit(jax.grad(lambda p: loss(p, mpo.cast)))(params)
  # Both casts round these numbers alike and round the derivative to bf16, so the derivatives are equal.
  want = jax.grad(lambda p: loss(p, lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)))(params)
  chex.assert_trees_all_equal(got, want)
  assert all(jnp.all(g != 0) for g in jax.tree.leaves(got))


@pytest.mark.parametrize("bits", BITS)
def test_master_params_have_the_derivative_of_the_weights(bits):
  tx = mpo.compensated(optax.sgd(0.1), extra_bits=bits)
  params, state = mpo.init(tx, jnp.float32([0.3, -1.7]))
  got = jax.grad(lambda p: jnp.sum(mpo.master_params(p, state) * jnp.float32([2, 3])))(params)
  np.testing.assert_array_equal(got, jnp.bfloat16([2, 3]))


@pytest.mark.parametrize("apply_updates", [mpo.apply_updates, optax.apply_updates])
@pytest.mark.parametrize("bits", BITS)
def test_training_can_be_differentiated(bits, apply_updates):
  """Three steps of SGD on w^2: each is w -> (1 - 2 lr) w, so the last weight has d/d lr = -6 (1 - 2 lr)^2 w."""

  def last(learning_rate):
    tx = mpo.compensated(optax.sgd(learning_rate), extra_bits=bits)
    params, state = mpo.init(tx, jnp.float32(1.3))
    for _ in range(3):
      updates, state = tx.update(2 * params, state, params)
      params = apply_updates(params, updates)
    return params.astype(jnp.float32)

  want = -6 * (1 - 2 * 0.1) ** 2 * 1.3
  # Gradients, tangents and weights are bf16. Each of the three steps rounds a few times, by 2^-9 relative.
  assert float(jax.jacfwd(last)(0.1)) == pytest.approx(want, rel=0.03)
  assert float(jax.grad(last)(0.1)) == pytest.approx(want, rel=0.03)


# --- What is refused --------------------------------------------------------------------------------------------------


def make(bits=16):
  tx = mpo.compensated(optax.adam(1e-3), extra_bits=bits)
  params, state = mpo.init(tx, {"head": {"w": jnp.ones((2, 3))}, "b": jnp.ones(3)})
  return tx, params, state, jax.tree.map(jnp.ones_like, params)


@pytest.mark.parametrize("bits", [1, 12, 32, -8, 8.5, 8.0, "16", None, True, [8], np.float32(8)])
def test_wrong_bits(bits):
  with pytest.raises(ValueError, match=r"bits has to be one of \(0, 4, 8, 16\)"):
    mpo.compensated(optax.adam(1e-3), extra_bits=bits)


def test_bits_that_the_format_of_a_leaf_does_not_support(monkeypatch):
  tx, params, state, grads = make(bits=4)
  half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
  monkeypatch.setattr(fp16, "BITS", (0, 8, 16))
  words = r": params\['b'\] is float16, for which extra_bits has to be one of \(0, 8, 16\), but it is 4"
  with pytest.raises(ValueError, match="compensated" + words):
    mpo.init(tx, half | {"b": jnp.ones(3)}, dtype=jnp.float16)
  with pytest.raises(ValueError, match="compensated" + words):
    tx.update(grads, state, half)
  with pytest.raises(ValueError, match="lost_updates" + words):
    mpo.lost_updates(half, grads, 4)
  mpo.init(tx, params)  # bf16 supports them


@pytest.mark.parametrize(
  ("leaf", "words"),
  [
    (jnp.zeros(2, jnp.int32), "int32.*optax.masked"),
    (jnp.zeros(2, jnp.complex64), "complex64.*real and imaginary"),
    (np.zeros(2, np.float64), "float64.*float32 first"),
    (jax.random.key(0), "key.*optax.masked"),
    (3.5, "float, not an array"),
    ("text", "str, not an array"),
  ],
)
@pytest.mark.parametrize("init", [lambda tx, p: tx.init(p), mpo.init], ids=["tx.init", "mpo.init"])
def test_untrainable_leaves(init, leaf, words):
  with pytest.raises(TypeError, match=rf"params\['a'\]\[1\] is (a )?{words}"):
    init(mpo.compensated(optax.sgd(0.1)), {"a": [jnp.ones(2), leaf]})


def test_integer_leaves_can_be_masked_out():
  params = {"w": jnp.ones(2), "steps": jnp.zeros((), jnp.int32)}
  tx = optax.masked(mpo.compensated(optax.sgd(0.1)), {"w": True, "steps": False})
  low, state = mpo.init(tx, params)
  updates, state = tx.update({"w": jnp.ones(2), "steps": jnp.ones((), jnp.int32)}, state, low)
  assert mpo.apply_updates(low, updates)["steps"].dtype == jnp.int32


def test_wrapping_something_else():
  with pytest.raises(TypeError, match="inner has to be an Optax transformation, but it is a float"):
    mpo.compensated(0.1)


def test_update_without_params():
  tx, _, state, grads = make()
  with pytest.raises(ValueError, match=r"Call tx.update\(grads, state, params\)"):
    tx.update(grads, state)


@pytest.mark.parametrize(
  ("grads", "words"),
  [
    ({"head": {"w": jnp.ones((2, 3))}}, r"it has nothing at params\['b'\]"),
    ({"head": {"w": jnp.ones((2, 3))}, "b": jnp.ones(3), "c": jnp.ones(1)}, r"it has params\['c'\], which params has"),
    ({"head": {"v": jnp.ones((2, 3))}, "b": jnp.ones(3)}, r"it has nothing at params\['head'\]\['w'\]"),
    ({"head": [jnp.ones((2, 3))], "b": jnp.ones(3)}, r"it has nothing at params\['head'\]\['w'\]"),
    ({"head": {"w": jnp.ones((3, 2))}, "b": jnp.ones(3)}, r"params\['head'\]\['w'\] has shape \(2, 3\).*\(3, 2\)"),
    ({"head": {"w": jnp.ones((2, 3))}, "b": None}, r"params\['b'\]"),
  ],
)
def test_gradients_of_another_tree(grads, words):
  tx, params, state, _ = make()
  with pytest.raises(ValueError, match=words):
    tx.update(grads, state, params)
  with pytest.raises(ValueError, match=words):
    mpo.apply_updates(params, grads)


def test_integer_gradients():
  tx, params, state, grads = make()
  with pytest.raises(TypeError, match=r"update of params\['b'\] is int32"):
    tx.update({**grads, "b": jnp.ones(3, jnp.int32)}, state, params)


def test_params_of_another_dtype_than_at_init():
  tx, params, state, grads = make()
  with pytest.raises(ValueError, match=r"params\['b'\] is float32, but the state holds 16 compensation bits"):
    tx.update(grads, state, {**params, "b": params["b"].astype(jnp.float32)})
  f32_params = {"w": jnp.ones(2)}
  _, f32_state = mpo.init(tx, f32_params, where=lambda *_: False)
  with pytest.raises(ValueError, match=r"params\['w'\] is bfloat16.*the state holds none"):
    tx.update(f32_params, f32_state, mpo.cast(f32_params))
  with pytest.raises(TypeError, match=r"params\['b'\] is float64|params\['b'\] is int32"):
    tx.update(grads, state, {**params, "b": params["b"].astype(jnp.int32)})


def test_state_from_another_bits_and_the_way_out_that_the_error_names():
  tx, params, state, grads = make()
  other, _, other_state, _ = make(bits=8)
  with pytest.raises(ValueError, match=r"params\['b'\] is bfloat16.*keeps extra_bits=8.*holds 16.*_replace"):
    other.update(grads, state, params)
  with pytest.raises(ValueError, match=r"keeps extra_bits=16.*holds 8"):
    tx.update(grads, other_state, params)
  masters = mpo.master_params(params, state)
  low, new = mpo.init(other, masters)
  other.update(grads, new._replace(inner_state=state.inner_state), low)


def test_state_of_something_else():
  tx, params, state, grads = make()
  with pytest.raises(TypeError, match="given a tuple for its state"):
    tx.update(grads, (state,), params)
  with pytest.raises(
    ValueError, match=r"compensation has not the structure of params: it has nothing at params\['c'\]"
  ):
    tx.update({**grads, "c": grads["b"]}, state, {**params, "c": params["b"]})
  longer = {**params, "b": jnp.ones(4, jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"params\['b'\] has shape \(4,\), its bits have \(3,\)"):
    tx.update(longer, state, longer)


def test_init_refuses_to_lose_bits():
  params = {"w": jnp.ones(2), "v": jnp.ones(2)}
  with pytest.raises(ValueError, match=r"no compensated\(...\) in tx trains params\['v'\], params\['w'\]"):
    mpo.init(optax.adam(1e-3), params)
  with pytest.raises(ValueError, match=r"trains params\['v'\], so"):
    mpo.init(optax.masked(mpo.compensated(optax.adam(1e-3)), {"w": True, "v": False}), params)
  with pytest.raises(ValueError, match=r"params\['v'\] is trained by two compensated"):
    mpo.init(optax.chain(mpo.compensated(optax.identity()), mpo.compensated(optax.adam(1e-3))), params)
  with pytest.raises(ValueError, match=r"trains params\['v'\], params\['w'\].*optax.flatten and jit do"):
    mpo.init(optax.flatten(mpo.compensated(optax.adam(1e-3))), params)


def test_other_storage_dtypes():
  with pytest.raises(ValueError, match="dtype has to be bfloat16 or float16, but it is float8_e4m3:"):
    mpo.cast(jnp.ones(2), jnp.float8_e4m3)
  with pytest.raises(ValueError, match="dtype has to be bfloat16, float16 or float8_e4m3fn, but it is float8_e4m3:"):
    mpo.init(mpo.compensated(optax.sgd(1.0)), {}, dtype=jnp.float8_e4m3)
  with pytest.raises(ValueError, match=r"cast: float8_e4m3fn params need scales.*init"):
    mpo.cast(jnp.ones(2), jnp.float8_e4m3fn)


def test_master_params_of_a_state_without_bits_or_of_another_model():
  _, params, state, _ = make()
  with pytest.raises(ValueError, match="no CompensatedState in opt_state"):
    mpo.master_params(params, optax.adam(1e-3).init(params))
  with pytest.raises(ValueError, match=r"it has params\['b'\], which params has not"):
    mpo.master_params({"head": params["head"]}, state)
  with pytest.raises(ValueError, match=r"params\['b'\] is bfloat16\[4\], but its compensation bits.*\[3\]"):
    mpo.master_params({**params, "b": jnp.ones(4, jnp.bfloat16)}, state)
  with pytest.raises(ValueError, match="two states"):
    mpo.master_params(params, (state, state))
