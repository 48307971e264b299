"""Warnings, once each, about silent losses: decay that is rounded away, and updates that other code changes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._core import wrapping

PARAMS = {"w": jnp.linspace(0.5, 1.5, 24).reshape(4, 6), "b": jnp.ones(6)}
DECAY = "will not decay"
OUTSIDE = "something around compensated changes its update"


def found(tx, params=PARAMS):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    mpo.init(tx, params)
  return [str(w.message) for w in caught]


def matrices(p):
  return jax.tree.map(lambda x: x.ndim > 1, p)


def adamw(product, **options):
  return optax.adamw(1e-3, weight_decay=product * 1e3, **options)


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_decay_is_lost_below_the_bound_of_the_docs_and_kept_above(bits):
  """docs/compact.md: changes of at least 2^-(8 + bits) of a weight move it. Changes below half of that move none."""
  bound = 2.0 ** -(8 + bits)
  for factor in (0.3, 1.1):
    tx = mpo.compensated(adamw(factor * bound), bits)
    assert [DECAY in text for text in found(tx)] == ([True] if factor < 1 else [])
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      params, state = mpo.init(tx, PARAMS)
    before = mpo.master_params(params, state)
    for _ in range(3):
      updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
      params = mpo.apply_updates(params, updates)
    moved = jax.tree.map(lambda a, b: bool((a < b).all()), mpo.master_params(params, state), before)
    assert moved == {"w": factor > 1, "b": factor > 1}


def test_the_case_of_the_docs():
  assert len(found(mpo.compensated(optax.adamw(1e-4, weight_decay=0.01), 8))) == 1


SILENT = {
  "16 bits": lambda: mpo.compensated(adamw(1e-6)),
  "stochastic": lambda: mpo.compensated(adamw(1e-6), 8, rounding="stochastic"),
  "no decay": lambda: mpo.compensated(optax.adam(1e-3), 8),
  "a rate that starts low": lambda: mpo.compensated(
    optax.adamw(optax.cosine_onecycle_schedule(1000, 1e-3), weight_decay=0.1), 8
  ),
  "a rate that ends low": lambda: mpo.compensated(
    optax.adamw(optax.cosine_decay_schedule(1e-3, 1000), weight_decay=0.1), 8
  ),
  "a late warm-up inside": lambda: mpo.compensated(
    optax.inject_hyperparams(optax.adamw)(optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 50, 300), weight_decay=0.1), 8
  ),
  "warm-up": lambda: mpo.compensated(optax.adamw(optax.linear_schedule(0, 1e-3, 10), weight_decay=0.1), 8),
  "extra arguments": lambda: mpo.compensated(optax.chain(adamw(1e-6), optax.contrib.reduce_on_plateau()), 8),
  "clipping around gradients": lambda: optax.chain(optax.clip(1.0), mpo.compensated(optax.adam(1e-3))),
  "MultiSteps": lambda: optax.MultiSteps(mpo.compensated(optax.adam(1e-3)), 2),
  "loss_scaled": lambda: mpo.loss_scaled(mpo.compensated(optax.adam(1e-3))),
  "apply_if_finite": lambda: optax.apply_if_finite(mpo.compensated(optax.adam(1e-3)), 3),
  "with_kernels": lambda: mpo.with_kernels(mpo.compensated(optax.adam(1e-3))),
  "masked": lambda: optax.chain(
    optax.masked(mpo.compensated(optax.adam(1e-3)), matrices),
    optax.masked(mpo.compensated(optax.sgd(0.1)), lambda p: jax.tree.map(lambda m: not m, matrices(p))),
  ),
  "inject_hyperparams": lambda: optax.inject_hyperparams(lambda rate: mpo.compensated(optax.adam(rate)))(rate=1e-3),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_of_what_is_right(name):
  assert found(SILENT[name]()) == []


def test_decay_behind_masks_and_labels_is_found():
  for inner in (
    adamw(1e-6, mask=matrices),
    adamw(1e-6, mask={"w": True, "b": False}),
    optax.multi_transform({True: adamw(1e-6), False: optax.adam(1e-3)}, {"w": True, "b": False}),
    mpo.quantized_state(adamw(1e-6, mask=matrices), min_size=1),
  ):
    (text,) = found(mpo.compensated(inner, 8))
    assert DECAY in text
    assert "params['w']" in text


@pytest.mark.parametrize(
  "make",
  [
    lambda rate: optax.adamw(rate, weight_decay=0.01),
    lambda rate: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(rate)),
    lambda rate: optax.inject_hyperparams(optax.adamw)(rate, weight_decay=0.01),
    lambda rate: optax.MultiSteps(optax.adamw(rate, weight_decay=0.01), 2),
  ],
)
def test_decay_that_a_schedule_never_makes_large_enough(make):
  (text,) = found(mpo.compensated(make(optax.warmup_cosine_decay_schedule(0, 1e-4, 100, 1000)), 8))
  assert DECAY in text


def test_decay_is_warned_of_once():
  tx = mpo.compensated(adamw(1e-6), 8)

  def loss(p, x):
    return jnp.mean((x @ p["w"] + p["b"][None]).astype(jnp.float32) ** 2)

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    params, state = mpo.init(tx, PARAMS)
    step = jax.jit(mpo.value_and_update(loss, tx))
    for _ in range(2):
      _, params, state = step(params, state, jnp.ones((2, 4), jnp.bfloat16))
    mpo.convert(tx, params, state)
    tx.init(params)
  assert len(caught) == 1


def test_warned_of_under_jit_too():
  with pytest.warns(UserWarning, match=DECAY):
    jax.jit(lambda p: mpo.init(mpo.compensated(adamw(1e-6), 8), p))(PARAMS)
  with pytest.warns(UserWarning, match=OUTSIDE):
    jax.jit(lambda p: mpo.init(optax.chain(mpo.compensated(optax.adam(1e-3)), optax.scale(0.5)), p))(PARAMS)


@pytest.mark.parametrize(
  "make",
  [
    lambda tx: optax.chain(tx, optax.scale(0.5)),
    lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1)),
    lambda tx: optax.chain(tx, optax.clip_by_global_norm(0.1)),
    lambda tx: optax.chain(tx, optax.ema(0.9)),
    lambda tx: mpo.loss_scaled(optax.chain(tx, optax.scale_by_schedule(lambda step: 0.5))),
    lambda tx: optax.contrib.schedule_free(tx, 1e-2),
    lambda tx: optax.chain(tx, optax.masked(optax.set_to_zero(), {"w": False, "b": True})),
    lambda tx: optax.MultiSteps(optax.chain(tx, optax.masked(optax.set_to_zero(), {"w": False, "b": True})), 2),
  ],
)
def test_updates_that_are_changed_from_outside(make):
  tx = make(mpo.compensated(optax.sgd(0.3)))
  (text,) = found(tx)
  assert OUTSIDE in text
  assert "params['b']" in text
  state = wrapping.state_shapes(tx, PARAMS)
  inside = None if isinstance(state, mpo.LossScaleState) else mpo.compensated(make(optax.sgd(0.3)))
  assert inside is None or found(inside) == []  # what the message recommends


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_held_still_outside_are_told_of_and_inside_they_are_held(bits):
  hold = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
  (text,) = found(optax.chain(mpo.compensated(optax.adam(1e-3), bits), hold))
  assert OUTSIDE in text
  assert "params['b']" in text
  tx = mpo.compensated(optax.chain(optax.adam(1e-3), hold), bits)
  assert found(tx) == []
  params, state = mpo.init(tx, PARAMS)
  grads = jax.tree.map(lambda x: jnp.ones_like(x, jnp.float32), params)
  updates, new = tx.update(grads, state, params)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()),
    *(mpo.master_params(*pair) for pair in ((params, state), (mpo.apply_updates(params, updates), new))),
  )
  assert moved == {"w": True, "b": False}


def test_bits_do_go_wrong_outside():
  tx = optax.chain(mpo.compensated(optax.sgd(0.3)), optax.scale(0.5))
  with pytest.warns(UserWarning, match=OUTSIDE):
    params, state = mpo.init(tx, PARAMS)
  grads = jax.tree.map(lambda x: jnp.ones_like(x, jnp.float32), params)
  updates, state = tx.update(grads, state, params)
  masters = mpo.master_params(mpo.apply_updates(params, updates), state)
  assert not np.allclose(masters["w"], PARAMS["w"] - 0.15, atol=1e-4)


def test_a_traced_hyperparameter_gives_no_warning():
  def init(rate):
    tx = mpo.compensated(optax.adamw(rate), extra_bits=8)
    return mpo.init(tx, {"w": jnp.ones((4, 4))})[0]["w"].sum()

  jax.jit(jax.grad(init))(1e-4)


@pytest.mark.parametrize("make", [mpo.exact, mpo.compact])
def test_init_compiles_three_programs_for_each_shape(make, compiled):
  """Optax's zeros among them, and a few more in all, however many leaves there are and whatever is tried."""
  params = {f"w{i}": jnp.ones((2, 3 + i % 5)) for i in range(20)}
  tx = make(optax.adamw(1e-1, weight_decay=0.1))
  jax.clear_caches()
  before = compiled.count
  mpo.init(tx, params)
  assert compiled.count - before <= 3 * 5 + 8
