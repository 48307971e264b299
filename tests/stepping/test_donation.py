"""Everything the library returns can be donated, and donating it deletes none of the caller's arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from optax_mpo.checkpoint import Checkpointer
from optax_mpo.export import load_safetensors, save_safetensors
from optax_mpo.flax import Optimizer, TrainState
from tests.helpers import assert_same_bits


def masters():
  """f32 leaves (`where` keeps some in f32), a leaf that is bf16 already, and one array in two places."""
  tied = jnp.linspace(0, 1, 64)
  return {"w": jnp.full((64, 64), 0.1), "b": jnp.ones(64), "low": jnp.ones(8, jnp.bfloat16), "tied": [tied, tied]}


def where(path, leaf):
  return leaf.ndim > 1


def adam():
  return optax.adam(1e-2)


# Wrappers that create state from the params: ours around Optax's and inside them.
TRANSFORMATIONS = {
  "compensated": lambda: mpo.compensated(adam()),
  "bits_8_stochastic": lambda: mpo.compensated(adam(), 8, rounding="stochastic"),
  "bits_0": lambda: mpo.compensated(adam(), 0),
  "quantized_state": lambda: mpo.compensated(mpo.quantized_state(adam(), min_size=1), 8),
  "loss_scaled": lambda: mpo.loss_scaled(mpo.compensated(adam())),
  "loss_scaled_dynamic": lambda: mpo.loss_scaled(mpo.compensated(adam()), dynamic=True),
  "with_kernels": lambda: mpo.with_kernels(mpo.compensated(adam())),
  "schedule_free": lambda: mpo.compensated(optax.contrib.schedule_free(adam(), 1e-2)),
  "schedule_free_outside": lambda: optax.contrib.schedule_free(mpo.compensated(adam()), 1e-2),
  "multi_steps": lambda: optax.MultiSteps(mpo.compensated(adam()), 2),
  "ema": lambda: optax.chain(mpo.compensated(optax.chain(adam(), optax.ema(0.9)))),
  "masked": lambda: mpo.compensated(optax.masked(adam(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))),
  "apply_if_finite": lambda: mpo.compensated(optax.apply_if_finite(adam(), 3)),
  "inject_hyperparams": lambda: mpo.compensated(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)),
}


def made_by_init(make):
  def case(tmp_path):
    params = masters()
    return params, mpo.init(make(), params, where=where)

  return case


def made_by_tx_init(make):
  """A run without `mpo.init`: bf16 and f32 params, and the state that `tx.init` makes of them."""

  def case(tmp_path):
    params = mpo.cast(masters(), where=where)
    return (), (params, make().init(params))

  return case


def lookahead(tmp_path):
  params = masters()
  both = optax.LookaheadParams(params, mpo.cast(params, where=where))  # the slow weights have no bits
  tx = optax.lookahead(mpo.compensated(adam()), 5, 0.5)
  return (params, both), mpo.init(tx, both, where=where)


def convert(make, back=False):
  def case(tmp_path):
    run = masters(), adam().init(masters())
    new = mpo.convert(make(), *run, where=where)
    return (run, new) if not back else ((run, new), mpo.convert(adam(), *new))

  return case


def train_state(**options):
  def case(tmp_path):
    params, variables = masters(), {"batch_stats": jnp.zeros(3)}
    tx = mpo.compensated(optax.contrib.schedule_free(adam(), 1e-2))
    state = TrainState.create(apply_fn=nn.Dense(3).apply, params=params, tx=tx, variables=variables, **options)
    return (params, variables), (state, state.masters())

  return case


def nnx_optimizer(tmp_path):
  model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
  before = nnx.as_pure(nnx.state(model, nnx.Param))
  optimizer = Optimizer(model, mpo.compensated(adam()), where=where)
  return before, (nnx.as_pure(nnx.state((model, optimizer))), optimizer.masters(model))


def checkpoint(tmp_path):
  saved = mpo.init(mpo.compensated(adam()), masters(), where=where), jax.random.key(0)
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    return saved, checkpoints.restore(saved)[1]


def safetensors(tmp_path):
  run = mpo.init(mpo.compensated(adam()), masters(), where=where)
  save_safetensors(tmp_path / "m", *run)
  return run, load_safetensors(tmp_path / "m", run[0])


def sharded(tmp_path):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  params = jax.device_put(masters(), NamedSharding(mesh, P()))
  made = mpo.init(mpo.compensated(adam()), params, where=where)
  assert all(x.sharding == NamedSharding(mesh, P()) for x in jax.tree.leaves(made[0]))
  return params, made


def one_buffer_in_two_arrays(tmp_path):
  """`device_put` to the device that an array is already on returns another array with the same buffer."""
  params = masters()
  again = jax.device_put(params, jax.tree.map(lambda x: x.sharding, params))
  return params, mpo.init(mpo.compensated(adam()), {"a": params, "b": again}, where=where)


def random_keys(tmp_path):
  key = jax.random.key(0)
  trees = {"key": key, "data": jax.random.key_data(key), "again": key}
  return trees, mpo.cast(trees)


CASES = {
  **{f"init of {name}": made_by_init(make) for name, make in TRANSFORMATIONS.items()},
  **{f"tx.init of {name}": made_by_tx_init(make) for name, make in TRANSFORMATIONS.items() if "outside" not in name},
  **{f"convert to {n}": convert(TRANSFORMATIONS[n]) for n in ("compensated", "bits_0", "quantized_state")},
  "convert to f32": convert(adam),
  "convert back": convert(TRANSFORMATIONS["compensated"], back=True),
  "lookahead": lookahead,
  "cast": lambda tmp_path: (params := masters(), (mpo.cast(params, where=where), mpo.cast(params, where=where))),
  "master_params": lambda tmp_path: (
    (),
    (run := mpo.init(mpo.compensated(adam()), masters(), where=where), mpo.master_params(*run)),
  ),
  "dequantized": lambda tmp_path: (
    (),
    (run := mpo.init(TRANSFORMATIONS["quantized_state"](), masters()), mpo.dequantized(run[1])),
  ),
  "loss_scale": lambda tmp_path: ((), (state := mpo.loss_scaled(adam()).init(masters()), mpo.loss_scale(state))),
  "TrainState": train_state(where=where),
  "TrainState with an average": train_state(ema_decay=0.9, where=where),
  "TrainState with an average in f32": train_state(ema_decay=0.9, where=lambda *_: False),
  "Optimizer": nnx_optimizer,
  "Checkpointer.restore": checkpoint,
  "load_safetensors": safetensors,
  "sharded": sharded,
  "one buffer in two arrays": one_buffer_in_two_arrays,
  "random keys": random_keys,
}


def is_key(x):
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


# schedule_free around compensated must be donatable too. tests/transforms/test_probes.py tests the warning.
@pytest.mark.filterwarnings("ignore:init. something around compensated changes its update")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(23)
def test_what_is_made_can_be_donated_whole(name, tmp_path):
  callers, made = CASES[name](tmp_path)
  values = [np.array(x) for x in jax.tree.leaves(callers) if not is_key(x)]
  arrays = [x for x in jax.tree.leaves(made) if isinstance(x, jax.Array)]
  assert arrays
  jax.block_until_ready(jax.jit(lambda arrays: arrays, donate_argnums=0)(arrays))
  assert all(x.is_deleted() for x in arrays)
  assert not any(x.is_deleted() for x in jax.tree.leaves(callers))
  after = [np.array(x) for x in jax.tree.leaves(callers) if not is_key(x)]
  for a, b in zip(after, values, strict=True):
    np.testing.assert_array_equal(a, b)


ON_THE_HOST = [
  *("init of compensated", "init of bits_0", "init of schedule_free", "tx.init of schedule_free", "convert to bits_0"),
  *("convert to f32", "convert back", "lookahead", "cast", "master_params", "TrainState with an average in f32"),
]


@pytest.mark.parametrize("name", ON_THE_HOST)
def test_numpy_arrays_are_not_shared(name, tmp_path, monkeypatch):
  """A run that starts from NumPy arrays does not change when the caller overwrites them."""
  of_jax = masters()
  monkeypatch.setattr(f"{__name__}.masters", lambda: jax.tree.map(np.array, of_jax))
  callers, made = CASES[name](tmp_path)
  before, theirs = jax.tree.map(np.array, made), [x for x in jax.tree.leaves(callers) if isinstance(x, np.ndarray)]
  for x in theirs:
    x[...] = 7
  assert_same_bits(jax.tree.map(np.array, made), before)
  ours = [x for x in jax.tree.leaves(made) if isinstance(x, np.ndarray)]
  assert not any(np.shares_memory(x, y) for i, x in enumerate(ours) for y in [*theirs, *ours[:i]])


def test_a_train_state_with_an_average_and_f32_leaves_is_donated_step_after_step():
  model, x = nn.Dense(3), jnp.ones((2, 4))
  params = model.init(jax.random.key(0), x)["params"]
  state = TrainState.create(apply_fn=model.apply, params=params, tx=mpo.compensated(adam()), ema_decay=0.9, where=where)

  def loss(variables, x):
    return jnp.mean(model.apply(variables, x).astype(jnp.float32) ** 2)

  step = jax.jit(lambda state, x: state.step_with(loss, x), donate_argnums=0)
  for _ in range(3):
    state, value = step(state, x)
  assert np.isfinite(value)
  assert model.apply({"params": params}, x).shape == (2, 3)
