"""A kernel computes the same bits as XLA:GPU's program of the same update, after all of XLA's rewrites."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from benchmarks import hlo
from optax_mpo._program import elementwise, jax_forms
from optax_mpo._updates import by_leaf
from tests import hlo_program

pytestmark = pytest.mark.full

SHAPE = (8, 256)

OPTIMIZERS = {
  "sgd": lambda: optax.sgd(1e-2),
  "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
  "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(1e-3),
  "adamw": lambda: optax.adamw(1e-3),
  "adamw-eps-root": lambda: optax.adamw(3e-4, b2=0.95, eps_root=1e-8, weight_decay=0.1),
  "adamw-schedule": lambda: optax.adamw(optax.linear_schedule(1e-3, 1e-4, 100)),
  "nadamw": lambda: optax.nadamw(1e-3),
  "amsgrad": lambda: optax.amsgrad(1e-3),
  "adamax": lambda: optax.adamax(1e-3),
  "adan": lambda: optax.adan(1e-3),
  "adagrad": lambda: optax.adagrad(1e-2),
  "adabelief": lambda: optax.adabelief(1e-3),
  "lion": lambda: optax.lion(1e-4, weight_decay=0.1),
  "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
  "rmsprop-centered": lambda: optax.rmsprop(1e-3, centered=True),
  "sign_sgd": lambda: optax.sign_sgd(1e-3),
  "yogi": lambda: optax.yogi(1e-3),
  "clipped": lambda: optax.chain(optax.clip(0.5), optax.adamw(1e-3)),
  "scaled": lambda: optax.chain(optax.scale(0.5), optax.scale(3.0), optax.trace(0.9), optax.scale(-1.0)),
  "divided": lambda: optax.chain(optax.stateless(lambda u, _: {"w": u["w"] / 3}), optax.sgd(1e-2, momentum=0.9)),
  "8-bit adamw": lambda: mpo.quantized_state(optax.adamw(1e-3), min_size=1),
  "8-bit momentum": lambda: mpo.quantized_state(optax.sgd(1e-2, momentum=0.9), min_size=1),
}


def numbers(shape, dtype, key):
  """Normally distributed numbers, scaled over two orders of magnitude."""
  sizes = 10.0 ** jax.random.uniform(jax.random.key(key + 1), shape, minval=-2, maxval=0)
  return (jax.random.normal(jax.random.key(key), shape) * sizes).astype(dtype)


def prepared(make, bits=16):
  tx = mpo.compensated(make(), extra_bits=bits)
  params, state = mpo.init(tx, {"w": numbers(SHAPE, jnp.float32, 0)})
  grads = {"w": numbers(SHAPE, jnp.bfloat16, 2)}
  for _ in range(3):  # so that the state is not all zero
    _, state = jax.jit(tx.update)(grads, state, params)
  return tx, params, state, grads


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
  """Compiles the updates of all optimizers as one program for a GPU, and runs it operation by operation."""
  cases = {name: prepared(make) for name, make in OPTIMIZERS.items()}

  def all_steps(params, states, grads):
    results = {}
    for name, (tx, *_) in cases.items():
      updates, state = tx.update(grads[name], states[name], params[name])
      results[name] = mpo.apply_updates(params[name], updates), state
    return results

  arguments = [{name: case[k] for name, case in cases.items()} for k in (1, 2, 3)]
  folder = tmp_path_factory.mktemp("dump")
  mpo.gpu_memory(all_steps, *arguments, target="h200", dump_to=folder)
  text = max((p.read_text() for p in folder.glob("*gpu_after_optimizations.txt")), key=len)
  assert len(hlo.parse(text)[0][hlo.parse(text)[1]].parameters) == len(jax.tree.leaves(arguments)), "all are used"
  results = hlo_program.run(text, jax.tree.leaves(arguments))
  return cases, jax.tree.unflatten(jax.tree.structure(jax.eval_shape(all_steps, *arguments)), results)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_kernel_computes_what_xla_gpu_does(name, programs):
  cases, results = programs
  tx, params, state, grads = cases[name]
  update = by_leaf.Update(tx, params, state, "test", kernels=True)
  shared, _ = update.run_shared()
  group = update.group([0], "test")
  given = [*group.shared, *group.constants]
  elements = elementwise.take_apart(group.program, group.operations, group.inputs, given, group.outputs, SHAPE)
  assert bool(elements.block) == name.startswith("8-bit")
  env = {**shared, **group.constants}
  jax_forms.run(group.program, elements.hoisted, env)
  leaves = jax.tree.leaves(state)
  env.update(zip(group.inputs, [grads["w"], params["w"], *(leaves[j] for j in group.states)], strict=True))
  count, block = SHAPE[0] * SHAPE[1], max(elements.block, 1)
  # Without blocks, keep the rows of XLA's program: some versions of XLA:CPU compute other roots for a column.
  shapes = {"element": (count // block, block) if elements.block else SHAPE, "block": (count // block, 1), "scalar": ()}
  values = []
  for source in elements.sources:
    x = env[source.var]
    values.append((jnp.tile(x.reshape(-1), SHAPE[0]) if source.columns else x).reshape(shapes[source.kind]))
  new = elements.compute(values, shapes)
  new_params, new_state = results[name]
  new_leaves = jax.tree.leaves(new_state)
  for found, expected in zip(new, [new_params["w"], *(new_leaves[j] for j in group.states)], strict=True):
    as_bits = [np.asarray(x).reshape(-1).view(f"u{x.dtype.itemsize}") for x in (found, expected)]
    np.testing.assert_array_equal(*as_bits)
