"""The bf16 codec against a float64 reference and its own laws. `benchmarks/sweep_codec.py` tests all 2^32 patterns."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from optax_mpo._codecs import bf16, codec
from tests import reference

SPECIAL = np.array(
  [
    *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000),
    *(0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFF7F, 0x7F7FFF80, 0x7F7FF7FF, 0x7F7FF800),
    *(0x7F800000, 0xFF800000, 0x3F7F8000, 0x3F7FFFFF, 0x3F808000, 0x3F818000, 0xBF808000, 0x3F80807F, 0x3F800080),
  ],
  np.uint32,
).view(np.float32)
NANS = np.array([0x7F800001, 0x7F808000, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)


def sample(count: int = 1 << 18, seed: int = 0) -> np.ndarray:
  """All exponents with random mantissas, numbers around bf16 numbers and ties, and the special numbers."""
  rng = np.random.default_rng(seed)
  patterns = rng.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
  near = (rng.integers(0, 1 << 17, count).astype(np.uint32) << 15) + rng.integers(-3, 4, count).astype(np.uint32)
  x = np.concatenate([patterns, near]).view(np.float32)
  return np.concatenate([x[~np.isnan(x)], SPECIAL])


def bits_of(x) -> np.ndarray:
  x = np.asarray(x)
  return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


split = jax.jit(bf16.split, static_argnums=1)
join = jax.jit(bf16.join)


@pytest.mark.parametrize("bits", bf16.BITS)
def test_split_and_join_round_as_the_reference_does(bits):
  x = sample()
  low, kept = split(x, bits)
  # The upper half is the stored number, rounded once more.
  stored = reference.to_stored(x, bits)
  np.testing.assert_array_equal(np.asarray(join(low, kept)).astype(np.float64), stored)
  np.testing.assert_array_equal(np.asarray(low).astype(np.float64), reference.to_bf16(stored.astype(np.float32)))


def test_16_bits_lose_nothing():
  x = sample(seed=1)
  np.testing.assert_array_equal(bits_of(join(*split(x, 16))), bits_of(x))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_stored_number_splits_to_itself(bits):
  low, kept = split(sample(seed=2), bits)
  again_low, again_kept = split(join(low, kept), bits)
  np.testing.assert_array_equal(bits_of(again_low), bits_of(low))
  np.testing.assert_array_equal(np.asarray(again_kept), np.asarray(kept))


@pytest.mark.parametrize("bits", bf16.BITS)
def test_nan_stays_nan(bits):
  low, kept = split(NANS.view(np.float32), bits)
  assert np.isnan(np.asarray(low).astype(np.float32)).all()
  np.testing.assert_array_equal(bits_of(join(low, kept)), np.full(NANS.shape, 0x7FC00000, np.uint32))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_pair_joins_to_a_number_that_rounds_to_its_upper_half(bits):
  # All 2^16 upper halves, each with extreme and random bits. Some are pairs that split never makes. They arise when
  # other code changes a weight but not its bits.
  low = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  edge = 1 << (bits - 1)
  rng = np.random.default_rng(0)
  for value in [0, 1, edge - 1, edge, edge + 1, 2 * edge - 1, rng.integers(0, 2 * edge, low.shape)]:
    kept = jnp.asarray(np.broadcast_to(value, low.shape)).astype(codec.bits_dtype(bits))
    back = split(join(low, kept), 0)[0]
    same = (bits_of(back) == bits_of(low)) | (np.isnan(low.astype(np.float32)) & np.isnan(np.asarray(back, np.float32)))
    assert same.all(), (low[~same][:5], value)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 0, 3)])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_shapes_and_dtypes(shape, bits):
  low, kept = split(jnp.full(shape, 1 / 3), bits)
  assert (low.shape, low.dtype) == (shape, jnp.bfloat16)
  assert (kept.shape, kept.dtype) == (shape, {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}[bits])
  assert join(low, kept).shape == shape


def opposites(count: int = 1 << 16) -> list[tuple[str, np.ndarray, np.ndarray]]:
  """Master weights and updates at every ratio of old to new, above all with cancellation."""
  rng = np.random.default_rng(0)

  def pick(low: int, high: int) -> np.ndarray:
    return rng.integers(low, high, count, dtype=np.int64)

  def f32(patterns: np.ndarray) -> np.ndarray:
    return (patterns & 0xFFFFFFFF).astype(np.uint32).view(np.float32)

  anything, sign, exponent = pick(0, 1 << 32), pick(0, 2) << 31, pick(1, 254) << 23
  cases = [("random", f32(anything), f32(pick(0, 1 << 32)))]
  for k in (0, 1, 2, 3, 16, 300, 1 << 14):
    cases.append((f"cancel_to_{k}_ulp", f32(anything), -f32(anything + pick(-k, k + 1))))
  for k in (300, 1 << 15):
    cases.append((f"power_of_two_{k}", f32((exponent + pick(-k, k)) | sign), -f32((exponent + pick(-k, k)) | sign)))
  tiny = pick(0, 30 << 23)
  cases.append(("tiny", f32(tiny | sign), f32(pick(0, 30 << 23) | sign)))
  cases.append(("tiny_cancel", f32(tiny | sign), -f32(np.maximum(tiny + pick(-500, 500), 0) | sign)))
  cases.append(("no_update", f32(anything), np.zeros(count, np.float32)))
  huge = np.array([0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF], np.uint32).view(np.float32)
  cases.append(("to_and_from_infinite_bf16", np.repeat(huge, 4), np.tile(np.float32([-1e38, 1e31, -2e31, 0]), 3)))
  return cases


@pytest.mark.parametrize(("name", "master", "update"), opposites(), ids=[c[0] for c in opposites(1)])
def test_add_difference_leads_to_the_new_weight_at_any_ratio(name, master, update):
  @jax.jit
  def step(master, update):
    old, new = bf16.split(master, 16)[0], bf16.split(master + update, 16)[0]
    return old, new, bf16.difference(old, new)

  old, new, u = step(master, update)
  got = jax.jit(bf16.add_difference)(old, u)  # a separate program, so that the update passes through memory
  # The only exception is an update that overflows f32.
  with np.errstate(invalid="ignore"):
    in_range = np.abs(np.asarray(new, np.float64) - np.asarray(old, np.float64)) < 3.39e38
  in_range |= bits_of(old) == bits_of(new)
  np.testing.assert_array_equal(bits_of(got)[in_range], bits_of(new)[in_range])


@pytest.mark.parametrize(("name", "master", "update"), opposites(), ids=[c[0] for c in opposites(1)])
def test_plain_addition_comes_out_near_the_new_weight(name, master, update):
  """The stated bound of optax.apply_updates: within 2^-13 of the old weight plus 2^-99, and mostly exact."""
  old, new = split(master, 0)[0], jax.jit(lambda m, u: bf16.split(m + u, 0)[0])(master, update)
  u = jax.jit(bf16.difference)(old, new)
  got = jax.jit(optax.apply_updates)(old, u)
  old, new, got = (np.asarray(a, np.float64) for a in (old, new, got))
  with np.errstate(invalid="ignore"):
    finite = np.isfinite(old) & np.isfinite(new) & (np.abs(new - old) < 3.39e38)
  error = np.abs(got[finite] - new[finite])
  assert (error <= np.abs(old[finite]) * 2.0**-13 + 2.0**-99).all()
  ordinary = (np.abs(new[finite]) > np.abs(old[finite]) * 2.0**-15) & (np.abs(old[finite]) > 2.0**-99)
  np.testing.assert_array_equal(error[ordinary], 0)


def test_add_difference_is_addition_for_other_updates():
  rng = np.random.default_rng(3)
  old = jnp.asarray(rng.normal(size=10_000).astype(ml_dtypes.bfloat16))
  u = jnp.asarray(rng.normal(size=10_000) * 10.0 ** rng.uniform(-6, 2, 10_000), jnp.float32)
  # The sum of a bf16 and an f32 number, rounded once to f32 and once to bf16.
  total = np.asarray(old, np.float32) + np.asarray(u)
  np.testing.assert_array_equal(np.asarray(bf16.add_difference(old, u), np.float64), reference.to_bf16(total))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_zero_update_moves_nothing(zero):
  old = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
  old = old[~np.isnan(old.astype(np.float32))]
  got = jax.jit(bf16.add_difference)(old, jnp.full(old.shape, zero))
  np.testing.assert_array_equal(bits_of(got), bits_of(old))
