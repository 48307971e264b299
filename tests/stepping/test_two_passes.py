"""Two passes: updates whose leaves depend on each other through a few numbers, such as clipping by the global norm.

They equal the ordinary step bit for bit, but for sums over a stack of layers, which are made layer by layer.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._core import wrapping
from optax_mpo._updates import coupled
from tests.helpers import assert_same_bits, ordinary_step, quick_jit
from tests.stepping.test_value_and_update import (
  CASES,
  OPTIMIZERS,
  assert_close,
  assert_equal_steps,
  batch,
  mean_square,
  normal,
)

COUPLED = {
  "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1e-1, momentum=0.9)),
  "compensated": lambda: mpo.compensated(optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(1e-2))),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(1e-1, momentum=0.9), 3),
  "clip_after_adam": lambda: optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(0.1), optax.scale(-0.1)),
}
two_pass = functools.partial(mpo.value_and_update, two_pass=True)


SCALED = {"growth_interval": 2, "scale": 64.0}
FREE_STATE = {  # state that belongs to no leaf, and depends on all gradients
  "dynamic_scale": lambda: mpo.loss_scaled(mpo.compensated(optax.adam(1e-2)), **SCALED),
  "scale_and_clipping": lambda: mpo.loss_scaled(mpo.compensated(COUPLED["clip_after_adam"]()), **SCALED),
  "static_scale": lambda: mpo.loss_scaled(mpo.compensated(optax.adam(1e-2)), 64.0, dynamic=False),
  "stochastic": lambda: mpo.loss_scaled(mpo.compensated(optax.adam(1e-2), 8, rounding="stochastic"), **SCALED),
  "compact": lambda: mpo.loss_scaled(mpo.compensated(mpo.quantized_state(optax.adam(1e-2), min_size=1), 8), **SCALED),
  "kernels": lambda: mpo.with_kernels(mpo.loss_scaled(mpo.compensated(optax.adam(1e-2)), **SCALED)),
  "first_weights_behind_a_scale": lambda: mpo.loss_scaled(mpo.compensated(optax.contrib.dog(1.0)), **SCALED),
  "norm_ema": lambda: mpo.compensated(optax.chain(divided_by_an_average_norm(), optax.adam(1e-2))),
  "large_table": lambda: mpo.compensated(optax.chain(scaled_by_a_table(), optax.adam(1e-2))),
  "clipping_in_a_branch": lambda: mpo.compensated(
    optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1)), 2)
  ),
  "clipping_in_apply_if_finite": lambda: mpo.compensated(
    optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(0.1)), 3)
  ),
  "conditional_clipping": lambda: mpo.compensated(
    optax.chain(
      optax.conditionally_transform(optax.clip_by_global_norm(0.01), lambda step, **_: step > 0), optax.sgd(1.0)
    )
  ),
}


def divided_by_an_average_norm():
  def update(grads, state, params=None):
    average = 0.9 * state["average"] + 0.1 * optax.tree.norm(grads)
    key = jnp.where(average > 1e-3, jax.random.split(state["key"])[0], state["key"])
    return jax.tree.map(lambda g: g / (average + state["average"]), grads), {"average": average, "key": key}

  return optax.GradientTransformation(lambda _: {"average": jnp.ones(()), "key": jax.random.PRNGKey(0)}, update)


def scaled_by_a_table():
  def update(grads, state, params=None):
    best = jnp.minimum(state["best"], optax.tree.norm(grads))
    table = jnp.where(best < state["best"], state["table"] * 0.99, state["table"])
    return jax.tree.map(lambda g: g * table.max(), grads), {"best": best, "table": table}

  return optax.GradientTransformation(
    lambda _: {"best": jnp.inf * jnp.ones(()), "table": jnp.linspace(0.5, 1, 5000)}, update
  )


@pytest.mark.parametrize(("optimizer", "small"), [("dynamic_scale", 1), ("compact", 1), *((o, 60) for o in FREE_STATE)])
@pytest.mark.few(1, full=3)
def test_two_passes_with_state_that_belongs_to_no_leaf(optimizer, small, monkeypatch):
  """Makes four steps. The first overflows and halves the loss scale; after the third it grows."""
  monkeypatch.setattr(coupled, "SMALL", small)
  params, loss, _ = CASES["unrolled_remat_tied"]
  tx = FREE_STATE[optimizer]()
  want = got = (None, *mpo.init(tx, params))
  one, other = quick_jit(ordinary_step(loss, tx)), quick_jit(two_pass(loss, tx))
  scales = []
  for i in range(4):
    x = batch(i, jnp.bfloat16).at[0, 0].mul(jnp.inf if i == 0 else 1)
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got, want)
    scales += [float(mpo.loss_scale(got[2]))] if hasattr(got[2], "skipped") else []
  assert not scales or scales == ([64] * 4 if optimizer == "static_scale" else [32, 32, 64, 64])


@pytest.mark.parametrize("storage", ["16 bits", "stochastic", "kernels"])
@pytest.mark.full
def test_two_passes_find_an_overflow_in_a_stack_of_layers(storage, monkeypatch):
  monkeypatch.setattr(coupled, "SMALL", 1)
  params, loss, _ = CASES["scanned_remat"]
  options = {"extra_bits": 8, "rounding": "stochastic"} if storage == "stochastic" else {}
  tx = mpo.loss_scaled(mpo.compensated(OPTIMIZERS["momentum"](), **options), **SCALED)
  tx = mpo.with_kernels(tx) if storage == "kernels" else tx
  want = got = (None, *mpo.init(tx, params))
  one, other = quick_jit(ordinary_step(loss, tx)), quick_jit(two_pass(loss, tx))
  for i in range(3):
    x = batch(i, jnp.bfloat16).at[0, 0].mul(jnp.inf if i == 0 else 1)
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got, want)


def test_explain_lists_leaves_that_are_updated_between_the_passes():
  params = {"w": normal(0, 64, 64), "b": jnp.ones(64), "c": jnp.ones((), jnp.bfloat16)}
  tx = COUPLED["clip_by_global_norm"]()

  def loss(p, x):
    return mean_square(jnp.concatenate([x] * 8, 1) @ p["w"] + p["b"][None]) + mean_square(p["c"])

  rows = mpo.explain(loss, tx, params, tx.init(params), batch(0), two_pass=True)
  assert {r.name: (r.stepped, r.gradient_bytes) for r in rows} == {
    "params['w']": ("at once", 4 * 64 * 64),
    "params['b']": ("between the passes", 4 * 64),
    "params['c']": ("between the passes", 2),
  }
  assert all(row.why for row in rows[:2]), rows


def start(tx, params):
  return (
    mpo.init(tx, params) if "Compensated" in str(type(wrapping.state_shapes(tx, params))) else (params, tx.init(params))
  )


@pytest.mark.parametrize("small", [1, 1024])
@pytest.mark.parametrize("optimizer", [*COUPLED, "compact"])
@pytest.mark.few(1, full=5)
def test_two_passes_are_exact_for_leaves_of_their_own(optimizer, small, monkeypatch):
  monkeypatch.setattr(coupled, "SMALL", small)
  params, loss, _ = CASES["unrolled_remat_tied"]
  # With 8-bit state, the maxima of blocks are a small array that needs the norm and the leaf's whole gradient.
  clipped = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(1e-2))
  compact = mpo.compensated(mpo.quantized_state(clipped, min_size=1), extra_bits=8)
  tx = compact if optimizer == "compact" else COUPLED[optimizer]()
  assert_equal_steps(loss, tx, *start(tx, params), jit=quick_jit, make=two_pass)


@pytest.mark.parametrize("name", ["scanned_remat", "nested_scans"])
@pytest.mark.parametrize("optimizer", COUPLED)
@pytest.mark.few(2)
def test_two_passes_sum_a_stack_by_layers(name, optimizer, monkeypatch):
  """The norm of a stack is a sum of sums, so it may round differently. A flag that all gradients are finite may not.

  Another rounding of the norm changes an update by parts in 1e7. Adam can amplify this where a gradient is only
  rounding error, so each step starts from the same weights.
  """
  monkeypatch.setattr(coupled, "SMALL", 1)
  params, loss, _ = CASES[name]
  tx = COUPLED[optimizer]()
  want = (None, *start(tx, params))
  one, other = quick_jit(ordinary_step(loss, tx)), quick_jit(two_pass(loss, tx))
  for i in range(3):
    x = batch(i, jax.tree.leaves(want[1])[0].dtype)
    want, got = one(*want[1:], x), other(*want[1:], x)
    if optimizer == "apply_if_finite":
      assert_same_bits(got, want)
    elif optimizer == "compensated":
      assert_close(mpo.master_params(*got[1:]), mpo.master_params(*want[1:]))
    else:
      assert_close(got, want)


def test_a_gradient_that_is_not_finite_is_skipped_in_two_passes():
  params, loss, _ = CASES["dense"]
  tx = COUPLED["apply_if_finite"]()
  state = tx.init(params)
  _, new, new_state = jax.jit(two_pass(loss, tx))(params, state, batch(0) * jnp.nan)
  assert_same_bits(new, params)
  assert (int(new_state.notfinite_count), bool(new_state.last_finite)) == (1, False)


def test_two_passes_are_not_taken_where_one_will_do():
  params, tx = CASES["dense"][0], optax.adam(1e-2)
  jaxpr = [
    str(jax.make_jaxpr(mpo.value_and_update(CASES["dense"][1], tx, two_pass=t))(params, tx.init(params), batch(0)))
    for t in (False, True)
  ]
  assert jaxpr[0].count("tanh") == jaxpr[1].count("tanh") > 0


def test_two_passes_refuse_updates_that_mix_whole_gradients(monkeypatch):
  monkeypatch.setattr(coupled, "SMALL", 1)
  params, loss, _ = CASES["dense"]
  tx = optax.flatten(optax.adam(1e-2))
  with pytest.raises(ValueError, match="two_pass"):
    mpo.value_and_update(loss, tx, two_pass=True)(params, tx.init(params), batch(0))


def test_two_passes_refuse_effects():
  params, tx = CASES["dense"][0], COUPLED["clip_by_global_norm"]()

  def loss(p, x):
    jax.debug.callback(lambda: None)
    return CASES["dense"][1](p, x)

  with pytest.raises(NotImplementedError, match="runs parts of loss_fn twice"):
    jax.jit(two_pass(loss, tx))(params, tx.init(params), batch(0))


# --- Misuse -----------------------------------------------------------------------------------------------------------


def test_the_second_pass_has_no_forward_pass():
  """One scan forward and two backward; the logits, much larger than what they are made from, are made again.

  The gradient that the layers start from is kept, so that the product that makes it runs once.
  """

  def loss(params, x):
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["layers"])
    return jnp.mean(jax.nn.logsumexp((x @ params["head"]).astype(jnp.float32), axis=-1))

  tx = mpo.compensated(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)))
  params, state = mpo.init(tx, {"layers": jnp.ones((4, 8, 8)) / 8, "head": jnp.ones((8, 4096)) / 8})
  step = mpo.value_and_update(loss, tx, two_pass=True)
  text = str(jax.make_jaxpr(step)(params, state, jnp.ones((16, 8), jnp.bfloat16)))
  assert text.count("= scan[") == 3
  assert text.count(":f32[16,4096] = exp ") == 2
  products = re.findall(r":bf16\[([\d,]+)\] = dot_general", text)
  assert sorted(products.count(shape) for shape in ("16,4096", "4096,8", "16,8")) == [2, 2, 6], products
