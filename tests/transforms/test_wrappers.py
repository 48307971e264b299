"""Optax wrappers that change the tree or the state around `compensated`: init, masters, steps, convert."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo

compensated = mpo.compensated
split = optax.contrib.split_real_and_imaginary


def adam():
  return optax.adam(1e-2)


def matrices(p):
  return jax.tree.map(lambda x: x.ndim > 1, p)


def vectors(p):
  return jax.tree.map(lambda x: x.ndim < 2, p)


def labels(p):
  return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", p)


REAL = {
  "masked": lambda: optax.chain(
    optax.masked(compensated(adam()), matrices), optax.masked(compensated(optax.sgd(0.1)), vectors)
  ),
  "multi_transform": lambda: optax.multi_transform(
    {"matrix": compensated(adam()), "vector": compensated(optax.sgd(0.1))}, labels
  ),
  "flatten": lambda: compensated(optax.flatten(adam())),
  "MultiSteps": lambda: optax.MultiSteps(compensated(adam()), 2),
  "skip_not_finite": lambda: optax.MultiSteps(compensated(adam()), 2, should_skip_update_fn=optax.skip_not_finite),
  "inject_hyperparams": lambda: optax.inject_hyperparams(lambda rate: compensated(optax.adam(rate)))(rate=1e-2),
  "conditionally_transform": lambda: compensated(optax.conditionally_transform(adam(), lambda step, **_: step >= 0)),
  "conditionally_mask": lambda: compensated(optax.conditionally_mask(adam(), lambda step, **_: step % 2 == 0)),
  "apply_if_finite": lambda: compensated(optax.apply_if_finite(adam(), 3)),
  "schedule_free": lambda: optax.contrib.schedule_free(compensated(optax.sgd(1.0)), 1e-2),
  "schedule_free_inside": lambda: compensated(optax.contrib.schedule_free(optax.sgd(1.0), 1e-2)),
  "sam": lambda: optax.contrib.sam(compensated(adam()), optax.sgd(0.05), 2),
  "mechanize": lambda: optax.contrib.mechanize(compensated(adam())),
  "named_chain": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", compensated(adam()))),
  "selective_transform": lambda: optax.selective_transform(compensated(adam()), freeze_mask=False),
  "packed": lambda: mpo.packed(compensated(mpo.packed(adam(), at_most=40))),
  "apply_every": lambda: optax.chain(optax.apply_every(2), compensated(adam())),
}
CHANGED_OUTSIDE = ("schedule_free", "sam", "mechanize")  # tests/transforms/test_probes.py tests the warning
COMPLEX = {
  "split": lambda: split(compensated(adam())),
  "split_of_masked": lambda: split(optax.masked(compensated(adam()), lambda p: jax.tree.map(lambda _: True, p))),
  "masked_split": lambda: optax.masked(split(compensated(adam())), lambda p: jax.tree.map(lambda _: True, p)),
  "split_multi_transform": lambda: split(REAL["multi_transform"]()),
  "split_8_bits": lambda: split(compensated(mpo.quantized_state(adam(), min_size=1))),
  "split_and_scaled": lambda: mpo.loss_scaled(split(compensated(adam()))),
}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def model(is_complex):
  params = {"w": normal(0, 8, 40), "b": normal(1, 40)}
  if is_complex:
    params |= {"c": jax.lax.complex(normal(2, 8, 32), normal(3, 8, 32)), "z": jnp.ones(3, jnp.complex64)}

  def loss(p, x):
    total = jnp.mean((x @ p["w"] + p["b"][None]).astype(jnp.float32) ** 2)
    if is_complex:
      total += jnp.mean(jnp.abs(x.astype(jnp.complex64) @ p["c"]) ** 2) + jnp.sum(jnp.abs(p["z"]) ** 2)
    return total

  return params, loss, normal(5, 4, 8).astype(jnp.bfloat16)


@pytest.mark.parametrize("name", [*REAL, *COMPLEX])
@pytest.mark.few(2, full=8)
def test_masters_come_back_through_every_wrapper(name):
  params, loss, x = model(name in COMPLEX)
  tx = (REAL | COMPLEX)[name]()
  with warnings.catch_warnings():
    if name in CHANGED_OUTSIDE:
      warnings.filterwarnings("ignore", "init: something around compensated")
    low, state = mpo.init(tx, params)
  assert {k: v.dtype for k, v in low.items()} == {
    k: jnp.dtype("complex64") if k in "cz" else jnp.dtype("bfloat16") for k in params
  }
  chex.assert_trees_all_equal(mpo.master_params(low, state), params)

  def plain(p, s, x):
    value, grads = jax.value_and_grad(loss)(p, x)
    updates, s = tx.update(grads, s, p)
    return value, mpo.apply_updates(p, updates), s

  _, new, new_state = jax.jit(plain)(low, state, x)
  chex.assert_trees_all_equal_shapes_and_dtypes((new, new_state), (low, state))
  masters = mpo.master_params(new, new_state)
  chex.assert_trees_all_equal_shapes_and_dtypes(masters, params)
  fused = functools.partial(mpo.value_and_update, two_pass=True)(loss, tx)
  _, other, other_state = jax.jit(fused)(low, state, x)
  for a, b in zip(jax.tree.leaves(mpo.master_params(other, other_state)), jax.tree.leaves(masters), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_equal(mpo.convert(tx, new, new_state), (new, new_state))
  lost = mpo.lost_updates(new, jax.tree.map(lambda m: 1e-6 * m, masters), extra_bits=8, opt_state=new_state)
  assert {k: float(v) > 0.5 for k, v in lost.items()} == {k: k not in "cz" for k in params}


def test_complex_leaves_without_the_wrapper_are_told_where_it_goes():
  params = model(True)[0]
  for tx in (compensated(adam()), compensated(split(adam()))):
    with pytest.raises(TypeError, match=r"params\['c'\] is complex64.*split_real_and_imaginary\(compensated"):
      mpo.init(tx, params)
  mpo.init(split(compensated(adam())), params)


def test_bits_of_a_leaf_that_a_wrapper_splits_are_refused_by_name():
  def halves(inner):
    def cut(tree):
      return jax.tree.map(lambda x: (x[:1], x[1:]), tree)

    return optax.GradientTransformation(
      lambda p: inner.init(cut(p)), lambda g, s, p=None: inner.update(cut(g), s, cut(p))
    )

  params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"master_params: .* splits params\['w'\] into 2 low-precision leaves"):
    mpo.master_params(params, halves(compensated(adam())).init(params))


def test_loss_scaling_keeps_imaginary_parts():
  params = {"z": jnp.ones(3, jnp.complex64)}
  tx = mpo.loss_scaled(split(compensated(optax.sgd(1.0))), 4.0)
  params, state = mpo.init(tx, params)
  updates, _ = tx.update({"z": jnp.full(3, 4 + 8j, jnp.complex64)}, state, params)
  np.testing.assert_array_equal(updates["z"], np.full(3, -1 - 2j))
  skipped, _ = tx.update({"z": jnp.full(3, 1j * jnp.inf, jnp.complex64)}, state, params)
  np.testing.assert_array_equal(skipped["z"], 0)


def test_state_of_complex_leaves_lies_where_they_lie():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params = jax.device_put({"c": jnp.ones((8, 4), jnp.complex64), "w": jnp.ones((8, 4))}, sharding)
  found = mpo.state_sharding(params, mpo.init(split(compensated(adam())), params)[1])
  mu = found.inner_state.inner_state[0].mu
  assert (mu["c"].real, mu["c"].imaginary, mu["w"]) == (sharding, sharding, sharding)
