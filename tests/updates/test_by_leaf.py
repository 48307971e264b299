"""Updates split by dataflow: updating each component alone equals the whole update, bit for bit."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_mpo as mpo
from optax_mpo._codecs import formats, known_weights
from optax_mpo._updates import by_leaf
from tests.helpers import assert_same_bits, exact_jit

SHAPES = {"a": {"w": (6, 8), "b": (8,)}, "c": {"w": (3, 6, 4)}}


def make_params(scalar=True):
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=lambda s: type(s) is tuple
  )
  return params | {"none": None} | ({"scalar": jnp.float32(0.7)} if scalar else {})


def make_grads(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.1, jnp.float32), params)


def whole_step(tx, params, opt_state, grads):
  updates, opt_state = tx.update(grads, opt_state, params)
  return mpo.apply_updates(params, updates), opt_state


def step_in_groups(update, params, state, grads):
  """Updates each component alone. Returns the new leaves of the params and the state."""
  values, shared_states = update.run_shared()
  new_params, new_state = list(params), list(state)
  for index, value in shared_states.items():
    new_state[index] = value
  for leaves in update.components(range(len(params))):
    group = update.group(leaves, "test")
    ps, ss = group.step(
      [grads[i] for i in leaves],
      [params[i] for i in leaves],
      [state[j] for j in group.states],
      [values[v] for v in group.shared],
    )
    for i, p in zip(leaves, ps, strict=True):
      new_params[i] = p
    for j, s in zip(group.states, ss, strict=True):
      new_state[j] = s
  return new_params, new_state


# --- The law ----------------------------------------------------------------------------------------------------------


def is_matrix(params):
  return jax.tree.map(lambda p: p.ndim >= 2, params)


def labels(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: "fast" if path[0].key == "a" else "frozen", params)


KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 4)

# Each transformation, with its number of compensation bits, or None for plain f32.
APART = {
  "nesterov": (lambda: optax.sgd(SCHEDULE, momentum=0.9, nesterov=True), 4),
  "adamw_mask": (lambda: optax.adamw(SCHEDULE, weight_decay=0.1, mask=is_matrix), 16),
  "adamw_plain": (lambda: optax.adamw(1e-3), None),
  "lion": (lambda: optax.lion(1e-3, weight_decay=0.1), 8),
  "rmsprop": (lambda: optax.rmsprop(1e-3, centered=True, momentum=0.9), 0),
  "adagrad": (lambda: optax.adagrad(1e-2), 8),
  "adafactor": (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4), 16),
  "adafactor_plain": (lambda: optax.adafactor(1e-3, momentum=0.9), None),
  "lamb": (lambda: optax.lamb(1e-3, weight_decay=0.1), 4),
  "lars": (lambda: optax.lars(1e-2, weight_decay=0.1), 16),
  "sm3": (lambda: optax.sm3(1e-2), 16),
  "muon": (lambda: contrib.muon(1e-3), 16),
  "schedule_free": (lambda: contrib.schedule_free_adamw(1e-3), 8),
  "adaptive_grad_clip": (lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)), 16),
  "block_rms": (lambda: optax.chain(optax.clip_by_block_rms(0.05), optax.sgd(0.1)), None),
  "noise": (
    lambda: optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(0, impl="rbg")), optax.ema(0.9), optax.sgd(0.1)),
    16,
  ),
  "zero_nans": (lambda: optax.chain(optax.zero_nans(), optax.sgd(0.1)), 4),
  "masked": (lambda: optax.chain(optax.masked(optax.trace(0.9), is_matrix), optax.scale(-0.01)), 16),
  "frozen": (lambda: optax.multi_transform({"fast": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels), 16),
  "inject": (lambda: optax.inject_hyperparams(optax.adamw)(SCHEDULE, b2=0.99), 16),
  "multi_steps": (lambda: optax.MultiSteps(optax.sgd(1e-2, momentum=0.9), 2), 16),
  "multi_steps_adafactor": (lambda: optax.MultiSteps(optax.adafactor(1e-3, min_dim_size_to_factor=4), 2), None),
  "conditionally": (lambda: optax.conditionally_mask(optax.sgd(0.1), lambda step, **_: step % 2 == 0), 16),
}

COUPLED = {
  "clip_by_global_norm": (lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-3)), "reduce_sum|add"),
  "apply_if_finite": (lambda: optax.apply_if_finite(optax.sgd(1e-3, momentum=0.9), 3), "and|reduce_and|concatenate"),
  "skip_not_finite": (
    lambda: optax.MultiSteps(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite),
    "and|add|reduce_and|concatenate",
  ),
  "prodigy": (lambda: contrib.prodigy(), "add"),
  "flatten": (lambda: optax.flatten(optax.sgd(0.1, momentum=0.9)), "concatenate"),
}


def assert_groups_are_the_whole(tx, params, opt_state, steps=3):
  """Trains both ways, and asserts equal bits. Returns the components."""
  components = []

  def in_groups(params, opt_state, grads):
    update = by_leaf.Update(tx, params, opt_state, "test")
    leaves, treedef = jax.tree.flatten(params)
    components[:] = update.components(range(len(leaves)))
    state, state_treedef = jax.tree.flatten(opt_state)
    leaves, state = step_in_groups(update, leaves, state, jax.tree.leaves(grads))
    return treedef.unflatten(leaves), state_treedef.unflatten(state)

  grouped = exact_jit(in_groups, xla_backend_optimization_level=0)  # which compiles faster
  whole = exact_jit(lambda *args: whole_step(tx, *args), xla_backend_optimization_level=0)
  got = want = (params, opt_state)
  for step in range(steps):
    grads = make_grads(params, step)
    got, want = grouped(*got, grads), whole(*want, grads)
  assert_same_bits(got, want)
  assert not np.array_equal(masters(*got)["a"]["w"], masters(params, opt_state)["a"]["w"])
  return components


def masters(params, opt_state):
  return mpo.master_params(params, opt_state) if isinstance(opt_state, mpo.CompensatedState) else params


def make(tx, bits, scalar=True):
  if bits is None:
    params = make_params(scalar)
    return tx, params, tx.init(params)
  tx = mpo.compensated(tx, bits)
  return tx, *mpo.init(tx, make_params(scalar), where=lambda path, leaf: leaf.ndim > 0)


@pytest.mark.parametrize("name", APART)
@pytest.mark.few(3, full=9)
def test_leaves_stepped_alone_are_the_whole_update(name):
  tx, bits = APART[name]
  components = assert_groups_are_the_whole(*make(tx(), bits, scalar=name != "sm3"))
  assert [len(c) for c in components] == [1] * len(components)


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.few(2)
def test_coupled_leaves_stepped_together_are_the_whole_update(name):
  tx, params, opt_state = make(COUPLED[name][0](), 16)
  assert [len(c) for c in assert_groups_are_the_whole(tx, params, opt_state, steps=2)] == [4]


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_leaves_are_refused_alone(name):
  tx, operation = COUPLED[name]
  update = by_leaf.Update(*make(tx(), None), "test")
  want = rf"fused: tx couples params\['a'\]\['w'\] to params\['a'\]\['b'\], .*, in `({operation})` \("
  with pytest.raises(ValueError, match=want):
    update.group([1], "fused")


def test_only_what_is_coupled_goes_together():
  tx = optax.multi_transform({"fast": optax.clip_by_global_norm(1.0), "frozen": optax.identity()}, labels)
  update = by_leaf.Update(*make(tx, None), "test")
  assert update.components(range(4)) == [(0, 1), (2,), (3,)]
  with pytest.raises(ValueError, match=r"couples params\['a'\]\['b'\] to params\['a'\]\['w'\], in"):
    update.group([0], "test")


def test_leaves_coupled_by_their_state_alone():
  """This step does not need the other leaf's gradient, but the next step would."""

  def update_fn(updates, state, params=None):
    a, b = updates["a"], updates["b"]
    return {"a": a + state["sum"], "b": b}, {"sum": state["sum"] * 0.5 + a + b}

  tx = optax.GradientTransformation(lambda params: {"sum": jnp.zeros(2)}, update_fn)
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  update = by_leaf.Update(tx, params, tx.init(params), "test")
  assert update.components([0, 1]) == [(0, 1)]


# --- The new weights taken from compensated, without the addition -----------------------------------------------------


def numbers(seed, count=4096):
  """Weights and updates of every size, including pairs that need a code in the update."""
  rng = np.random.default_rng(seed)
  masters = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
  masters = np.where(np.abs(masters) < 1e37, masters, np.float32(1.0))
  factors = rng.choice([-1.0, 1.0], count) * 2.0 ** rng.integers(-26, 4, count) * rng.choice([1.0, 1.5, 1 / 3], count)
  steps = np.where(rng.random(count) < 0.2, -masters, masters * factors).astype(np.float32)
  steps[:8] = [0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40, 1.0, -0.0]
  return jnp.asarray(masters), jnp.asarray(steps)


@pytest.mark.parametrize("bits", [0, 4, 8, 16])
def test_direct_weights_are_those_of_the_addition(bits):
  tx = mpo.compensated(optax.identity(), bits)
  masters, steps = numbers(bits)
  params, state = mpo.init(tx, {"w": masters})

  def added_step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(formats.add_difference, params, updates), state

  operations = []
  results = []
  for step in (added_step, lambda *args: whole_step(tx, *args)):
    compiled = jax.jit(step).lower(params, state, {"w": steps}).compile()
    operations.append(compiled.as_text().count("\n"))
    results.append(compiled(params, state, {"w": steps}))
  assert_same_bits(results[1], results[0])
  assert operations[1] < 0.6 * operations[0]
  assert bool((results[0][0]["w"] != params["w"]).any())


def test_a_changed_update_is_added():
  double = optax.stateless(lambda updates, params: jax.tree.map(lambda u: 2 * u, updates))
  tx = optax.chain(mpo.compensated(optax.sgd(0.1)), double)
  with pytest.warns(UserWarning, match="something around compensated changes its update"):
    params, state = mpo.init(tx, {"w": jnp.ones(3)})
  update = by_leaf.Update(tx, params, state, "test")
  got, _ = step_in_groups(update, jax.tree.leaves(params), jax.tree.leaves(state), [jnp.ones(3)])
  assert_same_bits(got, jax.tree.leaves(whole_step(tx, params, state, {"w": jnp.ones(3)})[0]))
  np.testing.assert_allclose(got[0].astype(jnp.float32), 0.8, rtol=1e-2)


def test_updates_of_other_params_are_added():
  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jnp.ones(3)})

  @jax.jit
  def step(params, state, others):
    updates, _ = tx.update({"w": jnp.ones(3)}, state, params)
    return mpo.apply_updates(others, updates)

  assert float(step(params, state, {"w": jnp.full(3, 2, jnp.bfloat16)})["w"][0]) == 1.8984375


def test_nothing_is_remembered_after_a_trace():
  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jnp.ones(3)})
  with jax.checking_leaks():
    jax.jit(tx.update)({"w": jnp.ones(3)}, state, params)  # without apply_updates
    jax.jit(lambda *args: whole_step(tx, *args))(params, state, {"w": jnp.ones(3)})
  gc.collect()
  assert not known_weights._made


def test_outside_of_a_trace_updates_are_added():
  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jnp.ones(3)})
  updates, _ = tx.update({"w": jnp.ones(3)}, state, params)
  assert not known_weights._made
  assert_same_bits(mpo.apply_updates(params, updates), jax.tree.map(formats.add_difference, params, updates))


def test_slices_leave_the_addition_out():
  def operations(tx, params):
    update = by_leaf.Update(tx, *mpo.init(tx, params), "test")
    return len(update.group([0], "test").operations)

  params = {"w": jnp.ones(3)}
  tx = mpo.compensated(optax.sgd(0.1))
  added = optax.chain(tx, optax.stateless(lambda updates, params: jax.tree.map(lambda u: 1 * u, updates)))
  assert operations(tx, params) < operations(added, params) / 2


# --- What is shared, and what is known --------------------------------------------------------------------------------


def test_constants_need_not_be_handed_in():
  mask = jnp.asarray(np.random.default_rng(0).random((64, 64)) < 0.5)
  masked = optax.stateless(lambda updates, params: {"w": jnp.where(mask, updates["w"], 0.0)})
  tx = optax.chain(masked, optax.sgd(lambda count: 0.5 ** count.astype(jnp.float32)))
  params = {"w": jnp.ones((64, 64))}
  update = by_leaf.Update(tx, params, tx.init(params), "test")
  group = update.group([0], "test")
  assert [c.shape for c in group.constants.values()] == [(64, 64)]
  values, _ = update.run_shared()
  assert 0 < len(group.shared) <= 2  # the learning rate and the zero
  assert set(values).isdisjoint(group.constants)
  (new,), _ = group.step([params["w"]], [params["w"]], [], [values[v] for v in group.shared])
  np.testing.assert_array_equal(new, np.where(mask, 0.0, 1.0))


def test_state_that_never_changes_is_shared():
  """Adafactor has placeholders of shape (1,) where it has no state. No leaf owns them."""
  tx = optax.MultiSteps(optax.adafactor(1e-3, min_dim_size_to_factor=4), 2)
  params = {"w": jnp.ones((6, 8))}
  update = by_leaf.Update(tx, params, tx.init(params), "test")
  owned = {update.state_names[j] for j in update.group([0], "test").states}
  assert len(owned) == 3
  assert {name.split(".")[-1] for name in owned} == {"v_row['w']", "v_col['w']", "acc_grads['w']"}


def test_gradients_that_change_nothing():
  tx, params, opt_state = make(APART["frozen"][0](), None)
  update = by_leaf.Update(tx, params, opt_state, "test")
  assert [update.needs_gradient(i) for i in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("params", [{}, {"none": None}], ids=["empty", "none"])
def test_no_leaves(params):
  tx = optax.adam(1e-3)
  update = by_leaf.Update(tx, params, tx.init(params), "test")
  assert update.components([]) == []
  _, shared_states = update.run_shared()
  assert [int(x) for x in shared_states.values()] == [1]


def test_constant_and_repeated_results():
  """Results can be literals, unchanged inputs, or the same variable twice."""

  def update_fn(updates, state, params=None):
    del state
    return updates, {"zero": jnp.float32(0), "grad": updates["w"], "again": updates["w"], "old": params["w"]}

  tx = optax.GradientTransformation(
    lambda params: {"zero": jnp.float32(1), **dict.fromkeys(("grad", "again", "old"), params["w"] * 0)}, update_fn
  )
  params = {"w": jnp.arange(3.0)}
  opt_state = tx.init(params)
  update = by_leaf.Update(tx, params, opt_state, "test")
  leaves, state = step_in_groups(update, [params["w"]], jax.tree.leaves(opt_state), [jnp.ones(3)])
  want = whole_step(tx, params, opt_state, {"w": jnp.ones(3)})
  assert_same_bits((leaves, state), (jax.tree.leaves(want[0]), jax.tree.leaves(want[1])))


def test_side_effects_are_refused():
  def fun(updates, params):
    jax.debug.print("{}", updates["w"])
    return updates

  tx = optax.stateless(fun)
  with pytest.raises(ValueError, match=r"fused: tx\.update has side effects"):
    by_leaf.Update(tx, {"w": jnp.ones(3)}, tx.init({}), "fused")


def test_state_that_changes_its_form_is_refused():
  params = {"w": jnp.ones(3)}
  wider = optax.GradientTransformation(
    lambda p: jnp.zeros(3, jnp.bfloat16), lambda u, s, p=None: (u, s.astype(jnp.float32) + u["w"])
  )
  with pytest.raises(ValueError, match=r"fused: tx.update changes opt_state from bfloat16\[3\] to float32\[3\]"):
    by_leaf.Update(wider, params, wider.init(params), "fused")
  longer = optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, (*s, u["w"])))
  with pytest.raises(ValueError, match=r"fused: tx\.update changes the structure of its state"):
    by_leaf.Update(longer, params, longer.init(params), "fused")


def test_foreign_state_is_refused():
  tx = optax.adam(1e-3)
  with pytest.raises(ValueError, match=r"fused: opt_state\[0\].mu\['w'\] has shape \[4\], but .* it is \[3\]"):
    by_leaf.Update(tx, {"w": jnp.ones(3)}, tx.init({"w": jnp.ones(4)}), "fused")
  with pytest.raises(ValueError, match=r"fused: opt_state has not the structure of tx\.init"):
    by_leaf.Update(tx, {"w": jnp.ones(3)}, optax.sgd(0.1).init({}), "fused")


def test_the_work_for_all_groups_grows_with_their_number():
  """A slice visits only its own operations, even if the whole update is inside one cond."""
  tx = mpo.compensated(optax.MultiSteps(optax.adamw(1e-3), 2))

  def visited(count):
    update = by_leaf.Update(tx, *mpo.init(tx, {f"w{i}": jnp.ones(3) for i in range(count)}), "test")
    groups = [update.group(leaves, "test") for leaves in update.components(range(count))]
    assert len(groups) == count
    operations = [o for group in groups for o in group.operations]
    return sum(1 + sum(len(body.operations) for body in o.bodies) for o in operations)

  assert visited(8) == 4 * visited(2)
