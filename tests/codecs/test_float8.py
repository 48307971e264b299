"""The float8 codec against float64, and training with float8 params."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._codecs import codec, float8
from tests import reference
from tests.helpers import assert_same_bits, exact_jit, ordinary_step, quick_jit

F8 = jnp.float8_e4m3fn


def numbers(rows: int = 2000, length: int = 70) -> np.ndarray:
  """Blocks of any size, with elements of any size in them; edges of e4m3 and of rounding in the last rows."""
  rng = np.random.default_rng(0)
  sizes = 2.0 ** rng.integers(-90, 110, (rows, 1)) * 2.0 ** rng.integers(-40, 3, (rows, length))
  x = (rng.normal(size=(rows, length)) * sizes).astype(np.float32)
  edges = [
    448,
    463.9999,
    464,
    480,
    2.0**-6,
    2.0**-6 - 2.0**-30,
    2.0**-9,
    2.0**-10,
    2.0**-25,
    2.0**-26,
    0,
    1.0625,
    1.125,
  ]
  some = np.float32([*edges, *np.negative(edges)])
  rows_of_edges = np.zeros((len(some), length), np.float32)
  rows_of_edges[:, : len(some)] = some[None] / 512
  rows_of_edges[:, 0] = some
  return np.concatenate([x, rows_of_edges])


def raw(x: jax.Array) -> np.ndarray:
  return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("bits", float8.BITS)
def test_splitting_equals_rounding_in_float64(bits):
  x = numbers()
  low, kept = float8.split(jnp.asarray(x), bits)
  codes, scales, masters = reference.to_float8(x, bits)
  np.testing.assert_array_equal(np.asarray(low, np.float64), codes)
  np.testing.assert_array_equal(np.asarray(float8.join(low, kept), np.float64), masters)
  stored = np.repeat(np.asarray(kept.scales, np.int32), 32, axis=-1)[:, : x.shape[-1]]
  np.testing.assert_array_equal(np.ldexp(1.0, stored - 127), scales)
  np.testing.assert_array_equal(np.asarray(float8.decode(low, kept.scales), np.float64), codes * scales)
  assert low.dtype == F8
  assert kept.bits.dtype == codec.bits_dtype(bits)
  assert (kept.scales.shape, kept.scales.dtype) == ((len(x), 3), jnp.uint8)


@pytest.mark.parametrize("bits", float8.BITS)
def test_bounds_of_the_errors(bits):
  """Those that docs/compact.md has."""
  x = numbers()
  largest = np.repeat(np.abs(np.pad(x, [(0, 0), (0, 26)])).reshape(len(x), 3, 32).max(-1), 32, axis=-1)[:, :70]
  error = np.abs(np.asarray(float8.join(*float8.split(jnp.asarray(x), bits)), np.float64) - x)
  smallest = largest < 2.0**-92
  assert (error[smallest] <= np.maximum(np.abs(x[smallest]) * 2.0 ** -(4 + bits), 2.0 ** -(110 + bits))).all()
  x, error, largest = (a[largest >= 2.0**-91] for a in (x, error, largest))
  large = np.abs(x) >= largest * 2.0**-13
  assert (error[large] <= np.abs(x[large]) * 2.0 ** -(4 + bits)).all()
  assert (error[~large] <= largest[~large] * 2.0 ** -(17 + bits)).all()
  assert error[~large].max() > 0
  assert (error[large] > np.abs(x[large]) * 2.0 ** -(5 + bits)).any()  # the bound is tight


@pytest.mark.parametrize("bits", float8.BITS)
@pytest.mark.parametrize("scale", [127, 117, 27, 246])
@pytest.mark.few(2)
def test_every_code_with_all_bits_is_a_number_of_its_own(bits, scale):
  """Exhaustive: each code and each offset, beside a 448 that gives the block its scale, is kept by another split."""
  codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0x80, 0xFF])
  for offsets in np.array_split(np.arange(1 << bits), 1 << bits >> 8):
    low = np.broadcast_to(codes, (len(offsets), 253)).copy()
    kept = np.broadcast_to(offsets[:, None], low.shape).copy()
    kept[(low == 0) & (kept == 1 << bits >> 1)] = 0  # foreign
    low = np.pad(low.reshape(-1), (0, -low.size % 31)).reshape(-1, 31)
    kept = np.pad(kept.reshape(-1), (0, -kept.size % 31)).reshape(-1, 31)
    low = jnp.asarray(np.pad(low, [(0, 0), (1, 0)], constant_values=0x7E).view(F8))
    bits_of = jnp.asarray(np.pad(kept, [(0, 0), (1, 0)]), codec.bits_dtype(bits))
    given = low, codec.ScaledBits(bits_of, jnp.full((len(low), 1), scale, jnp.uint8))
    assert_same_bits(float8.split(float8.join(*given), bits), given)


@pytest.mark.parametrize("bits", float8.BITS)
def test_every_foreign_triple_rounds_to_its_param(bits):
  every = jnp.asarray(np.arange(256, dtype=np.uint8).view(F8))
  for scale in (0, 27, 100, 127, 200, 246, 255):
    unit = np.ldexp(1.0, np.clip(scale, 27, 246) - 127)
    for code in range(0, 1 << bits, max(1, (1 << bits) // 64)):
      kept = codec.ScaledBits(jnp.full(256, code, codec.bits_dtype(bits)), jnp.full(8, scale, jnp.uint8))
      with np.errstate(invalid="ignore"):
        units = np.asarray(float8.join(every, kept), np.float64) / unit
        rounded = reference.round_significand(units, 4, 2.0**-9)
      np.testing.assert_array_equal(rounded, np.asarray(every, np.float64))  # NaN equals NaN here
      np.testing.assert_array_equal(np.asarray(float8.decode(every, kept.scales), np.float64), np.asarray(every) * unit)


@pytest.mark.parametrize("bits", float8.BITS)
def test_splitting_again_changes_nothing(bits):
  x = jnp.asarray(numbers())
  low, kept = float8.split(x, bits)
  assert_same_bits(float8.split(float8.join(low, kept), bits), (low, kept))


@pytest.mark.parametrize("bits", float8.BITS)
def test_special_values(bits):
  x = jnp.float32([[jnp.inf, -jnp.inf, jnp.nan, 1.0, -0.0, 1e-45, -1e-20, 0.3]])
  low, kept = float8.split(x, bits)
  back = np.asarray(float8.join(low, kept))[0]
  assert np.isnan(back[:3]).all()
  assert np.isnan(np.asarray(low, np.float32)[0, :3]).all()
  np.testing.assert_allclose(back[3:], [1, 0, 0, 0, 0.3], atol=2.0**-12)  # the others keep their scale
  assert not np.asarray(kept.bits)[0, :3].any()
  assert not raw(low)[0, 4:7].any()  # zeros are +0
  top = jnp.float32([[jnp.finfo(jnp.float32).max, -jnp.finfo(jnp.float32).max, 1e38]])
  back = float8.join(*float8.split(top, bits))
  np.testing.assert_allclose(back, [[2.0**119 * 464, -(2.0**119) * 464, 1e38]], rtol=2.0**-4)  # clipped, finite
  tiny = float8.join(*float8.split(jnp.full((1, 3), 1e-42), bits))
  np.testing.assert_array_equal(tiny, 0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 0), (0, 5), (31,), (33,), (2, 3, 64)])
def test_shapes(shape):
  x = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
  low, kept = float8.split(x, 16)
  lead, length = shape[:-1], (shape or (1,))[-1]
  assert (low.shape, kept.bits.shape) == (shape, shape)
  assert kept.scales.shape == (*lead, max(-(-length // 32), 1))
  assert float8.zero_bits(low, 16).scales.shape == kept.scales.shape
  np.testing.assert_allclose(float8.join(low, kept), x, rtol=1e-5, atol=1e-9)
  assert float8.decode(low, kept.scales).shape == shape
  random = jnp.zeros(shape, jnp.uint32)
  assert float8.round_stochastically(x, random, 16).shape == shape


@pytest.mark.parametrize("bits", float8.BITS)
def test_stochastic_rounding_is_unbiased_and_keeps_what_can_be_kept(bits):
  random = jnp.asarray(np.random.default_rng(1).integers(0, 1 << 32, (1 << 12, 16), dtype=np.uint32))
  for center in (300.0, 1.0, 3e-3, 2.0**-12):
    exact = center * (1 + 0.3 * 2.0 ** -(3 + bits))
    x = jnp.full(random.shape, exact, jnp.float32).at[:, 0].set(400.0)
    rounded = float8.round_stochastically(x, random, bits)
    np.testing.assert_array_equal(float8.join(*float8.split(rounded, bits)), rounded)
    np.testing.assert_array_equal(float8.round_stochastically(rounded, random, bits), rounded)
    unit = max(2.0 ** (np.floor(np.log2(center)) - 3 - bits), 2.0 ** -(9 + bits))
    mean = np.mean(np.asarray(rounded[:, 1:], np.float64) - np.float64(x[0, 1]))
    assert mean == pytest.approx(0, abs=0.02 * unit)
  x = jnp.asarray(numbers())
  random = jnp.asarray(np.random.default_rng(2).integers(0, 1 << 32, x.shape, dtype=np.uint32))
  rounded = float8.round_stochastically(x, random, bits)
  np.testing.assert_array_equal(float8.join(*float8.split(rounded, bits)), rounded)
  # 463.99 of its block's scale may round up to 464, where that scale ends. The others then have to fit the next one.
  x = jnp.full((1, 32), 463.999999, jnp.float32).at[0, 1:].set(2.0 ** -(9 + bits))
  for random in (0, 0xFFFF_FFFF):
    rounded = float8.round_stochastically(x, jnp.full(x.shape, random, jnp.uint32), bits)
    np.testing.assert_array_equal(float8.join(*float8.split(rounded, bits)), rounded)


@pytest.mark.parametrize("bits", float8.BITS)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["operations", "jit"])
def test_updates_lead_to_their_weights(bits, jit):
  """At any ratio of old to new, and in two jits. Optax's own addition refuses float8 (JAX promotes it to nothing)."""
  rng = np.random.default_rng(2)
  old, new = numbers(500), rng.permutation(numbers(500), axis=0)
  tx = mpo.compensated(optax.stateless(lambda g, p: jax.tree.map(lambda n, o: n - o, g, p)), extra_bits=bits)
  low, state = mpo.init(tx, jnp.asarray(old), dtype=F8)
  before = mpo.master_params(low, state)
  updates, state = jit(tx.update)(jnp.asarray(new), state, low)
  params = jit(mpo.apply_updates)(low, updates)
  want = np.asarray(before + (jnp.asarray(new) - before))  # as f32 adds it
  codes, _, masters = reference.to_float8(want, bits)
  np.testing.assert_array_equal(np.asarray(params, np.float64), codes)
  np.testing.assert_array_equal(np.asarray(mpo.master_params(params, state), np.float64), masters)
  with pytest.raises(ValueError, match="promotion"):
    optax.apply_updates(low, updates)


def test_every_difference_of_two_codes_is_added_exactly():
  every = jnp.asarray(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0x80, 0xFF]).view(F8))
  old, new = (x.reshape(-1) for x in jnp.meshgrid(every, every))
  np.testing.assert_array_equal(float8.add_difference(old, float8.difference(old, new)), new)
  beyond = float8.add_difference(every[:2], jnp.float32([1e9, -1e9]))  # of an update that comes from elsewhere
  np.testing.assert_array_equal(beyond.astype(jnp.float32), [448, -448])


@pytest.mark.parametrize("bits", float8.BITS)
def test_training_equals_rounded_masters(bits):
  """Bit for bit: a plain Optax run whose masters are rounded, in float64, after each step."""
  rng = np.random.default_rng(0)
  w = {"w": jnp.asarray(rng.normal(size=(48, 40)) * 0.02, jnp.float32), "b": jnp.zeros(40)}
  data = jnp.asarray(rng.normal(size=(64, 48)), jnp.bfloat16)
  tx = optax.adam(1e-3)
  ours = mpo.compensated(tx, extra_bits=bits)

  def loss(p):
    return jnp.mean(jnp.square((data @ p["w"] + p["b"][None]).astype(jnp.float32) - 1))

  @exact_jit
  def master_step(low, p, s):
    g = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(low))
    u, s = tx.update(g, s, p)
    return optax.apply_updates(p, u), s

  @exact_jit
  def step(p, s):
    u, s = ours.update(jax.grad(loss)(mpo.decoded(p, s)), s, p)
    return mpo.apply_updates(p, u), s

  def rounded(p):
    parts = {k: reference.to_float8(np.asarray(v), bits) for k, v in p.items()}
    low = {k: jnp.asarray(codes * scales, jnp.bfloat16) for k, (codes, scales, _) in parts.items()}
    return low, {k: jnp.asarray(masters, jnp.float32) for k, (_, _, masters) in parts.items()}

  (low, want), state = rounded(w), tx.init(w)
  held = mpo.init(ours, w, dtype=F8)
  for _ in range(60):
    want, state = master_step(low, want, state)
    low, want = rounded(want)
    held = step(*held)
  assert held[0]["w"].dtype == F8
  assert_same_bits(mpo.master_params(*held), want)
  assert_same_bits(mpo.decoded(*held), low)
  assert_same_bits(held[1].inner_state, state)
  assert float(jnp.abs(want["w"] - w["w"]).max()) > 1e-2  # scales have changed


def test_formats_may_be_mixed():
  tx = mpo.compensated(optax.sgd(1e-4), extra_bits=8)
  a, state_a = mpo.init(tx, {"a": jnp.full(3, 1 / 3)}, dtype=F8)
  params, state = {**a, "b": jnp.full(3, 1 / 3, jnp.bfloat16), "c": jnp.ones(3)}, None
  state = tx.init(params)
  state = state._replace(compensation={**state.compensation, **state_a.compensation})
  updates, state = tx.update(jax.tree.map(lambda p: jnp.ones(p.shape), params), state, params)
  new = mpo.apply_updates(params, updates)
  chex.assert_trees_all_equal_dtypes(new, params)
  chex.assert_trees_all_equal(mpo.decoded(new, state)["b"], new["b"])
  for name, start in {"a": 1 / 3, "b": params["b"][0].astype(jnp.float32), "c": 1}.items():
    assert float(mpo.master_params(new, state)[name][0] - start) == pytest.approx(-1e-4, rel=0.3)


def test_params_that_are_float8_already_have_scales_of_one():
  params = jnp.asarray([1.0, -448.0, 2.0**-9], F8)
  tx = mpo.compensated(optax.sgd(1.0))
  state = tx.init(params)
  np.testing.assert_array_equal(mpo.master_params(params, state), [1, -448, 2.0**-9])
  updates, state = tx.update(jnp.float32([0, -447, 0]), state, params)
  np.testing.assert_array_equal(mpo.master_params(mpo.apply_updates(params, updates), state), [1, -1, 2.0**-9])


@pytest.mark.parametrize("bits", float8.BITS)
def test_members_of_an_ensemble_train_as_alone(bits):
  w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 40)), jnp.float32)
  tx = mpo.compensated(optax.adam(1e-2), extra_bits=bits)
  step = mpo.value_and_update(lambda p, x: jnp.sum((x @ p).astype(jnp.float32)), tx)
  params, state = jax.vmap(lambda w: mpo.init(tx, w, dtype=F8))(w)
  x = jnp.ones((2, 8), jnp.bfloat16)
  mapped = exact_jit(jax.vmap(step, in_axes=(0, 0, None)))(params, state, x)
  for i in range(3):
    alone = exact_jit(step)(*mpo.init(tx, w[i], dtype=F8), x)
    assert_same_bits(jax.tree.map(lambda a, i=i: a[i], mapped), alone)


def stack_loss(p, x):
  x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["layers"])
  return jnp.mean(jnp.square((x @ p["head"]).astype(jnp.float32) + p["b"][None].astype(jnp.float32)))


def stack_params():
  rng = np.random.default_rng(0)
  return {
    "layers": jnp.asarray(rng.normal(size=(4, 64, 64)) * 0.1, jnp.float32),
    "head": jnp.asarray(rng.normal(size=(64, 8)) * 0.1, jnp.float32),
    "b": jnp.zeros(8),
  }


TRANSFORMATIONS = {
  "adamw": lambda: mpo.compensated(optax.adamw(1e-3, weight_decay=0.1)),
  "8 bits": lambda: mpo.compensated(optax.adamw(1e-3, weight_decay=0.1), extra_bits=8),
  "stochastic": lambda: mpo.compensated(optax.sgd(1e-3, momentum=0.9), extra_bits=8, rounding="stochastic"),
  "8-bit state": lambda: mpo.compensated(mpo.quantized_state(optax.adam(1e-3), min_size=1), extra_bits=8),
  "kernels": lambda: mpo.with_kernels(mpo.compensated(mpo.quantized_state(optax.adam(1e-3), min_size=1))),
  "loss scale": lambda: mpo.loss_scaled(mpo.compensated(optax.adam(1e-3)), 1.0),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.few(1, full=2)
def test_gradient_release_equals_the_ordinary_step(name):
  tx = TRANSFORMATIONS[name]()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 64)), jnp.bfloat16)
  want = got = mpo.init(tx, stack_params(), dtype=F8, where=lambda path, leaf: leaf.ndim > 1)
  assert {p.dtype.name for p in jax.tree.leaves(got[0])} == {"float8_e4m3fn", "float32"}
  step = mpo.value_and_update(stack_loss, tx, two_pass=name == "loss scale")
  ordinary, released = quick_jit(ordinary_step(stack_loss, tx)), quick_jit(step)
  for _ in range(4):
    value, *want = ordinary(*want, x)
    found, *got = released(*got, x)
    assert float(found) == float(value)
  assert_same_bits(got, want)


def test_unrolled_layers_and_transposed_stacks_equal_the_ordinary_step():
  """These decode weights for each use, and layers where they lie on the second axis."""
  rng = np.random.default_rng(0)
  tx = mpo.compensated(optax.adamw(1e-3), extra_bits=8)
  x = jnp.asarray(rng.normal(size=(16, 160)), jnp.bfloat16)
  weights = {
    "stack": jnp.asarray(rng.normal(size=(160, 4, 160)) * 0.1, jnp.float32),
    "tied": jnp.asarray(rng.normal(size=(160, 160)) * 0.1, jnp.float32),
    "frozen": jnp.asarray(rng.normal(size=(160, 160)) * 0.1, jnp.float32),
  }

  def loss(p, x):
    x = jnp.tanh(x @ p["tied"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(p["stack"], 1, 0))
    x = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["tied"], x @ jax.lax.stop_gradient(p["frozen"]))
    return jnp.mean(jnp.square((x @ p["tied"].T).astype(jnp.float32)))

  want = got = mpo.init(tx, weights, dtype=F8)
  ordinary, released = quick_jit(ordinary_step(loss, tx)), quick_jit(mpo.value_and_update(loss, tx))
  for _ in range(3):
    value, *want = ordinary(*want, x)
    found, *got = released(*got, x)
    assert float(found) == float(value)
  assert_same_bits(got, want)
  assert [leaf.stepped for leaf in mpo.explain(loss, tx, *got, x)] == ["with a zero gradient", "in scan", "at once"]


def test_gradients_with_respect_to_codes_are_refused():
  tx = mpo.compensated(optax.sgd(1.0))
  params, state = mpo.init(tx, {"w": jnp.ones((2, 2))}, dtype=F8)
  grads = jax.grad(lambda p: jnp.sum(p["w"].astype(jnp.float32)))(params)
  with pytest.raises(TypeError, match=r"gradient of params\['w'\] is float8_e4m3fn.*decoded"):
    tx.update(grads, state, params)
  for read in (mpo.decoded, mpo.master_params):
    with pytest.raises(TypeError, match=r"float8_e4m3fn params cannot be differentiated.*decoded"):
      jax.grad(lambda p, read=read: jnp.sum(read(p, state)["w"].astype(jnp.float32)))(params)
  step = mpo.value_and_update(lambda p, x: jnp.sum(p["w"] * x.astype(jnp.bfloat16)), tx)
  with pytest.raises(TypeError, match="float8_e4m3fn params cannot be differentiated"):
    jax.grad(lambda x: mpo.master_params(*step(params, state, x)[1:])["w"].sum())(jnp.ones((2, 2)))


def test_what_has_no_scales_is_refused():
  w = {"w": jnp.ones((2, 2))}
  tx = mpo.compensated(optax.sgd(1.0))
  params, state = mpo.init(tx, w, dtype=F8)
  _, of_bf16 = mpo.init(tx, w)
  low = {"w": jnp.ones((2, 2), jnp.bfloat16)}
  both = {"v": params["w"], "w": params["w"]}
  of_one = optax.masked(tx, {"v": False, "w": True}).init(both)
  with pytest.raises(ValueError, match=r"params\['w'\] is float8_e4m3fn .* holds 16 compensation bits for it"):
    tx.update(low, of_bf16, params)
  with pytest.raises(ValueError, match=r"params\['w'\] is bfloat16 .* holds 16 compensation bits with scales"):
    tx.update(low, state, low)
  for read in (mpo.decoded, mpo.master_params):
    with pytest.raises(ValueError, match=r"params\['w'\] is float8_e4m3fn.*of another dtype|and another dtype"):
      read(params, of_bf16)
    with pytest.raises(ValueError, match="no CompensatedState"):
      read(params, optax.sgd(1.0).init(params))
    with pytest.raises(ValueError, match=r"params\['v'\] is float8_e4m3fn, and opt_state has no scales for it"):
      read(both, of_one)
  with pytest.raises(TypeError, match="decoded: params is an optimizer state"):
    mpo.decoded(state, params)
  with pytest.raises(ValueError, match="no CompensatedState"):
    mpo.value_and_update(lambda p: jnp.sum(p["w"]), optax.sgd(1.0))(params, optax.sgd(1.0).init(params))
  with pytest.raises(ValueError, match="no CompensatedState"):
    mpo.convert(optax.sgd(1.0), params, optax.sgd(1.0).init(params))
  with pytest.raises(ValueError, match=r"params\['w'\] is float8_e4m3fn, and its scales are in the state"):
    mpo.lost_updates(params, w, extra_bits=8)
  assert float(mpo.lost_updates(params, w, extra_bits=8, opt_state=state)["w"]) == 0


@pytest.mark.parametrize("bits", [0, 4])
def test_other_numbers_of_bits_are_refused(bits):
  with pytest.raises(
    ValueError, match=rf"float8_e4m3fn, for which extra_bits has to be one of \(8, 16\), but it is {bits}"
  ):
    mpo.init(mpo.compensated(optax.sgd(1.0), extra_bits=bits), {"w": jnp.ones(2)}, dtype=F8)


@pytest.mark.parametrize(
  ("wrap", "name"),
  [
    (lambda tx: optax.chain(optax.trace(0.9), tx), r"trace\['w'\]"),
    (lambda tx: optax.inject_hyperparams(lambda rate: mpo.compensated(optax.sgd(rate)))(rate=0.1), "rate"),
  ],
  ids=["trace", "inject_hyperparams"],
)
def test_state_in_the_dtype_of_the_params_is_refused(wrap, name):
  with pytest.raises(ValueError, match=rf"init: opt_state.*{name}.* is float8_e4m3fn.*put it inside"):
    mpo.init(wrap(mpo.compensated(optax.sgd(1.0))), {"w": jnp.ones(2)}, dtype=F8)


def test_fused_layers_are_refused():
  layer = mpo.fused_layer(lambda p, x: x @ p["w"])
  tx = mpo.compensated(optax.sgd(1.0))
  step = mpo.fused_value_and_update(lambda p, x: jnp.sum(layer(p, x)), tx)
  with pytest.raises(ValueError, match=r"fused layers read weights without the scales.*\['w'\].*value_and_update"):
    step(*mpo.init(tx, {"w": jnp.ones((2, 2))}, dtype=F8), jnp.ones((2, 2)))


def test_explain_names_products_that_run_in_f32():
  tx = mpo.compensated(optax.sgd(1.0))
  params, state = mpo.init(tx, {"w": jnp.ones((2, 2))}, dtype=F8)
  (leaf,) = mpo.explain(lambda p, x: jnp.sum(x @ p["w"].astype(x.dtype)), tx, params, state, jnp.ones((2, 2)))
  assert "cast that to bfloat16" in leaf.why
