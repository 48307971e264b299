"""`value_and_update` equals value_and_grad, tx.update and apply_updates, bit for bit, for all kinds of programs.

Both sides are compiled without excess precision and, as all tests (tests/conftest.py), without fused multiply-adds: of
a*b + c*d a loop may use the other product for one, in plain Optax too. LLVM's lowest optimization level compiles fast
and does not reorder sums. A test compares them as docs/numerics.md advises.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from optax_mpo._program import jax_forms
from tests.helpers import assert_same_bits, exact_jit, ordinary_step, quick_jit, unfused_jit

WIDTH, LAYERS = 8, 3


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape) * shape[0] ** -0.5 if shape else jnp.float32(0.7)


def stack(*lead):
  return {"up": normal(1, *lead, WIDTH, 16), "down": normal(2, *lead, 16, WIDTH), "scale": jnp.ones((*lead, WIDTH))}


def block(p, x):
  return x + jnp.tanh((x * p["scale"][None]) @ p["up"]) @ p["down"]


def layers(p, x, block=block, **options):
  x = x.astype(jax.tree.leaves(p)[0].dtype)
  return lax.scan(lambda x, p: (block(p, x), None), x, p, **options)[0]


def mean_square(x):
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


CASES = {}


def case(params, **placed):
  """Adds a model: its params, and for entries of them where `explain` should report their updates."""

  def add(loss):
    CASES[loss.__name__] = (params, loss, placed)
    return loss

  return add


@case({"a": normal(0, WIDTH, WIDTH), "b": normal(1, WIDTH, WIDTH)}, a="at once", b="at once")
def dense(p, x):
  return mean_square(jnp.tanh(x @ p["a"]) @ p["b"])


@case({"embed": normal(0, WIDTH, WIDTH), "blocks": [stack() for _ in range(LAYERS)]}, embed="at once", blocks="at once")
def unrolled_remat_tied(p, x):
  x = x @ p["embed"]
  for b in p["blocks"]:
    x = jax.checkpoint(block)(b, x)
  return mean_square(x @ p["embed"].T)


@case({"in": normal(0, WIDTH, WIDTH), "layers": stack(LAYERS), "out": normal(3, WIDTH, 4)}, layers="in scan")
def scanned(p, x):
  return mean_square(layers(p["layers"], x.astype(p["in"].dtype) @ p["in"]) @ p["out"])


@case({"layers": stack(LAYERS)}, layers="in scan")
def scanned_remat(p, x):
  return mean_square(layers(p["layers"], x, jax.checkpoint(block)))


@case({"layers": stack(LAYERS)}, layers="in scan")
def scanned_backwards_and_unrolled(p, x):
  return mean_square(layers(p["layers"], x, jax.checkpoint(block), reverse=True, unroll=2))


@case({"one": stack(LAYERS), "two": stack(2)}, one="in scan", two="in scan")
def two_stacks(p, x):
  return mean_square(layers(p["two"], layers(p["one"], x)))


@case({"layers": stack(LAYERS)}, layers="in scan")
def scanned_twice(p, x):
  return mean_square(layers(p["layers"], layers(p["layers"], x)))


@case({"layers": stack(2, LAYERS)}, layers="in scan")
def nested_scans(p, x):
  return mean_square(lax.scan(lambda x, p: (layers(p, x, jax.checkpoint(block)), None), x, p["layers"])[0])


@case({"up": normal(1, WIDTH, LAYERS, WIDTH)}, up="in scan")
def layers_on_the_second_axis(p, x):
  return mean_square(lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, jnp.moveaxis(p["up"], 1, 0))[0])


@case({"layers": stack(LAYERS)}, layers="in scan")
def cast_before_the_scan(p, x):
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p["layers"])
  return mean_square(layers(low, x.astype(jnp.bfloat16), jax.checkpoint(block)))


@case({"w": normal(1, LAYERS, WIDTH, WIDTH)}, w="in scan")
def transposed_before_the_scan(p, x):
  return mean_square(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"].transpose(0, 2, 1))[0])


@case({"layers": stack(LAYERS)}, layers="in scan")
def decayed_in_the_loss(p, x):
  return mean_square(layers(p["layers"], x)) + 1e-2 * sum(map(mean_square, jax.tree.leaves(p["layers"])))


@case({"layers": stack(LAYERS)}, layers="in scan")
def first_layer_read_after_the_scan(p, x):
  first = jax.tree.map(lambda a: a[0], p["layers"])
  return mean_square(block(first, layers(p["layers"], x)))


@case({"layers": stack(LAYERS)}, layers="at the end")
def first_layer_read_before_the_scan(p, x):
  first = jax.tree.map(lambda a: a[0], p["layers"])
  return mean_square(layers(p["layers"], block(first, x)))


@case({"w": normal(0, WIDTH, WIDTH), "u": normal(1, WIDTH, WIDTH)}, w="at once", u="at once")
def recurrent(p, x):
  steps = jnp.stack([x, 2 * x, -x])
  return mean_square(lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]), None), x, steps)[0] @ p["w"].T)


@case({"w": normal(0, WIDTH), "unused": normal(1, WIDTH), "also": jnp.float32(2)}, unused="with a zero gradient")
def unused(p, x):
  return mean_square(x * p["w"][None])


@case({"a": normal(0, WIDTH), "b": normal(1, WIDTH)})
def one_gradient_for_two(p, x):
  return jnp.sum((p["a"] + p["b"]).astype(jnp.float32) * x[0].astype(jnp.float32))


@case({"s": normal(0), "w": normal(0, WIDTH, WIDTH)})
def branches(p, x):
  return lax.cond(x[0, 0] > 0, lambda: mean_square(x @ p["w"]), lambda: mean_square(x @ p["w"] * p["s"]))


@jax.custom_vjp
def doubled(x, w):
  return x @ w


doubled.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (2 * g @ res[1].T, 2 * res[0].T @ g))


@case({"a": normal(0, WIDTH, WIDTH), "b": normal(1, WIDTH, WIDTH)})
def nested_calls(p, x):
  inner = jax.jit(lambda p, x: doubled(jax.nn.silu(jax.jit(jnp.matmul)(x, p["a"])), p["b"]))
  return mean_square(inner(p, x))


@case({"a": normal(0, WIDTH, WIDTH), "layers": stack(LAYERS)}, layers="in scan")
def all_of_it_rematerialised(p, x):
  policy = jax.checkpoint_policies.dots_saveable
  return jax.checkpoint(lambda p, x: mean_square(layers(p["layers"], x @ p["a"])), policy=policy)(p, x)


@case({"kernel": normal(0, 3, 3, 1, 4), "w": normal(1, 4, 2)})
def convolution(p, x):
  image = x[:, None, :, None]
  y = lax.conv_general_dilated(image, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return mean_square(jnp.tanh(jnp.mean(y, (1, 2))) @ p["w"])


OPTIMIZERS = {
  "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
  # Has no division: depending on an array's shape, XLA divides it by a scalar or multiplies it by the reciprocal. Then
  # one layer of a small stack and the whole stack may differ in the last bit.
  "momentum": lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(1e-1, momentum=0.9)),
}


def batch(i, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(100 + i), (4, WIDTH)).astype(dtype)


def assert_equal_steps(loss, tx, params, state, steps=3, jit=quick_jit, make=mpo.value_and_update):
  dtype = jax.tree.leaves(params)[0].dtype
  want, got = (None, params, state), (None, params, state)
  one, other = jit(ordinary_step(loss, tx)), jit(make(loss, tx))
  for i in range(steps):
    want, got = one(*want[1:], batch(i, dtype)), other(*got[1:], batch(i, dtype))
    assert_same_bits(got, want)


def assert_close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(4, full=10)
def test_steps_are_those_of_the_unfused_step(name):
  params, loss, _ = CASES[name]
  tx = mpo.compensated(OPTIMIZERS["momentum"]())
  assert_equal_steps(loss, tx, *mpo.init(tx, params))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(0, full=3)
def test_they_are_as_the_documentation_advises_to_compare(name):
  """docs/numerics.md. With the algebraic simplifier, XLA divides by some scalars as a product."""
  params, loss, _ = CASES[name]
  tx = mpo.compensated(OPTIMIZERS["adamw"]())
  jit = functools.partial(unfused_jit, xla_disable_hlo_passes="fusion,algsimp")
  assert_equal_steps(loss, tx, *mpo.init(tx, params), jit=jit)


@pytest.mark.parametrize("name", ["scanned_remat", "unrolled_remat_tied"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_optax_on_f32(name, optimizer):
  params, loss, _ = CASES[name]
  tx = OPTIMIZERS[optimizer]()
  assert_equal_steps(loss, tx, params, tx.init(params))


def test_without_jit():
  """Equal up to rounding: JAX compiles parts of a derivative alone, depending on its version, and fuses inside them."""
  params, loss, _ = CASES["unrolled_remat_tied"]
  tx = OPTIMIZERS["momentum"]()
  want, got = (
    ordinary_step(loss, tx)(params, tx.init(params), batch(0)),
    mpo.value_and_update(loss, tx)(params, tx.init(params), batch(0)),
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_explain_tells_where_leaves_are_stepped(name):
  params, loss, placed = CASES[name]
  tx = OPTIMIZERS["adamw"]()
  rows = mpo.explain(loss, tx, params, tx.init(params), batch(0))
  assert len(rows) == len(jax.tree.leaves(params))
  for row in rows:
    for entry, where in placed.items():
      if row.name.startswith(f"params['{entry}']"):
        assert row.stepped == where, row


def test_explain_says_why_a_stack_is_not_stepped_in_its_scan():
  params, loss, _ = CASES["first_layer_read_before_the_scan"]
  tx = OPTIMIZERS["adamw"]()
  rows = mpo.explain(loss, tx, params, tx.init(params), batch(0))
  assert {row.stepped for row in rows} == {"at the end"}, rows
  # the gradients from the scan and that of the first of three layers are held until their sum is made
  held = [row.gradient_bytes for row in rows]
  assert held == [4 * row.parameters * (1 + 1 + 1 / 3) for row in rows], rows
  assert all("2 parts are held" in row.why for row in rows)


def test_aux_keywords_and_static_arguments():
  def loss(p, x, how, *, scale):
    y = x @ p["w"] * scale
    return mean_square(y), {"y": y, "how": how, "w": p["w"], "nothing": None}

  params, tx = {"w": normal(0, WIDTH, 2)}, optax.adam(1e-2)
  want = ordinary_step(loss, tx, has_aux=True)(params, tx.init(params), batch(0), "so", scale=2.0)
  got = mpo.value_and_update(loss, tx, has_aux=True)(params, tx.init(params), batch(0), "so", scale=2.0)
  assert got[0][1].pop("how") == want[0][1].pop("how") == "so"
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert_close(got, want)  # without jit, a call inside Optax may fuse, and single operations do not


def test_switching_to_the_unfused_step_and_back():
  params, loss, _ = CASES["scanned"]
  tx = mpo.compensated(OPTIMIZERS["adamw"]())
  one, other = quick_jit(ordinary_step(loss, tx)), quick_jit(mpo.value_and_update(loss, tx))
  want = got = (None, *mpo.init(tx, params))
  for i in range(4):
    want, got = one(*want[1:], batch(i)), (one if i % 2 else other)(*got[1:], batch(i))
  assert_same_bits(got, want)


def test_an_update_that_is_not_separable_by_layer_is_done_after_the_scan():
  params, loss, _ = CASES["scanned_remat"]
  tx = optax.chain(optax.scale_by_adam(), optax.clip_by_block_rms(0.1), optax.scale(-1e-2))
  assert_equal_steps(loss, tx, params, tx.init(params))


def test_sharded():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params, loss, _ = CASES["scanned_remat"]
  tx = optax.adam(1e-2)

  def sharded_loss(p, x):
    return loss(p, lax.with_sharding_constraint(x, spec))

  x = jax.device_put(jnp.concatenate([batch(0), batch(1)]), spec)
  want = quick_jit(ordinary_step(sharded_loss, tx))(params, tx.init(params), x)
  assert_same_bits(quick_jit(mpo.value_and_update(sharded_loss, tx))(params, tx.init(params), x), want)


# --- Two passes -------------------------------------------------------------------------------------------------------


def test_coupled_updates_are_refused():
  params, loss, _ = CASES["dense"]
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2))
  with pytest.raises(ValueError, match=r"couples params\['a'\] to params\['b'\].*two_pass=True"):
    mpo.value_and_update(loss, tx)(params, tx.init(params), batch(0))


def test_the_state_of_other_params_is_refused():
  params, loss, _ = CASES["dense"]
  tx = optax.adam(1e-2)
  with pytest.raises(ValueError, match="value_and_update: opt_state"):
    mpo.value_and_update(loss, tx)(params, tx.init({"a": params["a"]}), batch(0))


def test_integer_params_and_losses_that_are_no_scalars_are_refused_as_by_value_and_grad():
  tx = optax.sgd(1e-2)
  for params, loss, error in (
    ({"n": jnp.arange(3)}, lambda p, x: jnp.sum(p["n"] * 1.0), "real- or complex-valued inputs"),
    ({"w": jnp.ones(3)}, lambda p, x: p["w"], "scalar-output"),
  ):
    with pytest.raises(TypeError, match=error):
      mpo.value_and_update(loss, tx)(params, tx.init(params), batch(0))


def test_params_that_are_closed_over_are_refused():
  params, tx = {"w": normal(0, WIDTH, 2)}, optax.sgd(1e-2)
  step = mpo.value_and_update(lambda p, x: mean_square(x @ p["w"] + x @ params["w"]), tx)
  with pytest.raises(ValueError, match=r"closes over params\['w'\]"):
    step(params, tx.init(params), batch(0))


def test_ordered_effects_keep_their_order(capfd):
  def loss(p, x):
    jax.debug.print("first", ordered=True)
    y = layers(p["layers"], x)
    jax.debug.print("second", ordered=True)
    return mean_square(y)

  params, tx = CASES["scanned"][0], optax.sgd(1e-2)
  jax.block_until_ready(jax.jit(mpo.value_and_update(loss, tx))(params, tx.init(params), batch(0)))
  jax.effects_barrier()
  assert capfd.readouterr().out.split() == ["first", "second"]


def test_an_unknown_jax_is_named_and_fused_layers_work_there(monkeypatch):
  def scan_counts(operation):
    return operation.eqn.params["in_tree"]

  monkeypatch.setattr(jax_forms, "scan_counts", scan_counts)
  params, loss, _ = CASES["scanned"]
  tx = OPTIMIZERS["momentum"]()
  with pytest.raises(NotImplementedError, match=rf"{re.escape(jax_forms.KNOWN)}.*'in_tree'.*fused_value_and_update"):
    mpo.value_and_update(loss, tx)(params, tx.init(params), batch(0))

  def smoothed(updates, state, params):  # a scan in the update, with unknown dependencies
    return jax.tree.map(lambda u: lax.scan(lambda c, _: (0.5 * c, None), u, None, length=2)[0], updates), state

  tx = optax.chain(tx, optax.GradientTransformation(lambda params: optax.EmptyState(), smoothed))

  layer = mpo.fused_layer(lambda w, x: jnp.tanh(x @ w))

  def fused_loss(p, x):
    return mean_square(layer(p["w"], x))

  params = {"w": normal(0, WIDTH, WIDTH)}
  step = exact_jit(mpo.fused_value_and_update(fused_loss, tx))
  want = exact_jit(ordinary_step(fused_loss, tx))(params, tx.init(params), batch(0))
  assert_same_bits(step(params, tx.init(params), batch(0)), want)


def test_no_retracing_under_jit():
  params, loss, _ = CASES["scanned"]
  tx, traced = mpo.compensated(OPTIMIZERS["adamw"]()), []

  def counted(p, x):
    traced.append(1)
    return loss(p, x)

  step = jax.jit(mpo.value_and_update(counted, tx), donate_argnums=(0, 1))
  state = (None, *mpo.init(tx, params))
  for i in range(3):
    state = step(*state[1:], batch(i))
  assert len(traced) == 1
