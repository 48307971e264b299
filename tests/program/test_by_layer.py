"""Updates of stacked layers, made one layer at a time, are never silently wrong.

Every update below is either accepted, and then equals the update of the whole stack for each layer; or it is refused
with an error that names the leaf and the operation. All axes have the same size, so that shapes do not reveal a wrong
axis.
"""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax import contrib

import optax_mpo as mpo
from optax_mpo._core import wrapping
from optax_mpo._program.entries import NotSeparableError
from optax_mpo._updates import by_leaf
from tests.helpers import one_layer

L = 3
SHAPE = (L, L, L)
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)  # closed over, with other values in each layer
MASK = jnp.asarray(RNG.random(SHAPE) < 0.5)
KEY = jax.random.key(1, impl="rbg")  # compiles faster


def spread(x):
  return jnp.broadcast_to(x, SHAPE)


def bytes_reversed(x):
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint8)[..., ::-1], jnp.uint32).astype(jnp.float32)


def narrow_pairs(x):
  """f32[3, 3, 3] -> f32[3, 3, 3]: splits each number into two halves on a new last axis, and joins them again."""
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16), jnp.float32)


APART = {
  "elementwise": lambda x: jnp.tanh(x) * TABLE + jnp.where(x > 0, x, TABLE),
  "mask": lambda x: jnp.where(MASK, x, 0.0),
  "clamp": lambda x: lax.clamp(jnp.float32(-0.3), x, jnp.float32(0.7)) + lax.clamp(TABLE, x, TABLE + 1),
  "sum": lambda x: spread(x.sum(2, keepdims=True)),
  "sum_both": lambda x: x / jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True)),
  "argmax": lambda x: spread(jnp.argmax(x, 1, keepdims=True).astype(jnp.float32)),
  "moved_mean": lambda x: spread(x.mean(1)[:, None, :]),
  "cumsum": lambda x: jnp.cumsum(x, 1) + lax.cummax(x, 2),
  "sort": lambda x: jnp.sort(x, 1) + jnp.argsort(x, 2).astype(jnp.float32),
  "sort_with_table": lambda x: lax.sort((x, TABLE), dimension=2, num_keys=1)[1] + lax.sort((TABLE, x), dimension=1)[1],
  "softmax": lambda x: jax.nn.softmax(x, 2),
  "flip": lambda x: x[:, ::-1],
  "roll": lambda x: jnp.roll(x, 1, 1),
  "pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :L],
  "concatenate": lambda x: jnp.concatenate([TABLE, x], 2)[:, :, ::2],
  "reshape": lambda x: jnp.sort(x.reshape(L, L * L), -1).reshape(SHAPE),
  "reshape_with_ones": lambda x: jnp.cumsum(x.reshape(1, L, L * L), 2).reshape(SHAPE),
  "transpose_and_back": lambda x: jnp.sort(x.transpose(2, 0, 1), 0).transpose(1, 2, 0),
  "square_transpose": lambda x: x.transpose(0, 2, 1) @ x,
  "matmul": lambda x: x @ TABLE,
  "table_first": lambda x: TABLE @ x,
  "one_matrix_for_all": lambda x: jnp.einsum("abc,cd->abd", x, TABLE[0]),
  "kronecker": lambda x: jnp.einsum("abc,ade->abc", x, x),
  "batched_twice": lambda x: spread(jnp.einsum("abc,abc->ab", x, x)[:, :, None]),
  "iota": lambda x: x * lax.broadcasted_iota(jnp.float32, SHAPE, 0) + lax.broadcasted_iota(jnp.float32, SHAPE, 1),
  "noise": lambda x: x + jax.random.normal(KEY, SHAPE) * jax.random.bernoulli(KEY, 0.5, SHAPE).astype(jnp.float32),
  "bytes": bytes_reversed,
  "halves": narrow_pairs,
  "cond": lambda x: lax.cond(TABLE[0, 0, 0] > 0, lambda y: y * TABLE, lambda y: TABLE, x),
  "cond_other": lambda x: lax.cond(TABLE[0, 0, 0] > 9, lambda y: y * TABLE, lambda y: TABLE, x),
  "mean_table": lambda x: x - TABLE.mean(0, keepdims=True),
  "broadcast_and_sum": lambda x: (spread(x)[None] * jnp.ones((L, 1, 1, 1))).sum(0),
  "barrier": lambda x: lax.optimization_barrier((x, TABLE))[1] + x,
  "map": lambda x: lax.map(lambda y: y @ y + TABLE[0] - y.mean(), x),
  "map_with_table": lambda x: lax.scan(lambda _, y: (None, (y[0] / y[1].sum(), y[0])), None, (x, TABLE))[1][0],
  "map_twice": lambda x: lax.map(lambda y: y.T, lax.map(lambda y: y - y.max(), x)),
  "map_of_scans": lambda x: lax.map(lambda y: lax.scan(lambda c, z: (c + z, c), jnp.zeros(L), y)[1], x),
  "constant": lambda x: TABLE * 2,
  "number": lambda x: jnp.zeros(SHAPE),
}

MIXED = {
  "transpose": (lambda x: x.transpose(1, 0, 2), "sub"),
  "transpose_last": (lambda x: x.transpose(2, 1, 0), "sub"),
  "sum": (lambda x: x - x.sum(0)[None], "reduce_sum"),
  "mean_of_all": (lambda x: x - x.mean(), "reduce_sum"),
  "norm_of_all": (lambda x: x / jnp.linalg.norm(x), "reduce_sum"),
  "argmax": (lambda x: spread(jnp.argmax(x, 0).astype(jnp.float32)), "argmax"),
  "any": (lambda x: jnp.where((x > 0).any(), x, 0.0), "reduce_or"),
  "mean_to_rows": (lambda x: spread(x.mean(1)), "sub"),
  "cumsum": (lambda x: jnp.cumsum(x, 0), "cumsum"),
  "sort": (lambda x: jnp.sort(x, 0), "sort"),
  "flip": (lambda x: x[::-1], "sub"),
  "roll": (lambda x: jnp.roll(x, 1, 0), "concatenate"),
  "first_layer": (lambda x: spread(x[:1]), "broadcast_in_dim"),
  "pad": (lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:L], "sub"),
  "concatenate": (lambda x: jnp.concatenate([TABLE, x], 0)[::2], "slice"),
  "reshape": (lambda x: jnp.cumsum(x.reshape(-1), 0).reshape(SHAPE), "cumsum"),
  "merge_axes": (lambda x: jnp.sort(x.reshape(L * L, L), 0).reshape(SHAPE), "sort"),
  "rows_as_layers": (lambda x: x.reshape(L, L * L).T.reshape(SHAPE), "sub"),
  "contracted": (lambda x: spread(jnp.einsum("abc,abc->bc", x, TABLE)), "dot_general"),
  "outer": (lambda x: spread(jnp.einsum("abc,dbc->ad", x, x)[:, :, None]), "dot_general"),
  "other_batch": (lambda x: jnp.einsum("abc,bcd->abd", x, x), "dot_general"),
  "batch_moved": (lambda x: jnp.einsum("abc,abd->bcd", x, x), "dot_general"),
  "gather": (lambda x: x[jnp.array([2, 0, 1])], "gather"),
  "own_axis_gather": (lambda x: jnp.take_along_axis(x, jnp.argsort(TABLE, 2), 2), "gather"),
  "scatter": (lambda x: x.at[1].set(0.0), "scatter"),
  "dynamic_slice": (lambda x: spread(lax.dynamic_slice_in_dim(x, jnp.int32(1), 1, 0)), "dynamic_slice"),
  "scan": (lambda x: lax.scan(lambda c, y: (c + y, c), jnp.zeros((L, L)), x)[1], "scan"),
  "map_of_rows": (lambda x: lax.map(lambda y: y @ y, x.transpose(1, 0, 2)).transpose(1, 0, 2), "scan"),
  "map_with_all": (lambda x: lax.map(lambda y: y - x[0], TABLE), "scan"),
  "map_after_all": (lambda x: lax.map(lambda y: jnp.sum(x, 0) + y, TABLE), "scan"),
  "while": (lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x), "while"),
  "cond_of_all": (lambda x: lax.cond(x.sum() > 0, lambda y: y, lambda y: -y, x), "reduce_sum"),
  "cond_transposes": (lambda x: lax.cond(TABLE[0, 0, 0] > 0, lambda y: y.transpose(1, 0, 2), lambda y: y, x), "cond"),
  "cond_and_table": (lambda x: lax.cond(TABLE[0, 0, 0] > 0, lambda y: TABLE, lambda y: y.transpose(2, 0, 1), x), "sub"),
  "diagonal": (lambda x: x - jnp.diagonal(x, axis1=0, axis2=1), "gather"),
  "wrong_broadcast": (lambda x: jnp.einsum("ab,bc->abc", x.sum(1), TABLE.sum(0)) + x.sum(2)[None], "add"),
}


def group_of(fun):
  """Returns a group whose new weight is `fun(gradient)`, with a weight of zero, and its shared values."""
  tx = optax.stateless(lambda updates, params: {"w": fun(updates["w"]) - params["w"]})
  update = by_leaf.Update(tx, {"w": jnp.zeros(SHAPE)}, tx.init({}), "test")
  values, _ = update.run_shared()
  group = update.group([0], "test")
  return group, [values[v] for v in group.shared]


def assert_layers_are_the_whole(fun, seed=0):
  group, shared = group_of(fun)
  x = jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)
  (whole,), _ = group.step([x], [jnp.zeros(SHAPE)], [], shared)
  run = one_layer(group, L)
  for i in range(L):
    (layer,), _ = run([x[i]], [jnp.zeros(SHAPE[1:])], [], shared, jnp.int32(i))
    np.testing.assert_allclose(layer, whole[i], rtol=2e-6, atol=2e-6)
  return whole


@pytest.mark.parametrize("name", APART)
@pytest.mark.few(20)
def test_layers_kept_apart(name):
  whole = assert_layers_are_the_whole(APART[name])
  assert np.asarray(whole).any() == (name != "number")


@pytest.mark.parametrize("name", MIXED)
def test_mixed_layers_are_refused(name):
  fun, operation = MIXED[name]
  group, _ = group_of(fun)
  with pytest.raises(NotSeparableError, match=rf"^`{operation}` "):
    one_layer(group, L)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.sampled_from(sorted(APART | MIXED)), min_size=2, max_size=3), st.integers(0, 99))
def test_any_sequence_is_right_or_refused(names, seed):
  functions = {**{k: f for k, (f, _) in MIXED.items()}, **APART}

  def fun(x):
    for name in names:
      x = jnp.tanh(functions[name](x))
    return x

  group, _ = group_of(fun)
  try:
    one_layer(group, L)
  except NotSeparableError:
    pass
  else:
    assert_layers_are_the_whole(fun, seed)


def test_a_pair_of_layers_made_one_by_a_conversion_is_refused():
  def fun(x):  # u16[2, 2] -> u32[2]: moves the layers to the last axis, where they become halves of one number
    halves = x.transpose(1, 0).astype(jnp.uint16)
    return jnp.broadcast_to(lax.bitcast_convert_type(halves, jnp.uint32).astype(jnp.float32), (2, 2))

  tx = optax.stateless(lambda updates, params: {"w": fun(updates["w"])})
  update = by_leaf.Update(tx, {"w": jnp.zeros((2, 2))}, tx.init({}), "test")
  with pytest.raises(NotSeparableError, match="`bitcast_convert_type`"):
    one_layer(update.group([0], "test"), 2)


def test_sharding_constraints_are_no_obstacle():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
  assert_layers_are_the_whole(lambda x: 2 * lax.with_sharding_constraint(x, sharding))


# --- Optimizers over stacks of layers ---------------------------------------------------------------------------------


def is_matrix(params):
  return jax.tree.map(lambda p: p.ndim >= 2, params)


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 4)

OPTIMIZERS = {
  "sgd": lambda: optax.sgd(SCHEDULE, momentum=0.9, nesterov=True),
  "adamw_mask": lambda: mpo.compensated(optax.adamw(SCHEDULE, weight_decay=0.1, mask=is_matrix)),
  "lion_8": lambda: mpo.compensated(optax.lion(1e-3), extra_bits=8),
  "rmsprop_4": lambda: mpo.compensated(optax.rmsprop(1e-3, centered=True, momentum=0.9), extra_bits=4),
  "schedule_free": lambda: contrib.schedule_free_adamw(1e-3),
  "adafactor": lambda: mpo.compensated(
    optax.adafactor(
      1e-3, min_dim_size_to_factor=4, multiply_by_parameter_scale=False, clipping_threshold=None, momentum=0.9
    )
  ),
  "noise": lambda: mpo.compensated(optax.chain(optax.add_noise(0.01, 0.5, KEY), optax.sgd(0.1)), extra_bits=0),
  "multi_steps": lambda: mpo.compensated(optax.MultiSteps(optax.adamw(1e-3), 2)),
  "inject": lambda: optax.inject_hyperparams(optax.adam)(SCHEDULE),
}

REFUSED = {
  "adafactor": (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4), r"`\w+` \(.*mixes the layers"),
  "lamb": (lambda: optax.lamb(1e-3), r"`\w+` mixes the layers"),
  "block_rms": (lambda: optax.clip_by_block_rms(1.0), r"`reduce_sum` \(.*mixes the layers"),
  "novograd": (
    lambda: optax.novograd(1e-3),
    r"its state has an array of shape \[\], with no entry for each of the 4 layers",
  ),
}


def raw(x):
  return np.asarray(jax.random.key_data(x)) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def make(name):
  tx, weights = OPTIMIZERS[name](), {"w": normal(0)}
  wrapped = isinstance(wrapping.state_shapes(tx, weights), mpo.CompensatedState)
  return tx, *(mpo.init(tx, weights) if wrapped else (weights, tx.init(weights)))


def normal(seed, scale=1.0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(4, 5, 6)) * scale, jnp.float32)


def masters(params, opt_state):
  return mpo.master_params(params, opt_state) if isinstance(opt_state, mpo.CompensatedState) else params


# Left out: XLA:CPU compiles the cond of multi_steps again for each call, and adafactor's division of one number rounds
# differently from a division of four.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("multi_steps", "adafactor")])
def test_stacked_optimizers(name):
  """Three steps layer by layer equal those of the whole stack, bit for bit, operation by operation."""
  tx, params, opt_state = make(name)
  update = by_leaf.Update(tx, params, opt_state, "test")
  group, (values, _) = update.group([0], "test"), update.run_shared()
  shared, state = [values[v] for v in group.shared], jax.tree.leaves(opt_state)
  got = want = ([params["w"]], [state[j] for j in group.states])
  run = one_layer(group, 4)
  for step in range(1, 4):
    grads = normal(step, 0.1)
    want = group.step([grads], *want, shared)
    layers = [run([grads[i]], *jax.tree.map(lambda x, i=i: x[i], got), shared, jnp.int32(i)) for i in range(4)]
    got = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_optimizers_in_a_scan(name):
  """The same in a compiled scan over layers, where XLA may choose other fused multiply-adds than for the stack."""
  tx, params, opt_state = make(name)
  compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster

  @compiled
  def whole(params, opt_state, grads):
    updates, opt_state = tx.update({"w": grads}, opt_state, params)
    return mpo.apply_updates(params, updates), opt_state

  @compiled
  def layer_by_layer(params, opt_state, grads):
    update = by_leaf.Update(tx, params, opt_state, "test")
    group = update.group([0], "test")
    run = one_layer(group, 4)
    state, treedef = jax.tree.flatten(opt_state)
    values, shared_states = update.run_shared()

    def body(_, xs):
      index, grad, param, states = xs
      return None, run([grad], [param], states, [values[v] for v in group.shared], index)

    own = [state[j] for j in group.states]
    _, (new, new_own) = lax.scan(body, None, (jnp.arange(4), grads, params["w"], own))
    for j, value in [*shared_states.items(), *zip(group.states, new_own, strict=True)]:
      state[j] = value
    return {"w": new[0]}, treedef.unflatten(state)

  got = want = (params, opt_state)
  for step in range(1, 4):
    grads = normal(step, 0.1)
    got, want = layer_by_layer(*got, grads), whole(*want, grads)
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  np.testing.assert_allclose(masters(*got)["w"], masters(*want)["w"], rtol=1e-4, atol=1e-6)
  assert not np.array_equal(masters(*got)["w"], masters(params, opt_state)["w"])


@pytest.mark.parametrize("name", REFUSED)
def test_stacked_optimizers_that_need_all_layers(name):
  make, why = REFUSED[name]
  params = {"w": jnp.ones((4, 5, 6))}
  update = by_leaf.Update(make(), params, make().init(params), "test")
  with pytest.raises(NotSeparableError, match=why):
    one_layer(update.group([0], "test"), 4)


def test_leaves_that_are_no_stacks_are_refused():
  tx = optax.sgd(0.1)
  params = {"w": jnp.ones((4, 5)), "scale": jnp.ones(())}
  update = by_leaf.Update(tx, params, tx.init(params), "test")
  for leaf, length in ((0, 4), (1, 5)):
    with pytest.raises(NotSeparableError, match="its gradient has no axis of layers"):
      one_layer(update.group([leaf], "test"), length)
