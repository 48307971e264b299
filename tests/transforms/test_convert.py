"""Converting runs from one storage to another: what is exact, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from tests.helpers import assert_same_bits


def adamw():
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10)))


def make_params():
  rng = np.random.default_rng(0)
  return {"w": jnp.asarray(rng.normal(size=(64, 96)), jnp.float32), "b": jnp.asarray(rng.normal(size=96), jnp.float32)}


def grads(params, i):
  rng = np.random.default_rng(i)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def train(tx, params, state, steps):
  apply = mpo.apply_updates
  for i in steps:
    gradient = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), grads(make_params(), i))
    updates, state = tx.update(gradient, state, params)
    params = apply(params, updates)
  return params, state


FORMS = {
  "f32": lambda: adamw(),
  "mpo16": lambda: mpo.compensated(adamw()),
  "mpo16_inside": lambda: optax.chain(
    optax.clip_by_global_norm(1.0), mpo.compensated(optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10)))
  ),
  "mpo8": lambda: mpo.compensated(adamw(), extra_bits=8),
  "mpo4": lambda: mpo.compensated(adamw(), extra_bits=4),
  "mpo0": lambda: mpo.compensated(adamw(), extra_bits=0),
  "stochastic": lambda: mpo.compensated(adamw(), extra_bits=8, rounding="stochastic"),
  "compact": lambda: mpo.compensated(mpo.quantized_state(adamw()), extra_bits=8),
  "float8": lambda: mpo.compensated(mpo.quantized_state(adamw())),
  "compact64": lambda: mpo.compensated(mpo.quantized_state(adamw(), block_size=64), extra_bits=8),
}


def dtype_of(name):
  return jnp.float8_e4m3fn if name == "float8" else jnp.bfloat16


def start(name):
  tx, params = FORMS[name](), make_params()
  return (tx, params, tx.init(params)) if name == "f32" else (tx, *mpo.init(tx, params, dtype=dtype_of(name)))


def trained(name):
  tx, params, state = start(name)
  return train(tx, params, state, range(3))


def test_masters_to_16_bits_and_back_in_the_middle_of_a_run_changes_nothing():
  want = train(FORMS["f32"](), *trained("f32"), range(3, 6))
  params, state = mpo.convert(FORMS["mpo16"](), *trained("f32"))
  params, state = train(FORMS["mpo16"](), params, state, range(3, 6))
  assert_same_bits(mpo.convert(FORMS["f32"](), params, state), want)


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("old", ["f32", "mpo16", "mpo8", "compact", "stochastic", "float8"])
@pytest.mark.few(4, full=10)
def test_every_form_becomes_every_other(old, new):
  params, state = trained(old)
  tx, form_params, form_state = start(new)
  got = mpo.convert(tx, params, state, dtype=dtype_of(new))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
    lambda x: (x.shape, x.dtype), (form_params, form_state)
  )
  train(tx, *got, [3])  # training continues
  counts = [int(x) for x in jax.tree.leaves(got[1]) if x.ndim == 0 and x.dtype == jnp.int32]
  assert 3 in counts

  def masters(params, state):
    return mpo.master_params(params, state) if "Compensated" in str(jax.tree.structure(state)) else params

  bound = {"mpo8": 2.0**-16, "stochastic": 2.0**-16, "compact": 2.0**-16, "compact64": 2.0**-16, "mpo4": 2.0**-12}
  before, after = masters(params, state), masters(*got)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    rtol = 2.0**-8 if new == "mpo0" else bound.get(new, 0.0)
    small = 2.0**-33 * float(jnp.abs(a).max()) if new == "float8" else 0.0
    np.testing.assert_allclose(b, a, rtol=2.0**-20 if small else rtol, atol=small)


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("mpo0",)])
def test_to_the_same_form_is_the_same(name):
  params, state = trained(name)
  assert_same_bits(mpo.convert(FORMS[name](), params, state, dtype=dtype_of(name)), (params, state))


def test_through_more_bits_and_back_is_exact():
  for name in ("mpo8", "mpo4", "compact"):
    params, state = trained(name)
    wide = mpo.convert(FORMS["f32"](), params, state)
    back = mpo.convert(FORMS[name](), *wide)
    assert_same_bits(back[0], params)
    assert_same_bits(back[1].compensation, state.compensation)


def test_leaves_that_stay_in_f32_and_frozen_ones_in_bf16():
  def where(path, leaf):
    return leaf.ndim > 1

  tx = optax.multi_transform(
    {"train": mpo.compensated(optax.adamw(1e-2)), "freeze": optax.set_to_zero()}, {"w": "train", "b": "freeze"}
  )
  masters = make_params()
  masters["b"] = mpo.cast(masters["b"])
  params, state = mpo.init(tx, masters, where=where)
  got = mpo.convert(tx, params, state, where=where)
  assert_same_bits(got, (params, state))


def test_another_optimizer_is_refused():
  params, state = trained("mpo16")
  with pytest.raises(ValueError, match="convert: opt_state has not the structure of tx's state"):
    mpo.convert(mpo.compensated(optax.sgd(1e-2, momentum=0.9)), params, state)


def test_other_params_are_refused():
  params, state = trained("mpo16")
  state = state._replace(inner_state=jax.tree.map(lambda x: x[:1] if x.ndim else x, state.inner_state))
  with pytest.raises(ValueError, match=r"convert: opt_state\[1\].*mu\['b'\] is \[1\], but in tx's state \[96\]"):
    mpo.convert(FORMS["mpo16"](), params, state)


def test_under_jit():
  params, state = trained("f32")
  tx = FORMS["compact"]()
  assert_same_bits(jax.jit(lambda p, s: mpo.convert(tx, p, s))(params, state), mpo.convert(tx, params, state))
