"""`per_layer` on a scanned model equals the transformation on a list of layers, bit for bit, inside the scan too.

Where a list of layers is compared, both sides are compiled without XLA's fusion and its algebraic simplifier: it
divides by a scalar that divides only one array as a product, and a list of layers shares the scalars of all layers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import optax_mpo as mpo
from optax_mpo.checkpoint import Checkpointer
from tests.helpers import assert_same_bits, ordinary_step, quick_jit

L, D = 3, 16
quick = functools.partial(quick_jit, xla_disable_hlo_passes="fusion,algsimp")
INNER = {
  "muon": lambda: contrib.muon(1e-2),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
  "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
  "lars": lambda: optax.lars(1e-1, weight_decay=0.1),
  "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(1e-2), optax.sgd(1e-1, momentum=0.9)),
  "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(1e-3), optax.adam(1e-2)),
}


def make_params():
  keys = jax.random.split(jax.random.key(0), 3)
  w, bias = jax.random.normal(keys[0], (L, D, D)) * D**-0.5, jax.random.normal(keys[1], (L, D)) * 0.1
  return {"head": jax.random.normal(keys[2], (D, D // 2)) * D**-0.5, "layers": {"w": w, "bias": bias}}


def layer(x, p):
  return x + jnp.tanh(x @ p["w"] + p["bias"][None]), None


def loss_of(run):
  def loss(params, x):
    x = run(x.astype(params["head"].dtype), params["layers"])
    return jnp.mean(jnp.square((x @ params["head"]).astype(jnp.float32)))

  return loss


scanned = loss_of(lambda x, layers: lax.scan(layer, x, layers)[0])
unrolled = loss_of(lambda x, layers: functools.reduce(lambda x, p: layer(x, p)[0], layers, x))


def is_stack(path, leaf):
  return path[0].key == "layers"


def as_list(params):
  return params | {"layers": [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(L)]}


def batch(i):
  return jax.random.normal(jax.random.key(100 + i), (4, D))


def as_one(params):
  return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def in_two_programs(loss, tx):
  """The ordinary step, which compiles faster if its gradients are a program of their own."""
  gradients, update = quick(jax.grad(loss)), quick(lambda *args: apply(tx, *args))
  return lambda params, state, x: (None, *update(gradients(params, x), state, params))


def apply(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return mpo.apply_updates(params, updates), state


@pytest.mark.parametrize("name", list(INNER))
@pytest.mark.parametrize(
  "make_step", [in_two_programs, lambda *args: quick(mpo.value_and_update(*args))], ids=["ordinary", "fused"]
)
@pytest.mark.few(2, full=5)
def test_training_equals_that_of_a_list_of_layers(name, make_step):
  tx, plain = mpo.per_layer(INNER[name](), is_stack), INNER[name]()
  params = make_params()
  got, want = (None, params, tx.init(params)), (None, as_list(params), plain.init(as_list(params)))
  one, other = make_step(scanned, tx), in_two_programs(unrolled, plain)
  for i in range(30):
    got, want = one(*got[1:], batch(i)), other(*want[1:], batch(i))
  assert_same_bits(got[1], as_one(want[1]))


def muon():
  return contrib.muon(1e-2)


def stacks_only(tx):
  return lambda: optax.multi_transform(
    {"stack": mpo.per_layer(tx()), "other": optax.adam(1e-2)},
    lambda params: jax.tree_util.tree_map_with_path(lambda p, x: "stack" if is_stack(p, x) else "other", params),
  )


def masked_stacks(tx):
  def mask(params):
    return jax.tree_util.tree_map_with_path(is_stack, params)

  return lambda: optax.chain(optax.masked(mpo.per_layer(tx()), mask), optax.scale(0.5))


def masked_inside():
  return mpo.per_layer(optax.masked(optax.lamb(1e-2), {"head": False, "layers": {"w": True, "bias": False}}), is_stack)


def eight_bit(tx, **options):
  return mpo.quantized_state(tx, min_size=D * D, block_size=8, **options)


WRAPPED = {
  "muon": lambda: mpo.per_layer(muon(), is_stack),
  "adafactor": lambda: mpo.per_layer(optax.adafactor(1e-2, min_dim_size_to_factor=8), is_stack),
  "clip, lamb": lambda: optax.chain(optax.clip(1e-3), mpo.per_layer(optax.lamb(1e-2), is_stack)),
  "multi_transform": stacks_only(muon),
  "masked": masked_stacks(INNER["adaptive_grad_clip"]),
  "masked inside": masked_inside,
  "8-bit state inside": lambda: mpo.per_layer(eight_bit(muon()), is_stack),
  "8-bit state outside": lambda: eight_bit(mpo.per_layer(muon(), is_stack)),
  "4-bit state": lambda: mpo.per_layer(eight_bit(optax.lamb(1e-2), state_bits=4), is_stack),
  "hyperparams": lambda: mpo.per_layer(
    optax.inject_hyperparams(optax.lamb)(lambda count: 1e-2 / (1 + count)), is_stack
  ),
}


def places(loss, tx, params):
  params, state = jax.eval_shape(lambda: mpo.init(tx, params))
  return {leaf.name: (leaf.stepped, leaf.why) for leaf in mpo.explain(loss, tx, params, state, batch(0))}


def assert_fused_equals_ordinary(loss, tx, params, steps=3):
  params, state = mpo.init(tx, params)
  one, other = quick_jit(mpo.value_and_update(loss, tx)), quick_jit(ordinary_step(loss, tx))
  got = want = (None, params, state)
  for i in range(steps):
    got, want = one(*got[1:], batch(i)), other(*want[1:], batch(i))
    assert_same_bits(got, want)


@pytest.mark.parametrize("name", list(WRAPPED))
@pytest.mark.few(2, full=3)
def test_stacks_are_updated_in_their_scan_as_in_the_ordinary_step(name):
  tx = mpo.compensated(WRAPPED[name](), extra_bits=8)
  assert places(scanned, tx, make_params())["params['layers']['w']"] == ("in scan", "")
  assert_fused_equals_ordinary(scanned, tx, make_params())


def test_layers_on_another_axis():
  """The state has its layers there too, where it has the shape of the stack, so that it can be sharded alike."""

  def moved(params):
    return params | {"layers": params["layers"] | {"w": jnp.swapaxes(params["layers"]["w"], 0, 1)}}

  def where(path, leaf):
    return is_stack(path, leaf) and path[-1].key == "w" and 1

  def loss(params, x):
    return scanned(moved(params), x)

  tx = mpo.compensated(mpo.per_layer(INNER["adaptive_grad_clip"](), where))
  params = moved(make_params())
  assert places(loss, tx, params)["params['layers']['w']"] == ("in scan", "")
  assert_fused_equals_ordinary(loss, tx, params)
  _, state = mpo.init(tx, params)
  first = mpo.per_layer(muon(), lambda path, leaf: path[-1].key == "w")
  grads = jax.tree.map(jnp.cos, make_params())
  want, _ = first.update(grads, first.init(make_params()), make_params())
  tx = mpo.per_layer(muon(), where)
  got, state = tx.update(moved(grads), tx.init(params), params)
  assert_same_bits(moved(got), want)
  (momentum,) = (x for x in jax.tree.leaves(state.layers["layers"]["w"]) if x.ndim == 3)
  assert momentum.shape == (D, L, D)


def test_stacks_of_stacks():
  grads = jax.random.normal(jax.random.key(0), (2, 3, D, D))
  tx, one = mpo.per_layer(mpo.per_layer(muon())), muon()
  got, _ = tx.update(grads, tx.init(grads), grads)
  want, _ = one.update(grads[1, 2], one.init(grads[1, 2]), grads[1, 2])
  assert_same_bits(got[1, 2], want)


def test_extra_arguments_reach_each_layer():
  def update(updates, state, params=None, *, factor, **extra_args):
    return jax.tree.map(lambda g: factor * g / jnp.max(g), updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  tx = optax.chain(mpo.per_layer(inner), optax.scale(1.0))
  grads = {"w": jnp.array([[1.0, 2.0], [4.0, 8.0]])}
  updates, _ = tx.update(grads, tx.init(grads), factor=jnp.float32(6.0), unused=None)
  assert_same_bits(updates, {"w": jnp.array([[3.0, 6.0], [3.0, 6.0]])})


def test_leaves_that_are_no_stacks_see_each_other():
  """`tx` gets all of them in one tree, so that their common norm is that of the plain transformation."""
  tx, plain = mpo.per_layer(optax.clip_by_global_norm(1.0), is_stack), optax.clip_by_global_norm(1.0)
  grads = {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0), "layers": jnp.full((2, 4), 5.0)}
  updates, _ = tx.update(grads, tx.init(grads), grads)
  want, _ = plain.update({"a": grads["a"], "b": grads["b"]}, optax.EmptyState())
  assert_same_bits({"a": updates["a"], "b": updates["b"]}, want)
  assert_same_bits(updates["layers"], jnp.full((2, 4), 0.5))


def test_an_ensemble_is_trained_as_its_members_are():
  tx = mpo.per_layer(optax.chain(optax.clip_by_block_rms(1e-3), optax.sgd(1e-1, momentum=0.9)), is_stack)
  members = [jax.tree.map(lambda leaf, k=k: leaf + 0.01 * k, make_params()) for k in range(2)]
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
  step = mpo.value_and_update(scanned, tx)
  got = quick(jax.vmap(step, (0, 0, None)))(together, jax.vmap(tx.init)(together), batch(0))
  want = [quick(step)(member, tx.init(member), batch(0)) for member in members]
  for k in range(2):
    assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], got), want[k])


def assert_close(got, want):
  """A product over a batch of members sums in another order."""
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), got, want)


@pytest.mark.parametrize("spec", [P(None, "x"), P(None, None, "x")], ids=str)
def test_sharded_steps(spec):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  tx = mpo.compensated(mpo.per_layer(muon(), is_stack))
  whole = mpo.init(tx, make_params())
  shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), whole[0])
  shardings["layers"]["w"] = NamedSharding(mesh, spec)
  params = jax.device_put(whole[0], shardings)
  of_state = mpo.state_sharding(params, whole[1])
  (momentum,) = {s.spec for s in jax.tree.leaves(of_state) if s.spec != P()}
  assert momentum == spec
  state = jax.device_put(whole[1], of_state)
  step = mpo.value_and_update(scanned, tx)
  got = jax.jit(step, out_shardings=(None, shardings, of_state))(params, state, batch(0))
  want = quick_jit(step)(*whole, batch(0))
  assert_close(mpo.master_params(*got[1:]), mpo.master_params(*want[1:]))
  for have, wanted in zip(jax.tree.leaves(got[2]), jax.tree.leaves(of_state), strict=True):
    assert have.sharding.is_equivalent_to(wanted, have.ndim)


def test_kernels_leave_stacks_to_xla_and_say_why():
  tx = mpo.with_kernels(mpo.compensated(mpo.per_layer(optax.adamw(1e-2), is_stack)))
  place, why = places(scanned, tx, make_params())["params['layers']['w']"]
  assert place == "in scan"
  assert why.startswith("no kernel: `scan` (")
  assert_fused_equals_ordinary(scanned, tx, make_params(), steps=1)


def test_explain_recommends_it_for_what_is_not_separable():
  place, why = places(scanned, mpo.compensated(optax.lamb(1e-2)), make_params())["params['layers']['w']"]
  assert place == "at the end"
  assert "`reduce_sum`" in why
  assert "or wrap the transformation in per_layer, along the axis that the model scans" in why


def test_a_checkpoint_holds_the_state_of_each_layer(tmp_path):
  tx = mpo.compensated(mpo.per_layer(eight_bit(muon()), is_stack), extra_bits=8)
  kept = mpo.init(tx, make_params())
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, kept)
    _, restored = checkpoints.restore(jax.eval_shape(lambda: kept))
  assert_same_bits(restored, kept)


def test_fused_layers_take_stacks_too():
  tx = mpo.compensated(mpo.per_layer(muon(), is_stack))

  def loss(params, x):
    head = mpo.fused_value(params["head"])
    x, _ = mpo.fused_scan(lambda p, x, _: layer(x, p))(params["layers"], x.astype(jnp.bfloat16))
    return jnp.mean(jnp.square((x @ head).astype(jnp.float32)))

  params, state = mpo.init(tx, make_params())
  got = quick_jit(mpo.fused_value_and_update(loss, tx))(params, state, batch(0))
  assert_same_bits(got, quick_jit(ordinary_step(scanned, tx))(params, state, batch(0)))


def test_convert_keeps_the_state_of_each_layer():
  tx = mpo.compensated(mpo.per_layer(eight_bit(muon()), is_stack), extra_bits=8)
  params, state = mpo.init(tx, make_params())
  _, params, state = quick_jit(mpo.value_and_update(scanned, tx))(params, state, batch(0))
  assert_same_bits(mpo.convert(tx, params, state), (params, state))
  plain = mpo.per_layer(muon(), is_stack)
  masters, wide = mpo.convert(plain, params, state)
  assert_same_bits(masters, mpo.master_params(params, state))
  assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, plain.init(masters))


@pytest.mark.filterwarnings("error")
def test_a_weight_decay_that_the_bits_lose_is_noticed_in_layers_too():
  """Only after the warm-up, at a later step of the counter that each layer has."""

  def schedule(count):
    return jnp.where(count < 10, 0.0, 1e-3)

  tx = mpo.compensated(mpo.per_layer(optax.adamw(schedule, weight_decay=1e-3)), extra_bits=4)
  with pytest.warns(UserWarning, match="weight decay"):
    mpo.init(tx, jnp.ones((2, 3, 4)))


BAD = {  # params, where, what the error says
  "scalar": ({"w": (3, 4), "scale": ()}, None, r"params\['scale'\] has shape \[\].*Return False for it in per_layer"),
  "axis": ({"w": (3, 4)}, lambda path, leaf: 2, r"params\['w'\] has shape \[3, 4\], and so no axis 2 of layers"),
  "lengths": ({"w": (3, 4), "head": (4, 5)}, None, r"params\['head'\] has 4, params\['w'\] has 3. Say which leaves"),
  "result": ({"w": (3, 4)}, lambda path, leaf: "0", r"where returned '0' for params\['w'\]. Return True"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_stack_is_named(name):
  shapes, where, message = BAD[name]
  params = {key: jnp.ones(shape) for key, shape in shapes.items()}
  with pytest.raises(ValueError, match=message):
    mpo.per_layer(optax.lamb(1e-3), where).init(params)


def test_misuse_is_named():
  params = {"w": jnp.ones((2, 3)), "head": jnp.ones(3)}
  tx = mpo.per_layer(optax.lamb(1e-3), lambda path, leaf: leaf.ndim == 2)
  with pytest.raises(TypeError, match="per_layer: tx has to be an Optax transformation, but it is a str"):
    mpo.per_layer("adam")  # pyright: ignore[reportArgumentType]
  with pytest.raises(TypeError, match="per_layer: update was given a tuple for its state"):
    tx.update(params, (), params)
  with pytest.raises(ValueError, match=r"params\['head'\] was not a stack of layers when the state was made"):
    mpo.per_layer(optax.lamb(1e-3), lambda path, leaf: True).update(params, tx.init(params), params)
  with pytest.raises(ValueError, match=r"no compensated\(...\) in tx trains params\['w'\].*put it inside"):
    mpo.init(mpo.per_layer(mpo.compensated(optax.lamb(1e-3))), {"w": jnp.ones((2, 3))})
