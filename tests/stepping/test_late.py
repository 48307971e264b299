"""State that couples all leaves, but that no weight reads in the same step: norms for logs, clipping by an older norm.

Such steps take one pass. Their norms have the bits of the ordinary step's, also for stacks that are updated in scans.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_mpo as mpo
from optax_mpo._updates import coupled
from tests.helpers import assert_same_bits, exact_jit, ordinary_step, quick_jit
from tests.stepping.test_stack_scalars import with_others
from tests.stepping.test_stacks import D


def group(path, leaf):
  return "others" if path[0].key in ("first", "last", "scale") else "stacks"


def recipe():
  """Everything that a real run has: norms by group, clipping, a schedule, weight decay of matrices alone."""
  return optax.chain(
    mpo.record_norms(groups=group),
    mpo.record_norms("param_norm", of="params"),
    mpo.clip_by_delayed_norm(0.05, decay=0.5),
    optax.adamw(
      optax.linear_schedule(1e-2, 1e-3, 20), mask=lambda params: jax.tree.map(lambda p: jnp.ndim(p) > 1, params)
    ),
    mpo.record_norms("update_norm"),
  )


@pytest.fixture
def one_pass(monkeypatch):
  """Fails where an update is taken apart for two passes."""

  def taken(*args, **kwargs):
    raise AssertionError("two passes")

  monkeypatch.setattr(coupled.TwoPass, "__init__", taken)


def assert_close(got, want):
  """A norm of stacks is summed layer by layer; XLA:CPU of JAX 0.12 sums the whole in another order."""
  for a, b in zip(*((x[0], mpo.master_params(*x[1:]), mpo.recorded(x[2])) for x in (got, want)), strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def same(loss, params, tx, jit=quick_jit, count=3, check=assert_same_bits, **options):
  """Trains both ways, compares every bit, and returns the last state."""
  params, state = mpo.init(tx, params)
  one, other = jit(ordinary_step(loss, tx)), jit(mpo.value_and_update(loss, tx, **options))
  want, got = (None, params, state), (None, params, state)
  for i in range(count):
    x = jax.random.normal(jax.random.key(100 + i), (4, D))
    want, got = one(*want[1:], x), other(*got[1:], x)
    check(got, want)
  return got[2]


@pytest.mark.parametrize("way", ["first axis", "cut", "pairs", "two levels"])
@pytest.mark.few(1)
def test_the_recipe_of_a_real_run_takes_one_pass(way, one_pass):
  loss, params = with_others(way)
  table = mpo.explain(loss, tx := mpo.compensated(recipe()), *mpo.init(tx, params), jnp.ones((4, D)))
  before = mpo.explain(loss, tx := mpo.compensated(optax.adamw(1e-2)), *mpo.init(tx, params), jnp.ones((4, D)))
  assert [row.stepped for row in table] == [row.stepped for row in before]
  norms = mpo.recorded(same(loss, params, mpo.compensated(recipe())))
  assert list(norms) == ["grad_norm", "grad_norm/others", "grad_norm/stacks", "param_norm", "update_norm"]
  assert all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: mpo.compensated(mpo.quantized_state(tx), extra_bits=16),
    lambda tx: mpo.compensated(tx, extra_bits=8),
    lambda tx: mpo.with_kernels(mpo.compensated(mpo.quantized_state(tx))),
    lambda tx: optax.chain(mpo.record_norms("outside"), mpo.compensated(tx)),
    lambda tx: mpo.compensated(optax.masked(tx, lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p))),
  ],
  ids=["8-bit state", "8 bits", "kernels", "outside", "masked"],
)
@pytest.mark.few(2)
def test_around_and_inside_other_transformations(wrap, one_pass):
  loss, params = with_others("first axis")
  assert mpo.recorded(same(loss, params, wrap(recipe())))["grad_norm"] > 0


def test_thirty_steps(one_pass):
  loss, params = with_others("first axis")
  same(loss, params, mpo.compensated(recipe()), exact_jit, count=30)


def test_norms_are_what_optax_computes():
  grads = {"a": jax.random.normal(jax.random.key(0), (3, 5, 7)), "b": jnp.full(4, 2.0), "c": jnp.float32(-3)}
  tx = mpo.record_norms(groups=lambda path, leaf: None if path[0].key == "c" else path[0].key)
  _, state = tx.update(grads, tx.init(grads))
  norms = mpo.recorded((state, optax.EmptyState()))
  np.testing.assert_allclose(norms["grad_norm"], optax.tree.norm(grads), rtol=1e-6)  # another order of the sum
  np.testing.assert_allclose(norms["grad_norm/b"], 4.0, rtol=0)
  assert norms.keys() == {"grad_norm", "grad_norm/a", "grad_norm/b"}


def test_low_precision_gradients_have_a_norm_in_f32():
  grads = {"w": jnp.full((64, 64), 3.0, jnp.bfloat16)}
  tx = mpo.record_norms()
  updates, state = tx.update(grads, tx.init(grads))
  assert updates is grads
  assert state.norms["grad_norm"].dtype == jnp.float32
  assert float(state.norms["grad_norm"]) == 192.0


def test_the_delayed_norm_clips_the_next_step():
  tx = mpo.clip_by_delayed_norm(1.0, decay=0.5)
  state, g = tx.init(jnp.zeros(2)), jnp.array([3.0, 4.0])
  norms = []
  for scale in (1.0, 2.0, jnp.inf, 0.0, 1.0):
    updates, state = tx.update(scale * g, state)
    norms.append(float(state.norm))
  assert norms == [5.0, 7.5, 7.5, 3.75, 4.375]  # the infinite norm is ignored
  np.testing.assert_allclose(updates, g / 3.75, rtol=1e-6)  # multiplied by 1/3.75


def test_the_largest_norm_may_be_a_schedule():
  tx = mpo.compensated(optax.inject_hyperparams(mpo.clip_by_delayed_norm)(optax.linear_schedule(0.1, 0.05, 3)))
  loss, params = with_others("first axis")
  same(loss, params, tx)


def test_by_fused_layers(one_pass):
  layer = mpo.fused_scan(lambda w, x, _: (jnp.tanh(x @ w), None))
  head = mpo.fused_layer(lambda w, x: x @ w)

  def fused(params, x):
    x, _ = layer(params["first"], x.astype(jnp.bfloat16))
    return jnp.mean(head(params["last"], x).astype(jnp.float32) ** 2)

  def plain(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(jnp.bfloat16), params["first"])
    return jnp.mean((x @ params["last"]).astype(jnp.float32) ** 2)

  keys = jax.random.split(jax.random.key(0))
  params = {"first": 0.3 * jax.random.normal(keys[0], (3, D, D)), "last": 0.3 * jax.random.normal(keys[1], (D, D))}
  tx = mpo.compensated(recipe())
  params, state = mpo.init(tx, params)
  one, other = quick_jit(ordinary_step(plain, tx)), quick_jit(mpo.fused_value_and_update(fused, tx))
  want, got = (None, params, state), (None, params, state)
  for i in range(3):
    x = jax.random.normal(jax.random.key(100 + i), (4, D))
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got, want)


def test_models_at_once(one_pass):
  loss, params = with_others("first axis")
  tx = mpo.compensated(recipe())
  models = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
  state = jax.vmap(lambda p: mpo.init(tx, p))(models)
  x = jax.random.normal(jax.random.key(0), (4, D))
  one, other = (jax.vmap(s, (0, 0, None)) for s in (ordinary_step(loss, tx), mpo.value_and_update(loss, tx)))
  assert_same_bits(quick_jit(other)(*state, x), quick_jit(one)(*state, x))


def test_over_eight_devices(one_pass):
  loss, params = with_others("first axis")
  tx = mpo.compensated(recipe())
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec("data"))
  params, state = mpo.init(tx, params)
  x = jax.device_put(jax.random.normal(jax.random.key(0), (8, D)), split)
  with jax.set_mesh(mesh):
    want = quick_jit(ordinary_step(loss, tx))(params, state, x)
    got = quick_jit(mpo.value_and_update(loss, tx))(params, state, x)
  assert_same_bits(got, want)


def test_what_weights_need_at_once_still_takes_two_passes():
  loss, params = with_others("first axis")
  tx = mpo.compensated(optax.chain(mpo.record_norms(), optax.clip_by_global_norm(0.1), optax.sgd(0.1)))
  params, state = mpo.init(tx, params)
  with pytest.raises(ValueError, match="two_pass=True"):
    mpo.value_and_update(loss, tx)(params, state, jnp.ones((4, D)))
  _, _, state = quick_jit(mpo.value_and_update(loss, tx, two_pass=True))(params, state, jnp.ones((4, D)))
  assert mpo.recorded(state)["grad_norm"] > 0


def test_misuse_is_named():
  with pytest.raises(ValueError, match="of has to be 'updates' or 'params', but it is 'grads'"):
    mpo.record_norms(of="grads")
  with pytest.raises(ValueError, match="above 0"):
    mpo.clip_by_delayed_norm(0.0)
  with pytest.raises(ValueError, match="below 1"):
    mpo.clip_by_delayed_norm(1.0, decay=1.0)
  tx = mpo.record_norms("p", of="params")
  with pytest.raises(ValueError, match="'p' is a norm of the params"):
    tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
  tx = optax.chain(mpo.record_norms(), mpo.record_norms())
  with pytest.raises(ValueError, match="two recorders are called 'grad_norm'"):
    mpo.recorded(tx.init({"w": jnp.ones(2)}))
  tx = mpo.record_norms(groups=lambda path, leaf: leaf.dtype.name)
  with pytest.raises(ValueError, match="groups give grad_norm/bfloat16, grad_norm/float32"):
    tx.update({"w": jnp.ones(2, jnp.bfloat16)}, tx.init({"w": jnp.ones(2)}))
  assert mpo.recorded(optax.adam(0.1).init(jnp.ones(2))) == {}


def test_explain_says_how_many_passes_there_are():
  loss, params = with_others("first axis")
  for tx, count in ((recipe(), 1), (optax.chain(mpo.record_norms(), optax.clip_by_global_norm(1.0)), 2)):
    wrapped = mpo.compensated(tx)
    table = mpo.explain(loss, wrapped, *mpo.init(wrapped, params), jnp.ones((4, D)), two_pass=True)
    assert (table.passes, str(table).count("in two backward passes")) == (count, count - 1)


@pytest.mark.parametrize(
  "wrap", [lambda tx: tx, lambda tx: mpo.quantized_state(tx, min_size=1)], ids=["", "8-bit state"]
)
@pytest.mark.few(1)
def test_norms_after_clipping_by_the_global_norm_in_two_passes(wrap):
  """The norm of the updates needs all of them, and each needs the norm of the gradients."""
  norms = mpo.record_norms("grad_norm"), mpo.record_norms("update_norm", groups=group)
  loss, params = with_others("first axis")
  tx = mpo.compensated(wrap(optax.chain(norms[0], optax.clip_by_global_norm(0.05), optax.adamw(1e-2), norms[1])))
  found = mpo.recorded(same(loss, params, tx, check=assert_close, two_pass=True))
  assert list(found) == ["grad_norm", "update_norm", "update_norm/others", "update_norm/stacks"]
  assert found["update_norm"] ** 2 == pytest.approx(found["update_norm/others"] ** 2 + found["update_norm/stacks"] ** 2)
  with pytest.raises(ValueError, match=r"in clip_by_global_norm.*two_pass=True"):
    mpo.value_and_update(loss, tx)(*mpo.init(tx, params), jnp.ones((4, D)))
