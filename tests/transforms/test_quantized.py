"""quantized_state: what is stored, bytes held, training together with other wrappers, shards, errors."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import contrib

import optax_mpo as mpo
from optax_mpo._transforms import state_kinds
from optax_mpo._updates.by_leaf import Update
from tests.helpers import one_layer

SMALL = functools.partial(mpo.quantized_state, min_size=1)  # stores the small leaves of tests too


def make_params(seed: int = 0) -> dict:
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "a": jax.random.normal(keys[0], (16, 64)) / 4,
    "b": jnp.zeros(64),
    "c": jax.random.normal(keys[1], (64, 40)) / 8,
    "d": jax.random.normal(keys[2], (40, 4)) / 6,
  }


def loss_fn(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
  x = jnp.tanh(x.astype(params["a"].dtype) @ params["a"] + params["b"][None])
  x = jnp.tanh(x @ params["c"]) @ params["d"]
  return jnp.mean(jnp.square(x.astype(jnp.float32) - y))


def batch(step: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
  x = np.random.default_rng(step).normal(size=(size, 16)).astype(np.float32)
  return x, np.stack([x[:, 0] * x[:, 1], np.sin(2 * x[:, 2]), x[:, 3], np.abs(x[:, 4])], -1)


def train(tx, steps: int, params=None, start: int = 0):
  params, state = mpo.init(tx, make_params()) if params is None else params

  @jax.jit
  def step_fn(params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return value, mpo.apply_updates(params, updates), state

  values = []
  for step in range(start, start + steps):
    value, params, state = step_fn(params, state, *batch(step))
    values.append(float(value))
  assert step_fn._cache_size() == 1
  return np.array(values), params, state


def stored(state) -> dict[str, mpo.Quantized]:
  found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, mpo.Quantized))
  return {jax.tree_util.keystr(path): leaf for path, leaf in found if isinstance(leaf, mpo.Quantized)}


# --- Bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("optimizer", "moments"),
  [(lambda: optax.adamw(1e-3), 2), (lambda: optax.sgd(1e-2, momentum=0.9), 1), (lambda: optax.lion(1e-4), 1)],
  ids=["adamw", "sgd", "lion"],
)
def test_bytes_held_to_the_byte(optimizer, moments):
  params = {"w": jnp.ones((256, 96)), "odd": jnp.ones((128, 100)), "norm": jnp.ones(96)}
  tx = mpo.compensated(mpo.quantized_state(optimizer()), extra_bits=8)
  held = mpo.init(tx, params)
  n_w, n_odd, n_norm = 256 * 96, 128 * 100, 96
  state = n_w + n_odd + 2 * (256 * 3 + 128 * 4) + 4 * n_norm  # codes, scales, and f32 for the small leaf
  scalars = 4 * sum(x.ndim == 0 for x in jax.tree.leaves(held))
  total = sum(x.nbytes for x in jax.tree.leaves(held))
  assert total == 3 * (n_w + n_odd + n_norm) + moments * state + scalars
  assert scalars <= 12
  # A model of full blocks takes this much, for any number of blocks.
  per_parameter = 3 + moments * (1 + 2 / 32)
  assert per_parameter <= {2: 5.13, 1: 4.1}[moments]
  whole = mpo.init(tx, {"w": params["w"]})
  assert sum(x.nbytes for x in jax.tree.leaves(whole)) == per_parameter * n_w + scalars


# --- Which leaves -----------------------------------------------------------------------------------------------------


def test_known_states_exist_in_optax_with_these_fields():
  import importlib
  import pkgutil

  classes = {}
  for package in ("optax._src", "optax.transforms", "optax.contrib", "optax.experimental"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
      if not module.name.endswith("_test") and "test" not in module.name.split(".")[-1]:
        try:
          classes.update(vars(importlib.import_module(module.name)))
        except ImportError:
          continue
  for name in state_kinds.KNOWN:
    cls, field = name.split(".")
    assert field in classes[cls]._fields, name


@pytest.mark.parametrize(
  ("tx", "expected"),
  {
    "adamw": (optax.adamw(1e-3), {"[0].mu['a']": "int8", "[0].nu['a']": "uint8"}),
    "amsgrad": (optax.amsgrad(1e-3), {"[0].mu['a']": "int8", "[0].nu['a']": "uint8", "[0].nu_max['a']": "uint8"}),
    "momentum": (optax.sgd(1e-3, momentum=0.9), {"[0].trace['a']": "int8"}),
    "lion": (optax.lion(1e-3), {"[0].mu['a']": "int8"}),
    "adagrad": (optax.adagrad(1e-3), {"[0].sum_of_squares['a']": "uint8"}),
    "rmsprop": (optax.rmsprop(1e-3), {"[0].nu['a']": "uint8"}),
    "ema": (optax.ema(0.9), {".ema['a']": "int8"}),
    "adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=4096), {"[0].v['a']": "uint8"}),
    "multi_steps": (
      optax.MultiSteps(optax.adam(1e-3), 2),
      {".acc_grads['a']": "int8", ".inner_opt_state[0].mu['a']": "int8", ".inner_opt_state[0].nu['a']": "uint8"},
    ),
    "mu_dtype": (optax.adam(1e-3, mu_dtype=jnp.bfloat16), {"[0].mu['a']": "int8", "[0].nu['a']": "uint8"}),
    "schedule_free": (
      contrib.schedule_free(optax.scale_by_adam(), 1e-3),
      {".base_optimizer_state.mu['a']": "int8", ".base_optimizer_state.nu['a']": "uint8"},  # z holds weights
    ),
    "add_noise": (optax.add_noise(0.1, 0.5, 0), {}),
    "dog": (contrib.dog(1e-3), {}),
  }.values(),
)  # fmt: skip
def test_what_is_stored_and_as_what(tx, expected):
  params = {"a": jnp.ones((64, 64)), "small": jnp.ones((8, 8)), "thin": jnp.ones((4096, 4)), "none": None}
  state = mpo.quantized_state(tx).init(params)
  assert {name.removeprefix(".inner_state"): q.values.dtype.name for name, q in stored(state).items()} == expected


def test_states_of_users_that_hold_weights_are_kept_and_where_overrides():
  inner = optax.GradientTransformation(
    lambda params: {"second": params, "first": params, "count": jnp.zeros([], jnp.int32)},
    lambda updates, state, params=None: (updates, state),
  )
  params = {"w": jnp.ones((2, 40))}
  assert not stored(SMALL(inner).init(params))
  asked = []

  def where(path, leaf):
    asked.append((jax.tree_util.keystr(path), leaf.shape))
    return {"['second']['w']": "nonnegative", "['first']['w']": False}.get(asked[-1][0])

  state = mpo.quantized_state(inner, where=where).init(params)  # overrides the minimal size too
  assert {name: q.values.dtype.name for name, q in stored(state).items()} == {".inner_state['second']['w']": "uint8"}
  assert asked == [("['count']", ()), ("['first']['w']", (2, 40)), ("['second']['w']", (2, 40))]


@pytest.mark.parametrize("other", ["b", "a", "z"])  # before and after w in the tree
def test_what_is_stored_for_a_leaf_does_not_depend_on_others(other):
  def kinds(tx, params):
    return {k: type(v) for k, v in named(SMALL(tx).init(params)).items() if other not in k}

  def named(state):
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, mpo.Quantized))
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}

  params = {"w": jnp.ones((128, 64))}
  for tx in (optax.adafactor(1e-3, min_dim_size_to_factor=8), optax.sm3(1e-3), optax.adamw(1e-3)):
    for shape in ((128,), (64,), (1, 64), (128, 64)):
      assert kinds(tx, params) == kinds(tx, {**params, other: jnp.ones(shape)})


def test_moments_in_a_list_belong_to_the_params_they_are_made_of():
  def init(params):
    leaves = jax.tree.leaves(params)
    return [jnp.zeros(p.shape) for p in leaves] + [jnp.zeros(p.shape[:1]) for p in leaves]

  def update(grads, state, params=None):
    leaves, treedef = jax.tree.flatten(grads)
    n = len(leaves)
    first = [0.9 * m + g for m, g in zip(state[:n], leaves, strict=True)]
    rows = [0.9 * r + jnp.sum(g, tuple(range(1, g.ndim))) for r, g in zip(state[n:], leaves, strict=True)]
    return treedef.unflatten([-0.1 * m for m in first]), first + rows

  tx = optax.GradientTransformation(init, update)
  with_bias = stored(SMALL(tx).init({"w": jnp.zeros((64, 32)), "b": jnp.zeros(64)}))
  assert set(with_bias) == {".inner_state[0]", ".inner_state[1]", ".inner_state[2]"}  # b, w, and b's own row sums
  assert set(stored(SMALL(tx).init({"w": jnp.zeros((64, 32))}))) == {".inner_state[0]"}


# --- Composition ------------------------------------------------------------------------------------------------------


def is_matrix(params):
  return jax.tree.map(lambda p: p.ndim >= 2, params)


def labels(params):
  return {name: "fast" if name in "ab" else "slow" for name in params}


WRAPPERS = {
  "chain": lambda wrap: optax.chain(optax.identity(), wrap(optax.adam(1e-3))),
  "masked": lambda wrap: optax.chain(
    optax.masked(wrap(optax.adam(1e-3)), is_matrix),
    optax.masked(wrap(optax.sgd(1e-2)), lambda params: jax.tree.map(lambda m: not m, is_matrix(params))),
  ),
  "multi_transform": lambda wrap: optax.multi_transform(
    {"fast": wrap(optax.adam(1e-3)), "slow": wrap(optax.sgd(1e-2, momentum=0.9))}, labels
  ),
  "inject_around": lambda wrap: optax.inject_hyperparams(
    lambda learning_rate: wrap(optax.adam(learning_rate)), hyperparam_dtype=jnp.float32
  )(learning_rate=optax.linear_schedule(1e-3, 1e-4, 10)),
  "inject_within": lambda wrap: wrap(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)),
  "multi_steps": lambda wrap: optax.MultiSteps(wrap(optax.adam(1e-3)), 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.few(1)
def test_wrappers(wrapper):
  tx = WRAPPERS[wrapper](lambda inner: mpo.compensated(SMALL(inner), extra_bits=8))
  values, params, state = train(tx, 12)
  assert stored(state)
  assert np.isfinite(values).all()
  master = mpo.master_params(params, state)
  chex.assert_trees_all_equal(mpo.cast(master), params)
  want, _, _ = train(WRAPPERS[wrapper](lambda inner: mpo.compensated(inner, extra_bits=16)), 12)
  np.testing.assert_allclose(values, want, rtol=0.02)


def test_around_compensated_it_works_too():
  _, params, state = train(SMALL(mpo.compensated(optax.adam(1e-3), extra_bits=8)), 5)
  assert stored(state)
  mpo.master_params(params, state)


def test_sharding_rules_reach_stored_leaves():
  tx = mpo.compensated(SMALL(optax.adamw(1e-3)), extra_bits=8)
  _, state = mpo.init(tx, make_params())
  specs = {"a": PartitionSpec("x", None), "b": PartitionSpec(), "c": PartitionSpec("x"), "d": PartitionSpec()}
  mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, is_leaf=lambda x: isinstance(x, mpo.Quantized))
  assert mapped.inner_state.inner_state[0].mu == specs
  assert mapped.compensation == specs
  assert jax.tree.structure(jax.tree.map(lambda x: x, state)) == jax.tree.structure(state)


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.sgd(0.1, momentum=0.9), optax.lion(1e-3)])
@pytest.mark.full
def test_stacks_of_layers_are_stepped_layer_by_layer(optimizer):
  layers = 3
  params = {"w": jnp.ones((layers, 4, 64)), "odd": jnp.ones((layers, 4, 50)), "scale": jnp.ones((layers, 64))}
  tx = mpo.compensated(SMALL(optimizer), extra_bits=8)
  params, state = mpo.init(
    tx, jax.tree.map(lambda p: p * jnp.broadcast_to(jnp.linspace(0.1, 1, p.shape[-1]), p.shape), params)
  )
  grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
  updates, state = jax.jit(tx.update)(grads, state, params)
  params = mpo.apply_updates(params, updates)
  update = Update(tx, params, state, "test")
  shared, _ = update.run_shared()
  updates, want = jax.jit(tx.update)(grads, state, params)
  new = mpo.apply_updates(params, updates)
  old_leaves, new_leaves = jax.tree.leaves(state), jax.tree.leaves(want)
  for i, name in enumerate(update.names):
    group = update.group([i], "test")
    run = one_layer(group, layers)
    key = re.findall(r"'(\w+)'", name)[0]
    step_layer = jax.jit(
      lambda layer, *arrays, group=group, run=run: run(*arrays, [shared[v] for v in group.shared], layer)
    )
    for layer in range(layers):
      arrays = [grads[key][layer]], [params[key][layer]], [old_leaves[j][layer] for j in group.states]
      weights, states = step_layer(jnp.int32(layer), *arrays)
      np.testing.assert_array_equal(weights[0], new[key][layer])
      for got, j in zip(states, group.states, strict=True):
        np.testing.assert_array_equal(got, new_leaves[j][layer])


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()], ids=str)
@pytest.mark.few(1)
def test_sharded_state_equals_that_of_one_device_without_gathering(spec):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, spec)
  tx = mpo.compensated(SMALL(optax.adamw(1e-2)), extra_bits=8)
  master = jax.random.normal(jax.random.key(0), (16, 512))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return mpo.apply_updates(params, updates), state

  # Without fusion: a loop over a shard may have its multiply-adds in other places than a loop over the whole array.
  compiled = jax.jit(step, compiler_options={"xla_disable_hlo_passes": "fusion"})
  sharded = jax.jit(lambda p: mpo.init(tx, p))(jax.device_put(master, sharding))
  sharded = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim == 2 else x, sharded)
  whole = mpo.init(tx, master)
  text = compiled.lower(*sharded, jax.device_put(master, sharding)).compile().as_text()
  for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert collective not in text
  for seed in range(5):
    grads = jax.random.normal(jax.random.key(seed), master.shape)
    sharded = compiled(*sharded, jax.device_put(grads, sharding))
    whole = compiled(*whole, grads)
  moments = sharded[1].inner_state.inner_state[0].mu
  assert moments.values.sharding.is_equivalent_to(sharding, 2)
  assert moments.scales.sharding.is_equivalent_to(sharding, 2)
  chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(whole))


def test_donation_reuses_every_buffer():
  tx = mpo.compensated(SMALL(optax.adamw(1e-3)), extra_bits=8)
  held = jax.tree.map(jnp.array, mpo.init(tx, make_params()))

  def step(params, state, x, y):
    updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
    return mpo.apply_updates(params, updates), state

  compiled = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(*held, *batch(0)).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(held))


# --- What is refused --------------------------------------------------------------------------------------------------

PARAMS = {"w": jnp.ones((2, 64))}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"state_bits": 16}, r"state_bits has to be one of \(4, 8\), but it is 16"),
    ({"block_size": 48}, "block_size has to be a power of two, 2 or more, but it is 48"),
    ({"block_size": 1}, "block_size has to be a power of two"),
    ({"block_size": 32.0}, "block_size has to be a power of two"),
    ({"min_size": -1}, "min_size has to be a whole number"),
  ],
)
def test_refused_options(options, message):
  with pytest.raises(ValueError, match=message):
    mpo.quantized_state(optax.sgd(1e-3), **options)


def test_refused_inner_transformations_and_states():
  with pytest.raises(TypeError, match="quantized_state: inner has to be an Optax transformation, but it is a int"):
    mpo.quantized_state(3)  # pyright: ignore
  tx = SMALL(optax.sgd(1e-3, momentum=0.9))
  with pytest.raises(TypeError, match="update was given a EmptyState for its state"):
    tx.update(PARAMS, optax.EmptyState(), PARAMS)
  other = SMALL(optax.sgd(1e-3, momentum=0.9), block_size=16).init(PARAMS)
  with pytest.raises(
    ValueError, match=r"state.inner_state\[0\].trace\['w'\] has values of shape \[2, 64\] and scales of"
  ):
    tx.update(PARAMS, other, PARAMS)
  other = SMALL(optax.sgd(1e-3, momentum=0.9), state_bits=4).init(PARAMS)
  with pytest.raises(ValueError, match="is stored as int4, but state_bits=8"):
    tx.update(PARAMS, other, PARAMS)


def test_refused_choices():
  with pytest.raises(
    ValueError, match=r"where returned True for the state's .trace\['w'\]. Return 'signed', 'nonnegative' or"
  ):
    mpo.quantized_state(optax.trace(0.9), where=lambda path, leaf: True).init(PARAMS)  # pyright: ignore
  with pytest.raises(ValueError, match=r"where asks to store the state's .*count, which is int32\[\]"):
    mpo.quantized_state(optax.scale_by_adam(), where=lambda path, leaf: "signed").init(PARAMS)


def test_states_that_change_their_form_are_refused():
  inner = optax.GradientTransformation(
    lambda params: {"m": params}, lambda updates, state, params=None: (updates, {"m": state["m"], "more": updates})
  )
  tx = SMALL(inner)
  with pytest.raises(ValueError, match="the new state of the wrapped transformation has not the structure"):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  inner = optax.GradientTransformation(
    optax.tree.zeros_like, lambda updates, state, params=None: (updates, {"w": state["w"][:1]})
  )
  tx = SMALL(inner)
  with pytest.raises(ValueError, match=r"changes state.inner_state\['w'\] from \(2, 64\) to \(1, 64\)"):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
