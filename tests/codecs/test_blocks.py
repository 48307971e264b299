"""The block codec: round trips, range, decay, bad numbers and odd shapes, compared with FlashOptim's companding."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_mpo._codecs import blocks, levels

KINDS = ("signed", "nonnegative")


def numbers(kind: str, shape: tuple[int, ...] = (64, 96), seed: int = 0) -> jax.Array:
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return jnp.asarray(x if kind == "signed" else np.square(x))


def stored(x, kind: str, bits: int = 8, block_size: int = 32) -> blocks.Quantized:
  return blocks.quantize(x, levels.KINDS[kind](bits).dtype, block_size)


def assert_same(a: blocks.Quantized, b: blocks.Quantized) -> None:
  np.testing.assert_array_equal(a.values, b.values)
  np.testing.assert_array_equal(a.scales, b.scales)


@functools.partial(jax.jit, static_argnums=2)
def decayed(q: blocks.Quantized, step: jax.Array, beta: float) -> blocks.Quantized:
  return blocks.requantize(blocks.dequantize(q) * beta, q, step, 0)


# --- What is stored ---------------------------------------------------------------------------------------------------


def test_the_dtype_of_codes_says_their_kind():
  assert tuple(levels.KINDS) == get_args(levels.Kind)
  for name, kind in levels.KINDS.items():
    for bits in levels.BITS:
      assert levels.of(kind(bits).dtype).kind == name


@pytest.mark.parametrize("bits", levels.BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("length", "block_size", "count"), [(96, 32, 3), (100, 32, 4), (33, 32, 2), (5, 32, 1), (128, 128, 1), (1, 2, 1)]
)
def test_an_array_says_how_it_is_stored(bits, kind, length, block_size, count):
  x = numbers(kind, (3, 2, length))
  q = stored(x, kind, bits, block_size)
  assert q.values.shape == x.shape
  assert q.scales.shape == (3, 2, count)
  assert q.values.dtype == ("int" if kind == "signed" else "uint") + str(bits)
  assert q.scales.dtype == jnp.uint16
  # Each block alone gives the same as the whole array: blocks are independent.
  for i in range(0, length, block_size):
    part = stored(x[..., i : i + block_size], kind, bits, block_size)
    np.testing.assert_array_equal(blocks.dequantize(q)[..., i : i + block_size], blocks.dequantize(part))


def test_codes_are_those_of_the_formula():
  """The reference is float64 arithmetic, written from the module's description."""
  rng = np.random.default_rng(1)
  for kind in KINDS:
    x = np.asarray(numbers(kind, (8, 32)), np.float64) * 10.0 ** rng.uniform(-9, 9, (8, 1))
    mantissa, exponent = np.frexp(np.abs(x).max(-1, keepdims=True))
    scale = np.ldexp(np.floor(mantissa * 2**9 + 0.5) / 2**9, exponent)  # nine significand bits
    if kind == "signed":
      t = np.concatenate([np.arange(-128, 0) / 128, np.arange(128) / 127])
      levels = t / (2 - np.abs(t))
    else:
      t = (np.arange(256) + 0.5) / 255.5
      levels = 2 * t**2 / (1 + t)
    nearest = levels[np.abs(x[..., None] / scale[..., None] - levels).argmin(-1)] * scale
    np.testing.assert_allclose(blocks.dequantize(stored(jnp.asarray(x, jnp.float32), kind)), nearest, rtol=1e-5)


@pytest.mark.parametrize("bits", levels.BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_storing_again_changes_nothing(kind, bits):
  q = stored(numbers(kind, (64, 100)), kind, bits)
  assert_same(stored(blocks.dequantize(q), kind, bits), q)
  for step in range(32):
    assert_same(blocks.requantize(blocks.dequantize(q), q, jnp.int32(step), 4), q)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-35, 1e-30, 1e-16, 1e-8, 1.0, 1e5, 1e20, 3e38])
def test_range_is_that_of_f32(kind, size):
  x = jnp.abs(numbers(kind, (16, 32)))
  x = x / x.max(-1, keepdims=True) * np.float32(size)
  y = blocks.dequantize(stored(x, kind))
  assert bool(jnp.isfinite(y).all())
  np.testing.assert_allclose(y.max(-1), x.max(-1), rtol=2.0**-9)
  # Half of the widest gap between levels, which is at the top.
  assert float(jnp.abs(y - x).max() / size) < 0.5 * {"signed": 2 / 127, "nonnegative": 1.5 / 255}[kind] + 2.0**-9


def test_the_largest_number_stays_finite():
  largest = np.finfo(np.float32).max
  for kind in KINDS:
    assert np.isfinite(blocks.dequantize(stored(jnp.full((2, 32), largest), kind))).all()


def test_zeros_are_zero_and_small_second_moments_are_not():
  zeros = jnp.zeros((2, 32))
  for kind in KINDS:
    np.testing.assert_array_equal(blocks.dequantize(stored(zeros, kind)), zeros)
  x = zeros.at[0, 0].set(1.0)
  np.testing.assert_array_equal(blocks.dequantize(stored(x, "signed")), x)
  y = blocks.dequantize(stored(x, "nonnegative"))
  assert bool((y[0, 1:] > 0).all())  # optimizers divide by them
  assert float(y[0, 1:].max()) < 2e-5
  np.testing.assert_array_equal(y[1], zeros[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_poison_nothing(kind, bad):
  x = numbers(kind, (4, 64))
  q = stored(x, kind)
  worse = x.at[1, 3].set(bad)
  new = blocks.requantize(worse * 2, q, jnp.int32(0), 0)
  good = blocks.requantize(x * 2, q, jnp.int32(0), 0)
  y, want = blocks.dequantize(new), blocks.dequantize(good)
  assert bool(jnp.isfinite(y).all())
  np.testing.assert_array_equal(y[1, :32], blocks.dequantize(q)[1, :32])  # the bad number's block is unchanged
  np.testing.assert_array_equal(y[1, 32:], want[1, 32:])  # other blocks are not affected
  np.testing.assert_array_equal(jnp.delete(y, 1, 0), jnp.delete(want, 1, 0))
  assert bool(jnp.isfinite(blocks.dequantize(stored(worse, kind))).all())


def test_small_negative_second_moments_become_nothing():
  x = jnp.ones((1, 32)).at[0, 0].set(-1e-3)
  assert 0 <= float(blocks.dequantize(stored(x, "nonnegative"))[0, 0]) < 2e-5


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("dtype", ["int4", "int8", "uint4", "uint8"])
def test_numbers_are_rounded_in_proportion(dtype, negative):
  """A number rounds up if its fraction of the gap between two levels exceeds the threshold, for all levels."""
  kind, f32 = levels.of(jnp.dtype(dtype)), np.float32
  signed = kind.kind == "signed"
  top = float(jnp.iinfo(dtype).max) + (negative and signed)

  def level(code):
    t = (code + 0.5) / (top + 0.5)
    return code / (2 * top - np.abs(code)) if signed else 2 * t**2 / (1 + t)

  def position(x):
    return 2 * top * x / (1 + np.abs(x)) if signed else (x + np.sqrt(x * (x + 8))) / 4 * (top + 0.5) - 0.5

  np.testing.assert_allclose(position(level(np.arange(top))), np.arange(top), atol=1e-9)
  ways = np.linspace(0.01, 0.99, 99)[:, None]
  lower = np.arange(-top, 0) if negative and signed else np.arange(top)
  slack = 0.06 / top + 1e-4  # the error bound of `corrected`, and f32 rounding
  for shift in (-slack, slack):
    x = level(lower) + (ways + shift).clip(0, 1) * (level(lower + 1) - level(lower))
    part = jnp.asarray(position(x) - lower, f32)
    past = kind.is_past(part, kind.corrected(jnp.asarray(ways, f32)), jnp.asarray(lower[None], f32), f32(top))
    assert np.all(past == (shift > 0))


# --- From step to step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "beta", "bound"),
  [
    ("signed", 0.9, 0.15),
    ("signed", 0.99, 0.06),
    ("signed", 0.999, 0.03),
    ("nonnegative", 0.999, 0.03),
    ("nonnegative", 0.9999, 0.03),
  ],
)
def test_without_gradients_blocks_decay_as_floats_do(kind, beta, bound):
  """Checks the relative error of every element over 1000 steps, or until they decayed to 1e-25 of their start."""
  q = stored(numbers(kind, (32, 100)), kind)
  start = np.asarray(blocks.dequantize(q), np.float64)
  for step in range(min(1000, int(np.log(1e-25) / np.log(beta)))):
    new = decayed(q, jnp.int32(step), beta)
    np.testing.assert_array_equal(new.values, q.values)  # only scales move
    q = new
    want = start * beta ** (step + 1)
    np.testing.assert_allclose(np.asarray(blocks.dequantize(q), np.float64), want, rtol=bound)


@pytest.mark.parametrize(("kind", "beta"), [("signed", 0.9), ("signed", 0.99), ("nonnegative", 0.999)])
def test_elements_decay_beside_ones_that_do_not(kind, beta):
  """Elements get no more gradients while others in their block do. Rounding to nearest would freeze them."""
  x = jnp.ones((32, 32)).at[:, 1::2].set(0.5)
  q = stored(x, kind)
  steps = int(np.log(0.25) / np.log(beta))  # decays to a quarter

  @jax.jit
  def step_fn(q, step):
    y = blocks.dequantize(q)
    return blocks.requantize(jnp.where(jnp.arange(32) % 2 == 1, beta * y, 1.0), q, step, 0)

  for step in range(steps):
    q = step_fn(q, jnp.int32(step))
  left = np.asarray(blocks.dequantize(q))[:, 1::2]
  assert np.mean(left) == pytest.approx(0.5 * beta**steps, rel=0.06)
  np.testing.assert_allclose(blocks.dequantize(q)[:, 0], 1.0, rtol=2.0**-8)


def test_averages_are_unbiased():
  """The second moment of noise. Nearest rounding would overstate it: it keeps the large squares and drops the decay."""
  rng = np.random.default_rng(0)
  q, exact = stored(jnp.full((16, 64), 1.0), "nonnegative"), np.full((16, 64), 1.0)
  step_fn = jax.jit(lambda q, g2, t: blocks.requantize(0.999 * blocks.dequantize(q) + 0.001 * g2, q, t, 0))
  ratios = []
  for step in range(1500):
    squares = np.square(rng.normal(size=(16, 64))) * np.linspace(0.2, 1, 64) ** 2
    exact = 0.999 * exact + 0.001 * squares
    q = step_fn(q, jnp.asarray(squares, jnp.float32), jnp.int32(step))
    ratios.append(np.mean(np.asarray(blocks.dequantize(q)) / exact))
  assert np.mean(ratios[500:]) == pytest.approx(1, abs=0.02)


def test_rounding_depends_on_the_step_alone():
  x = numbers("signed", (4, 64))
  q = stored(x, "signed")
  moved = blocks.dequantize(q) * 0.999
  outcomes = [blocks.requantize(moved, q, jnp.int32(step % 16), 0) for step in range(32)]
  for a, b in zip(outcomes[:16], outcomes[16:], strict=True):
    assert_same(a, b)
  assert len({np.asarray(q.scales).tobytes() for q in outcomes}) > 4


# --- Against FlashOptim's companding, on moments from training --------------------------------------------------------


def softsign_int8(x: np.ndarray) -> np.ndarray:
  """The round trip of rows of 32 first moments in FlashOptim's format."""
  scale = np.abs(x).max(-1, keepdims=True)
  y = x / np.where(scale > 0, scale, 1)
  t = np.floor(127 * 2 * y / (1 + np.abs(y)) + 0.5) / 127
  return t / (2 - np.abs(t)) * scale.astype(np.float16).astype(np.float64)


def sqrt_uint8(x: np.ndarray) -> np.ndarray:
  """The round trip of rows of 32 second moments in FlashOptim's format."""
  root = np.sqrt(x)
  scale = root.max(-1, keepdims=True)
  t = np.floor(255 * root / np.where(scale > 0, scale, 1) + 0.5) / 255
  return np.square(t * scale.astype(np.float16).astype(np.float64))


def text() -> np.ndarray:
  """A random walk over 128 symbols with uneven probabilities, so that rows of the moments differ in size."""
  rng = np.random.default_rng(0)
  odds = rng.dirichlet(1 / np.arange(1, 129), size=128).cumsum(-1)
  walk, draws = [0], rng.random(20_000)
  for draw in draws:
    walk.append(min(int(np.searchsorted(odds[walk[-1]], draw)), 127))
  return np.array(walk, np.int32)


@functools.cache
def moments(b2: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """The moments of a small language model's matrices at five times during training with Adam."""
  rng, tokens = np.random.default_rng(0), text()
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = {"embed": (128, 64), "hidden": (512, 128), "head": (128, 128)}
  params = {n: jax.random.normal(k, s) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}
  tx = optax.adam(3e-3, b2=b2)

  def loss(params, window):
    x = params["embed"][window[:, :8]].reshape(len(window), -1)
    logits = jax.nn.gelu(x @ params["hidden"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 8]).mean()

  @jax.jit
  def step(params, state, window):
    updates, state = tx.update(jax.grad(loss)(params, window), state, params)
    return optax.apply_updates(params, updates), state

  state, mu, nu = tx.init(params), [], []
  for i in range(1, 121):
    starts = rng.integers(0, len(tokens) - 9, 128)
    params, state = step(params, state, tokens[starts[:, None] + np.arange(9)])
    if i % 24 == 0:
      mu += [np.asarray(x, np.float64) for x in jax.tree.leaves(state[0].mu)]
      nu += [np.asarray(x, np.float64) for x in jax.tree.leaves(state[0].nu)]
  return mu, nu


def nmse(xs: list[np.ndarray], round_trip) -> float:
  def one(x):
    return np.square(round_trip(x) - x).sum() / np.square(x).sum()

  return float(np.mean([one(x) for x in xs]))


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_round_trip_error_is_not_worse_than_flashoptims(b2):
  for kind, rival, xs in zip(KINDS, (softsign_int8, sqrt_uint8), moments(b2), strict=True):
    theirs = nmse(xs, lambda x, rival=rival: rival(x.reshape(-1, 32)).reshape(x.shape))
    ours = nmse(xs, lambda x, kind=kind: np.asarray(blocks.dequantize(stored(jnp.asarray(x, jnp.float32), kind))))
    print(f"{kind}: {ours:.3e} against {theirs:.3e}")
    assert ours <= theirs, kind
    assert ours < 4e-5


def test_range_failures_of_fp16_scales_are_absent():
  for size in (1e-8, 1e5):
    x = np.full((1, 32), size)
    with np.errstate(over="ignore", invalid="ignore"):
      assert not np.allclose(softsign_int8(x), x, rtol=0.1, atol=0)
    np.testing.assert_allclose(blocks.dequantize(stored(jnp.asarray(x, jnp.float32), "signed")), x, rtol=2.0**-9)


def test_shapes_that_no_block_size_explains():
  with pytest.raises(ValueError, match="no power of two cuts an axis of 100 into 99 blocks"):
    blocks.block_size_of(100, 99)
