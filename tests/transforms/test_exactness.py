"""With 16 bits, training equals f32-master Optax bit for bit: weights and inner state, for every optimizer below.

The reference is training without this library: f32 params, a cast to bf16 (with the codec's rounding) for the forward
and backward pass, f32 gradients, Optax on f32. Both sides are compiled with `xla_allow_excess_precision=False`, since
XLA may otherwise skip roundings to bf16 on one side only.

Both sides have the same operations on the same numbers. But in each program XLA may choose the order of a sum (the
vectorisation of a fused loop depends on its whole body), and which product of a*b + c*d to use for a fused
multiply-add. `COMPILED_DIFFERENTLY` lists the optimizers with such choices. They are tested for the same 200 jitted
steps with fusion off, or, where that still leaves a choice, operation by operation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_mpo as mpo
from tests.helpers import assert_same_bits, exact_jit, quick_jit, unfused_jit

STEPS = 200
WIDTHS = (6, 16, 9, 4)


def make_params(seed: int = 0) -> dict:
  keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
  layers = {
    f"layer{i}": {"w": jax.random.normal(keys[i], shape) * shape[0] ** -0.5, "b": jnp.zeros(shape[1])}
    for i, shape in enumerate(itertools.pairwise(WIDTHS))
  }
  return {**layers, "temperature": jnp.float32(0.7)}


def loss_fn(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
  x = x.astype(params["layer0"]["w"].dtype)
  for i in range(len(WIDTHS) - 1):
    w, b = (params[f"layer{i}"][k].astype(x.dtype) for k in "wb")
    x = jnp.tanh(x @ w + b[None])
  return jnp.mean(jnp.square(x.astype(jnp.float32) * params["temperature"].astype(jnp.float32) - y))


def make_batches(steps: int, nan_at: int | None = None) -> list[tuple[jax.Array, jax.Array]]:
  rng = np.random.default_rng(1)
  batches = []
  for step in range(steps):
    x = rng.normal(size=(8, WIDTHS[0])).astype(np.float32)
    y = np.tanh(x[:, : WIDTHS[-1]] * 0.5)
    batches.append((x * np.nan if step == nan_at else x, y))
  return batches


def is_matrix(params: dict) -> dict:
  return jax.tree.map(lambda p: p.ndim >= 2, params)


def labels(params: dict) -> dict:
  return jax.tree_util.tree_map_with_path(lambda path, _: "fast" if path[0].key == "layer0" else "slow", params)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 200)

OPTIMIZERS = {
  "sgd": lambda: optax.sgd(1e-2),
  "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
  "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(1e-3),
  "adamw_mask": lambda: optax.adamw(1e-3, weight_decay=0.1, mask=is_matrix),
  "adamax": lambda: optax.adamax(1e-3),
  "adabelief": lambda: optax.adabelief(1e-3),
  "radam": lambda: optax.radam(1e-3),
  "yogi": lambda: optax.yogi(1e-3),
  "rmsprop": lambda: optax.rmsprop(1e-3, centered=True, momentum=0.9),
  "adagrad": lambda: optax.adagrad(1e-2),
  "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
  "lion": lambda: optax.lion(1e-4, weight_decay=0.1),
  "lamb": lambda: optax.lamb(1e-3, weight_decay=0.1),
  "lars": lambda: optax.lars(1e-2, weight_decay=0.1),
  "novograd": lambda: optax.novograd(1e-3),
  "muon": lambda: contrib.muon(1e-3),
  "schedule_free": lambda: contrib.schedule_free_adamw(1e-3, weight_decay=0.1),
  "clip_chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(SCHEDULE)),
  "multi_steps": lambda: optax.MultiSteps(optax.adamw(1e-3), 4),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(SCHEDULE, b2=0.999),
  "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), is_matrix), optax.scale(-1e-2)),
  "multi_transform": lambda: optax.multi_transform({"fast": optax.adam(1e-3), "slow": optax.sgd(1e-2)}, labels),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(1e-3), 3),
}


COMPILED_DIFFERENTLY = {
  "lamb": "the trust ratio sums the squares of each leaf's weights and updates, in an order that depends on the loop",
  "lars": "the same trust ratio",
  "adafactor": "the same for the mean squares; with fusion off the order still follows the layout XLA gives a buffer",
  "schedule_free": "its average (1 - c) x + c z has two products, and either may go into the fused multiply-add",
  # Also the wrapper apply_if_finite around compensated, below: params + update is then inside its lax.cond, where it
  # can share a fused multiply-add with the learning rate.
}
ELEMENTWISE = [name for name in OPTIMIZERS if name not in COMPILED_DIFFERENTLY]


def train_masters(tx, params, batches, jit=exact_jit, where=None):
  """f32-master mixed precision, with Optax only."""

  def step(params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(mpo.cast(params, where=where), x, y)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, state = tx.update(grads, state, params)
    return value, optax.apply_updates(params, updates), state

  return run(jit(step), params, tx.init(params), batches)


def train_compensated(tx, params, batches, jit=exact_jit, apply_updates=mpo.apply_updates, where=None):
  def step(params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return value, apply_updates(params, updates), state

  return run(jit(step), *mpo.init(tx, params, where=where), batches)


def run(step, params, state, batches):
  values = []
  for batch in batches:
    value, params, state = step(params, state, *batch)
    values.append(value)
  return np.array(values), params, state


def assert_equal_training(name, steps, **options):
  batches = make_batches(steps, nan_at=steps // 2 if name == "apply_if_finite" else None)
  jit = options.pop("jit", exact_jit)
  want_values, want, want_state = train_masters(
    OPTIMIZERS[name](), make_params(), batches, jit, where=options.get("where")
  )
  values, params, state = train_compensated(mpo.compensated(OPTIMIZERS[name]()), make_params(), batches, jit, **options)
  assert_same_bits(mpo.master_params(params, state), want)
  assert_same_bits(state.inner_state, want_state)
  np.testing.assert_array_equal(values, want_values)
  assert not np.array_equal(np.asarray(jax.tree.leaves(want)[1]), np.asarray(jax.tree.leaves(make_params())[1]))
  return params


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.few(4)
def test_training_equals_f32_masters(name):
  params = assert_equal_training(name, STEPS)
  assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))


LARGE = [name for name in ELEMENTWISE if name not in ("muon", "novograd")]  # these two have norms, as lamb has


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.few(9)
def test_large_leaves_equal_f32_masters(name):
  """XLA:CPU compiles large leaves differently: it computes their new master weight in a separate loop."""
  shape = (257, 300)
  grads = [jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i in range(9)]

  def loss_fn(params, grad):
    return jnp.sum((params["layer0"]["w"].astype(jnp.bfloat16) * grad).astype(jnp.float32))

  params = {"layer0": {"w": jax.random.normal(jax.random.key(9), shape) * 0.05}}

  def step(update, add):
    @exact_jit
    def step(params, state, grad):
      value, grads = jax.value_and_grad(loss_fn)(params, grad)
      grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
      updates, state = update(grads, state, params)
      return value, add(params, updates), state

    return step

  tx, low = OPTIMIZERS[name](), mpo.compensated(OPTIMIZERS[name]())
  _, want, want_state = run(step(tx.update, optax.apply_updates), params, tx.init(params), [(g,) for g in grads])
  _, got, state = run(step(low.update, mpo.apply_updates), *mpo.init(low, params), [(g,) for g in grads])
  assert_same_bits(mpo.master_params(got, state), want)
  assert_same_bits(state.inner_state, want_state)


@pytest.mark.parametrize("name", ["lamb", "lars", "schedule_free"])
@pytest.mark.full
def test_training_equals_f32_masters_without_fusion(name):
  assert_equal_training(name, STEPS, jit=unfused_jit)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.few(2, full=8)
def test_training_equals_f32_masters_operation_by_operation(name):
  assert_equal_training(name, 4, jit=lambda fun: fun)


@pytest.mark.parametrize("name", ["momentum", "adamw_mask", "lion", "clip_chain", "multi_steps"])
@pytest.mark.few(2)
def test_optax_apply_updates_is_exact_in_training(name):
  assert_equal_training(name, STEPS, apply_updates=optax.apply_updates)


def test_f32_leaves_stay_ordinary():
  params = assert_equal_training("adamw_mask", STEPS, where=lambda path, leaf: leaf.ndim >= 2)
  assert {p.dtype.name for p in jax.tree.leaves(params)} == {"bfloat16", "float32"}


WRAPPERS = {
  "chain": lambda wrap: optax.chain(optax.identity(), wrap(optax.adam(1e-3))),
  "named_chain": lambda wrap: optax.named_chain(("first", optax.identity()), ("tx", wrap(optax.adam(1e-3)))),
  "masked": lambda wrap: optax.chain(
    optax.masked(wrap(optax.adam(1e-3)), is_matrix),
    optax.masked(wrap(optax.sgd(1e-2)), lambda params: jax.tree.map(lambda m: not m, is_matrix(params))),
  ),
  "multi_transform": lambda wrap: optax.multi_transform(
    {"fast": wrap(optax.adam(1e-3)), "slow": wrap(optax.sgd(1e-2))}, labels
  ),
  # By default Optax would use the dtype of the params, and round the learning rate to bf16.
  "inject_hyperparams": lambda wrap: optax.inject_hyperparams(
    lambda learning_rate: wrap(optax.adam(learning_rate)), hyperparam_dtype=jnp.float32
  )(learning_rate=1e-3),
  "apply_if_finite": lambda wrap: optax.apply_if_finite(wrap(optax.adam(1e-3)), 3),
  "multi_steps": lambda wrap: optax.MultiSteps(wrap(optax.adam(1e-3)), 2),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.few(1, full=2)
def test_wrappers_around_compensated(wrapper):
  """Bits are initialised and found inside other transformations, and training does not change."""
  batches = make_batches(20)
  tx = WRAPPERS[wrapper](mpo.compensated)

  @quick_jit
  def step(params, state, x, y):
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    # The branches of apply_if_finite must have one dtype. compensated's updates are f32, so gradients are f32 too.
    updates, state = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)
    return value, mpo.apply_updates(params, updates), state

  values, params, state = run(step, *mpo.init(tx, make_params()), batches)
  want_values, want, _ = train_masters(WRAPPERS[wrapper](lambda tx: tx), make_params(), batches, quick_jit)
  np.testing.assert_array_equal(values, want_values)
  assert_same_bits(mpo.master_params(params, state), want)
