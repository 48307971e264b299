"""Misuse of fused layers raises an error while the step is traced. It names the weight and says what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo

PARAMS = {"a": jnp.eye(3), "b": jnp.eye(3) * 0.5}
X = jnp.ones((2, 3))
layer = mpo.fused_layer(lambda w, x: jnp.tanh(x @ w))


def good(params, x):
  return jnp.sum(layer(params["b"], layer(params["a"], x)))


def trace(loss_fn, tx=None, params=PARAMS, opt_state=None, x=X):
  tx = tx or optax.adam(1e-2)
  opt_state = tx.init(params) if opt_state is None else opt_state
  return jax.eval_shape(mpo.fused_value_and_update(loss_fn, tx), params, opt_state, x)


def with_b(use):
  """Returns a loss that uses `a` correctly, and `b` as the test wants."""
  return lambda params, x: jnp.sum(use(params["b"], layer(params["a"], x)))


def scan_body(params):
  return lambda x, _: (layer(params, x), None)


MISUSES = {
  "two_layers": (
    lambda p, x: jnp.sum(layer(p["b"], layer(p["a"], layer(p["a"], x)))),
    r"params\['a'\] is used by two calls of fused_layer.*fused_value",
  ),
  "layer_and_value": (
    with_b(lambda b, x: layer(b, x) @ mpo.fused_value(b)),
    r"fused_value: params\['b'\] is used by fused_layer too",
  ),
  "value_and_layer": (
    with_b(lambda b, x: layer(b, x @ mpo.fused_value(b))),
    r"params\['b'\] was read with fused_value before",
  ),
  "unused": (lambda p, x: jnp.sum(layer(p["a"], x)), r"does not use params\['b'\].*freeze it.*set_to_zero"),
  "as_an_array": (with_b(lambda b, x: x @ b), r"params\['b'\] is a handle and no array.*fused_value"),
  "closed_over": (
    with_b(lambda b, x: mpo.fused_layer(lambda _, x: layer(b, x))((), layer(b, x))),
    r"params\['b'\] is used by two calls",
  ),
  "inside_another_layer": (
    lambda p, x: jnp.sum(mpo.fused_layer(lambda w, x: layer(p["b"], x @ w))(p["a"], x)),
    r"params\['b'\] is used inside the function of a fused_layer",
  ),
  "grad": (with_b(lambda b, x: jax.grad(lambda x: jnp.sum(layer(b, x)))(x)), "inside a transformation"),
  "vmap": (with_b(lambda b, x: jax.vmap(lambda x: layer(b, x))(x)), "inside a transformation"),
  "jvp": (with_b(lambda b, x: jax.jvp(lambda x: layer(b, x), (x,), (x,))[1]), "inside a transformation"),
  "remat": (with_b(lambda b, x: jax.checkpoint(lambda x: layer(b, x))(x)), r"inside a transformation.*remat=True"),
  "jit": (with_b(lambda b, x: jax.jit(lambda x: layer(b, x))(x)), "inside a transformation"),
  "scan": (with_b(lambda b, x: jax.lax.scan(scan_body(b), x, length=2)[0]), r"inside a transformation.*fused_scan"),
  "value_in_vmap": (with_b(lambda b, x: jax.vmap(lambda x: x @ mpo.fused_value(b))(x)), "inside a transformation"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_named(name):
  loss_fn, message = MISUSES[name]
  with pytest.raises(mpo.FusedError, match=message):
    trace(loss_fn)


def test_the_good_loss_is_good():
  value, params, _ = trace(good)
  assert (value.shape, jax.tree.structure(params)) == ((), jax.tree.structure(PARAMS))


def test_handles_that_leak():
  kept = []

  def loss_fn(params, x):
    kept.append(params["a"])
    return good(params, x)

  trace(loss_fn)
  with pytest.raises(mpo.FusedError, match="after the loss function it was made for has returned"):
    layer(kept[0], X)
  with pytest.raises(mpo.FusedError, match="after the loss function"):
    mpo.fused_value(kept[0])
  step = mpo.fused_value_and_update(lambda p, x: (good(p, x), p["a"]), optax.adam(1e-2), has_aux=True)
  with pytest.raises(mpo.FusedError, match=r"is the handle of params\['a'\]"):
    jax.eval_shape(step, PARAMS, optax.adam(1e-2).init(PARAMS), X)


@pytest.mark.parametrize(
  "around",
  {
    "grad": lambda step: jax.grad(lambda p, s, x: step(p, s, x)[0]),
    "jit_grad": lambda step: jax.grad(lambda p, s, x: jax.jit(step)(p, s, x)[0]),
    "grad_of_remat": lambda step: jax.grad(lambda p, s, x: jax.checkpoint(step)(p, s, x)[0]),
    "jvp": lambda step: lambda p, s, x: jax.jvp(lambda x: step(p, s, x)[0], (x,), (x,)),
    "vmap": lambda step: lambda p, s, x: jax.vmap(step, in_axes=(None, None, 0))(p, s, x[None]),
  }.items(),
  ids=lambda item: item[0],
)
def test_transformations_around_a_step(around):
  tx = optax.sgd(1e-2, momentum=0.9)
  step = mpo.fused_value_and_update(good, tx)
  with pytest.raises(mpo.FusedError, match="a fused step cannot be"):
    around[1](step)(PARAMS, tx.init(PARAMS), X)


def test_coupled_updates_are_refused_and_those_of_one_layer_are_not():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"tx couples params\['a'\] to params\['b'\].*optax.clip") as error:
    trace(good, tx)
  assert "fused_layer" in str(error.value)
  both = mpo.fused_layer(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])

  def loss_fn(params, x):
    return jnp.sum(both(params, x))

  got = jax.jit(mpo.fused_value_and_update(loss_fn, tx))(PARAMS, tx.init(PARAMS), X)
  grads = jax.grad(loss_fn)(PARAMS, X)
  want = optax.apply_updates(PARAMS, tx.update(grads, tx.init(PARAMS), PARAMS)[0])
  # The order of the norm's sum depends on XLA's fusions, so results may differ by an ulp.
  for name, w in want.items():
    assert jnp.allclose(got[1][name], w, rtol=1e-6, atol=1e-7)


def test_apply_if_finite_couples_all_leaves():
  with pytest.raises(ValueError, match=r"tx couples params\['a'\] to params\['b'\]"):
    trace(good, optax.apply_if_finite(optax.sgd(0.1), 3))


def test_updates_that_mix_layers_are_refused():
  def loss_fn(params, x):
    return jnp.sum(mpo.fused_scan(lambda w, x, _: (x @ w, None))(params, x)[0])

  stack = jnp.stack([jnp.eye(3)] * 4)
  with pytest.raises(ValueError, match=r"stacked weights params.*reduce_sum.*mixes the layers"):
    trace(loss_fn, optax.lamb(1e-2), stack)
  with pytest.raises(ValueError, match=r"have to be stacked.*params\['a'\] \[3\].*params\['c'\] \[\]"):
    trace(lambda p, x: loss_fn(p, x), params={"a": jnp.eye(3), "c": jnp.ones(())})
  with pytest.raises(ValueError, match=r"xs has an array of shape \[5\], but there are 4 layers"):
    trace(lambda p, x: mpo.fused_scan(lambda w, x, y: (x @ w, y))(p, x, jnp.ones(5))[0].sum(), params=stack)


def test_a_state_for_other_params_and_a_tx_that_changes_its_state():
  tx = optax.adam(1e-2)
  with pytest.raises(ValueError, match=r"opt_state.*Make the state with"):
    trace(good, tx, opt_state=tx.init({"a": jnp.eye(3)}))
  with pytest.raises(ValueError, match=r"has shape \[2, 3\], but for these params it is \[3, 3\]"):
    trace(good, tx, opt_state=tx.init({"a": jnp.ones((2, 3)), "b": jnp.eye(3)}))
  growing = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, (jnp.ones(()),)))
  with pytest.raises(ValueError, match="changes the structure of its state"):
    trace(good, growing)


def test_wrong_arguments():
  with pytest.raises(TypeError, match="loss_fn has to be a function"):
    mpo.fused_value_and_update(3, optax.sgd(0.1))
  with pytest.raises(TypeError, match="tx has to be an Optax transformation"):
    mpo.fused_value_and_update(good, optax.sgd)
  with pytest.raises(TypeError, match="remat has to be"):
    mpo.fused_layer(lambda w, x: x, remat="yes")
  with pytest.raises(TypeError, match="fn has to be a function or a Flax module"):
    mpo.fused_scan(3)
  with pytest.raises(TypeError, match=r"params\['a'\] is a float, not an array"):
    mpo.fused_value_and_update(good, optax.sgd(0.1))({"a": 1.0, "b": jnp.eye(3)}, (), X)


def test_a_weight_that_the_loss_does_not_depend_on_is_stepped_with_a_zero_gradient():
  def loss_fn(params, x):
    mpo.fused_value(params["b"])
    return jnp.sum(jax.lax.stop_gradient(layer(params["a"], x)))

  tx = mpo.compensated(optax.adamw(1e-2, weight_decay=0.1))
  params, opt_state = mpo.init(tx, PARAMS)
  got = jax.jit(mpo.fused_value_and_update(loss_fn, tx))(params, opt_state, X.astype(jnp.bfloat16))[1:]
  updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
  want = (mpo.apply_updates(params, updates), state)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, want))
  assert float(mpo.master_params(*got)["a"][0, 0]) < 1  # by weight decay


def test_frozen_weights_need_not_be_used():
  labels = {"a": "train", "b": "freeze"}
  tx = optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)
  step = jax.jit(mpo.fused_value_and_update(lambda p, x: jnp.sum(layer(p["a"], x)), tx))
  _, params, _ = step(PARAMS, tx.init(PARAMS), X)
  assert (params["b"] == PARAMS["b"]).all()
  assert (params["a"] != PARAMS["a"]).any()
