"""8-bit state of unknown transformations: how to store it is derived from their dataflow."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import optax_mpo as mpo
from optax_mpo._core import wrapping
from optax_mpo._program import jax_forms
from optax_mpo._transforms import state_flow, state_kinds

SHAPE = (4, 64)


class Moments(NamedTuple):
  count: jax.Array
  first: Any
  second: Any


def transformation(update, starts=(jnp.zeros_like, jnp.zeros_like)) -> optax.GradientTransformationExtraArgs:
  """Makes a transformation of any tree from `update(g, count, first, second, p) -> (step, first, second)` of a leaf."""

  def init(params):
    return Moments(jnp.zeros([], jnp.int32), *(jax.tree.map(start, params) for start in starts))

  def update_all(grads, state, params=None, **extra):
    count = state.count + 1
    found = jax.tree.map(
      lambda g, m, v, p: update(g, count, m, v, p, **extra), grads, state.first, state.second, params
    )
    parts = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), found)
    return parts[0], Moments(count, *parts[1:])

  return optax.GradientTransformationExtraArgs(init, update_all)


def ema(old, new, decay):
  return decay * old + (1 - decay) * new


def lerp(old, new, decay):
  return old + (1 - decay) * (new - old)


def adam(g, c, m, v, p, average=ema):
  m, v = average(m, g, 0.9), average(v, g * g, 0.999)
  count = c.astype(jnp.float32)
  return -1e-3 * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8), m, v


def adam_by_lerp(*args):
  return adam(*args, average=lerp)


def rsqrt(g, c, m, v, p):
  m, v = ema(m, g, 0.9), ema(v, jnp.square(g), 0.99)
  return -1e-3 * m * lax.rsqrt(v + 1e-12), m, v


def adagrad(g, c, m, v, p):
  v = v + jnp.abs(g) ** 2
  return -1e-3 * g / (jnp.sqrt(v) + 1e-7), m, v


def adamax(g, c, m, v, p):
  m, v = ema(m, g, 0.9), jnp.maximum(0.999 * v, jnp.abs(g))
  return -1e-3 * m / (v + 1e-8), m, v


def yogi(g, c, m, v, p):
  m, v = ema(m, g, 0.9), v - 0.001 * jnp.sign(v - g * g) * g * g
  return -1e-3 * m / (jnp.sqrt(v) + 1e-3), m, v


def belief(g, c, m, v, p):
  m = ema(m, g, 0.9)
  v = ema(v, (g - m) ** 2, 0.999) + 1e-16
  return -1e-3 * m / (jnp.sqrt(v) + 1e-8), m, v


def centred(g, c, m, v, p):
  m, v = ema(m, g, 0.9), ema(v, g * g, 0.9)
  return -1e-3 * g / jnp.sqrt(v - m * m + 1e-8), m, v


def momentum(g, c, m, v, p):
  m = 0.9 * m + g + 0.01 * p
  return -1e-3 * m, m, v


def lion(g, c, m, v, p):
  return -1e-3 * jnp.sign(ema(m, g, 0.9)), ema(m, g, 0.99), v


def normalised(g, c, m, v, p):
  m = ema(m, g, 0.9)
  return -1e-3 * m / (jnp.linalg.norm(m) + 1e-8), m, v


def orthogonalised(g, c, m, v, p):
  m = ema(m, g, 0.9)
  x = m / (jnp.linalg.norm(m) + 1e-8)
  x = lax.fori_loop(0, 2, lambda _, x: 1.5 * x - 0.5 * x @ x.T @ x, x)
  return -1e-3 * x, m, v


def by_the_gradient(g, c, m, v, p):
  m = ema(m, g, 0.9)
  return -1e-3 * jnp.where(g == 0, 0, m / (jnp.abs(g) + 1e-9)), m, v


def decomposed(g, c, m, v, p):
  m = ema(m, g, 0.9)
  u, _, w = jnp.linalg.svd(m, full_matrices=False)
  return -1e-3 * u @ w, m, v


def averaged_weights(g, c, m, v, p):
  m = ema(m, p, 0.9)
  return -1e-3 * g + 0.1 * (m - p), m, v


def branched(g, c, m, v, p):
  def skipped(m, v):
    return 0 * g, m, v

  return lax.cond(jnp.isfinite(g).all(), lambda m, v: adam(g, c, m, v, p), skipped, m, v)


def scanned(g, c, m, v, p):
  """Adam, row by row."""
  _, rows = lax.scan(lambda _, row: (None, adam(row[0], c, row[1], row[2], None)), None, (g, m, v))
  return rows


def written_out(g, c, m, v, p):
  m, v = ema(m, g, 0.9), 0.999 * v + 0.0005 * g * g + (g - m) * (0.0005 * (g - m))
  return -1e-3 * m / (jnp.sqrt(v) + 1e-8), m, v


def not_a_square(g, c, m, v, p):
  v = 0.999 * v + 0.001 * g * (g - 1.0)
  return -1e-3 * g / (jnp.sqrt(jnp.abs(v)) + 1e-8), m, v


def jitted(*args):
  return jax.jit(adam)(*args)


def bounded(g, c, m, v, p):
  m, v = ema(m, g, 0.9), jnp.where(c < 5, g * g, jnp.clip(v, 0.5 * g * g, 2 * g * g))
  return -1e-3 * m / (jnp.sqrt(v) + 1e-8), m, v


def delayed(g, c, m, v, p):
  """Divides by the second moment of the previous step: `second` is the old `first`."""
  return -1e-3 * g / (jnp.sqrt(jnp.abs(v)) + 1e-8), 0.9 * m + 0.1 * g * g * jnp.sign(p), m


CASES = {
  momentum: ("signed", "nonnegative"),
  lion: ("signed", "nonnegative"),
  normalised: ("signed", "nonnegative"),
  orthogonalised: ("signed", "nonnegative"),
  adam: ("wide", "nonnegative"),
  adam_by_lerp: ("wide", "nonnegative"),
  rsqrt: ("wide", "nonnegative"),
  written_out: ("wide", "nonnegative"),
  belief: ("wide", "nonnegative"),
  adamax: ("wide", "nonnegative"),
  branched: ("wide", "nonnegative"),
  scanned: ("wide", "nonnegative"),
  jitted: ("wide", "nonnegative"),
  yogi: ("wide", "wide"),
  delayed: ("wide", "wide"),
  adagrad: ("nonnegative", "nonnegative"),
  not_a_square: ("nonnegative", "wide"),
  bounded: (False, "nonnegative"),
  by_the_gradient: (False, "nonnegative"),
  centred: (False, False),
  decomposed: (False, "nonnegative"),
}


def kinds_of(tx, params):
  tx = wrapping.as_transformation(tx, "test")
  state = jax.eval_shape(tx.init, params)
  return state_flow.kinds(tx, params, state, [leaf.shape == SHAPE for leaf in jax.tree.leaves(state)])


@pytest.mark.parametrize("update", CASES, ids=lambda update: update.__name__)
def test_kinds_by_what_is_done_with_the_state(update):
  assert tuple(kinds_of(transformation(update), jnp.zeros(SHAPE))[1:]) == CASES[update]


def test_weights_in_the_state_are_kept():
  copies, zeros = (lambda p: p * 1.0), (lambda p: 0 * p)
  assert kinds_of(transformation(averaged_weights, (copies, zeros)), jnp.ones(SHAPE))[1:] == [False, "nonnegative"]
  assert kinds_of(transformation(averaged_weights, (zeros, zeros)), jnp.ones(SHAPE))[1] is False


def test_state_that_starts_below_zero_is_not_taken_for_a_magnitude():
  assert kinds_of(transformation(adagrad, (jnp.zeros_like, lambda p: -jnp.ones_like(p))), jnp.ones(SHAPE))[2] == "wide"


def test_an_update_that_does_not_trace_keeps_small_values():
  def looks(g, c, m, v, p):
    return (g if float(g[0, 0]) > 0 else -g), m, v

  def asks(g, c, m, v, p, *, value, other):
    return g * value * other, m, v

  for update in (looks, asks):
    assert kinds_of(transformation(update), jnp.zeros(SHAPE))[1:] == ["wide", "wide"]


def test_a_scan_of_an_unknown_jax_keeps_small_values(monkeypatch):
  monkeypatch.setattr(jax_forms, "scan_counts", lambda operation: operation.eqn.params["in_tree"])
  assert kinds_of(transformation(scanned), jnp.zeros(SHAPE))[1:] == ["wide", "wide"]


def test_an_update_that_asks_for_the_loss_is_read_with_it():
  def scaled(g, c, m, v, p, *, value):
    step, m, v = adam(g, c, m, v, p)
    return step * value, m, v

  assert kinds_of(transformation(scaled), jnp.zeros(SHAPE))[1:] == ["wide", "nonnegative"]


NAMED = {
  "adam": optax.adam(1e-3),
  "amsgrad": optax.amsgrad(1e-3),
  "rmsprop": optax.rmsprop(1e-3),
  "centered rmsprop": optax.rmsprop(1e-3, centered=True),
  "adagrad": optax.adagrad(1e-3),
  "adadelta": optax.adadelta(1e-3),
  "adamax": optax.adamax(1e-3),
  "adan": optax.adan(1e-3),
  "adabelief": optax.adabelief(1e-3),
  "yogi": optax.yogi(1e-3),
  "radam": optax.radam(1e-3),
  "novograd": optax.novograd(1e-3),
  "lion": optax.lion(1e-3),
  "momentum": optax.sgd(1e-3, momentum=0.9, nesterov=True),
  "ademamix": optax.contrib.ademamix(1e-3),
  "muon": optax.contrib.muon(1e-3),
  "lamb": optax.lamb(1e-3),
  "sophia's": optax.contrib.simplified_ademamix(1e-3),
  "sm3": optax.sm3(1e-3),
  "adafactor": optax.adafactor(1e-3),
  "prodigy": optax.contrib.prodigy(),
  "dadapt_adamw": optax.contrib.dadapt_adamw(),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_names_tell_of_optax_is_not_contradicted(name):
  """By name, nothing is stored that has to be exact, and nothing is called non-negative without a proof."""
  tx = optax.with_extra_args_support(NAMED[name])
  params = {"w": jnp.zeros(SHAPE)}
  state = jax.eval_shape(tx.init, params)
  wanted = [leaf.shape == SHAPE for leaf in jax.tree.leaves(state)]
  seen = state_flow.kinds(tx, params, state, wanted)
  for (path, _, kind), other, large in zip(state_kinds.leaves(state), seen, wanted, strict=True):
    # Exceptions: dataflow cannot prove that yogi's second moment is non-negative, adafactor's decay is unknown while
    # tracing, and adadelta divides the updates in its state.
    if large and name not in ("yogi", "adadelta", "adafactor"):
      assert (kind, other) in ALLOWED, (jax.tree_util.keystr(path), kind, other)


# State that is signed by name may be divided in Optax by something whose floor bounds the quotient.
ALLOWED = {("nonnegative", "nonnegative"), (False, False)}
ALLOWED |= {("signed", other) for other in ("signed", "nonnegative", "wide")}


# --- Nothing that trains in f32 blows up ------------------------------------------------------------------------------


def gradients(seed: int, steps: int) -> jax.Array:
  """Gradients whose columns differ by up to nine orders of magnitude, become zero, and return in the last step."""
  rng = np.random.default_rng(seed)
  columns = 10.0 ** rng.uniform(-8, 1, SHAPE[-1]) * (rng.uniform(size=SHAPE[-1]) > 0.1)
  steady = np.sign(rng.normal(size=SHAPE)) * (rng.uniform(size=SHAPE) > 0.5)
  noise = rng.normal(size=(steps, *SHAPE))
  silent = rng.uniform(size=(1, 1, SHAPE[-1])) > np.linspace(0, 1.2, steps)[:, None, None]
  return jnp.asarray(
    columns * (steady + noise) * (silent | (np.arange(steps) == steps - 1)[:, None, None]), jnp.float32
  )


def largest_updates(tx, grads) -> np.ndarray:
  params = jnp.full(SHAPE, 0.5)

  @jax.jit
  def run(grads):
    def step(state, g):
      updates, state = tx.update(g, state, params)
      return state, jnp.max(jnp.abs(updates))

    return lax.scan(step, tx.init(params), grads)[1]

  return np.asarray(run(grads))


def assert_as_tame(tx, seed: int, steps: int = 100, bits: int = 8, factor: float = 10) -> None:
  grads = gradients(seed, steps)
  plain, wrapped = (largest_updates(t, grads) for t in (tx, mpo.quantized_state(tx, state_bits=bits, min_size=1)))
  assert np.isfinite(plain).all(), "a bad example: f32 state blows up"
  # Second moments have a floor and momenta are rounded. Together these change the ratio by less than the factor.
  assert (wrapped <= factor * np.maximum.accumulate(plain)).all(), (wrapped.max(), plain.max())


@pytest.mark.parametrize("update", CASES, ids=lambda update: update.__name__)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.few(14)
def test_updates_are_not_larger_than_with_f32_state(update, bits):
  assert_as_tame(transformation(update), seed=1, bits=bits)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.few(8)
def test_updates_of_optax_are_not_larger_than_with_f32_state(name):
  # A momentum below the first level is rounded up with proportional probability. That is right on average, but an
  # update can be many times too large if it is divided by a magnitude or a root of smaller values.
  assert_as_tame(NAMED[name], seed=2, factor=40 if name in ("adamax", "adadelta") else 10)


AVERAGES = {"ema": ema, "lerp": lerp, "decayed sum": lambda old, new, d: d * old + new}
AVERAGES |= {"largest": lambda old, new, d: jnp.maximum(d * old, new), "sum": lambda old, new, d: old + new}
SQUARES = {"product": lambda g: g * g, "power": lambda g: g**2, "square": jnp.square, "abs": lambda g: abs(g) ** 2}
SQUARES |= {"scaled": lambda g: 0.5 * g * g, "hypot": lambda g: jnp.hypot(g, 0 * g) ** 2}
ROOTS = {"sqrt": jnp.sqrt, "power": lambda v: v**0.5, "abs": lambda v: jnp.sqrt(jnp.abs(v))}
ROOTS |= {"rsqrt": lambda v: 1 / lax.rsqrt(v + 1e-30)}
KEPT = {"tuple": tuple, "list": list, "dict": lambda x: dict(enumerate(x)), "nested": lambda x: {"a": {"b": list(x)}}}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_updates_of_drawn_transformations_are_not_larger(data):
  """Unknown optimizers with random moments, roots, bias corrections and structure of the state."""

  def draw(table):
    return table[data.draw(st.sampled_from(sorted(table)))]

  first, second, square, root, kept = (draw(t) for t in (AVERAGES, AVERAGES, SQUARES, ROOTS, KEPT))
  b1, b2 = data.draw(st.sampled_from([0.5, 0.9, 0.99])), data.draw(st.sampled_from([0.9, 0.99, 0.999]))
  eps, corrected, traced = (
    data.draw(st.sampled_from([1e-12, 1e-8, 1e-4])),
    data.draw(st.booleans()),
    data.draw(st.booleans()),
  )
  wraps = data.draw(st.sampled_from([lambda f: f, jax.jit, jax.checkpoint]))

  def init(p):
    return kept([jnp.zeros([], jnp.int32), 0 * p, jnp.zeros_like(p), jnp.float32(b2)])

  @wraps
  def moments(g, count, m, v, decay):
    return first(m, g, b1), second(v, square(g), decay)

  def update(g, state, p=None):
    count, m, v, decay = jax.tree.leaves(state)
    count += 1
    m, v = moments(g, count, m, v, decay if traced else b2)
    below = v / (1 - b2 ** count.astype(jnp.float32)) if corrected else v
    return -1e-3 * m / (root(below) + eps), kept([count, m, v, decay])

  tx = optax.GradientTransformation(init, update)
  if data.draw(st.booleans()):
    tx = optax.masked(optax.chain(optax.clip(10.0), tx), True)
  assert_as_tame(tx, seed=data.draw(st.integers(0, 5)), steps=40)


def params_before(g, c, m, v, p):
  """A step with Barzilai-Borwein step size, from the params and the gradient of the previous step."""
  moved, turned = p - m, g - v
  return -g * jnp.clip(jnp.sum(moved * moved) / (jnp.abs(jnp.sum(moved * turned)) + 1e-12), 0.01, 1), p, g


def params_after(g, c, m, v, p):
  step = -0.01 * g - 0.1 * jnp.where(c > 1, p - m, 0.0)
  return step, p + step, v


def averaged_params(g, c, m, v, p):
  return -0.01 * g - 0.1 * jnp.where(c > 1, p - m, 0.0), ema(m, p, 0.9), v


def params_averaged_over_all_steps(g, c, m, v, p):
  return -0.01 * g - 0.1 * jnp.where(c > 1, p - m, 0.0), m + (p - m) / c.astype(jnp.float32), v


WEIGHTS = [params_before, params_after, averaged_params, params_averaged_over_all_steps]


@pytest.mark.parametrize("update", WEIGHTS)
def test_state_that_becomes_params_is_not_rounded(update):
  """The state starts at zero, so only its later values show that it holds params."""
  tx = mpo.quantized_state(transformation(update), min_size=1)
  state = tx.init(jnp.ones(SHAPE))
  assert not isinstance(state.inner_state.first, mpo.Quantized)


def test_a_momentum_with_weight_decay_is_stored():
  tx = mpo.quantized_state(
    transformation(lambda g, c, m, v, p: (-0.1 * (m := 0.9 * m + g + 0.01 * p), m, v)), min_size=1
  )
  assert isinstance(tx.init(jnp.ones(SHAPE)).inner_state.first, mpo.Quantized)
