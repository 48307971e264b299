"""The kernel that updates a weight: where it reads and writes, and what it leaves to XLA."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._backends import gpu_kernel, kernel_launch, step_weight
from optax_mpo._program import jax_forms
from optax_mpo._program.elements import NotElementwiseError
from optax_mpo._updates import by_leaf

EXACT = functools.partial(mpo.compensated, optax.adamw(1e-3), extra_bits=16)
EIGHT = functools.partial(mpo.compensated, optax.adamw(1e-3), extra_bits=8)
PLAIN = functools.partial(mpo.compensated, optax.sgd(1e-2), extra_bits=0)


def compact(bits=8, **options):
  return mpo.compensated(mpo.quantized_state(optax.adamw(1e-3), **options), extra_bits=bits)


STORAGES = {"16 bits": EXACT, "8 bits": EIGHT, "0 bits": PLAIN, "compact": compact}


def made(tx, shape, stacked, dtype=jnp.bfloat16):
  """Returns the kernel of a weight of this shape, its group in the update, and its arguments."""
  params, state = mpo.init(tx, {"w": jax.random.normal(jax.random.key(0), shape)})
  grad = jax.random.normal(jax.random.key(1), shape).astype(dtype)
  _, state = jax.jit(tx.update)({"w": grad}, state, params)  # a state that is not all zero
  update = by_leaf.Update(tx, params, state, "test", kernels=True)
  group = update.group([0], "test")
  shared, _ = update.run_shared()
  kernel = gpu_kernel.make(group.update, stacked)
  leaves = jax.tree.leaves(state)
  return kernel, group, grad, [params["w"], *(leaves[j] for j in group.states)], [shared[v] for v in group.shared]


def exact_jit(fun, static=(), without="fusion"):
  """`jax.jit` without fusion, so that XLA:CPU cannot form fused multiply-adds."""
  options = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": without}
  return jax.jit(fun, static_argnums=static, compiler_options=options)


def interpreted(kernel):
  return lambda index, *given: kernel_launch.call([kernel], [given], index, None)[0]


def bits(x):
  return np.asarray(x).view(f"u{x.dtype.itemsize}")


def computed(kernel, grad, stacks, shared, index=None, operations=None):
  """Evaluates the kernel's nodes for a whole weight, or for one layer."""
  elements = kernel.elements
  env = dict(kernel.program.constants) | dict(zip(kernel.given, shared, strict=True))
  jax_forms.run(kernel.program, elements.hoisted, env)
  extra = [(s, env[s.var]) for s in elements.sources[1 + len(stacks) :]]
  assert sum(s.counted for s, _ in extra) == (4 if elements.block else 0)  # columns and blocks, to dither two moments
  layered = kernel.stacked and index is not None
  arrays = [grad, *stacks, *(x[index] if layered and s.kind != "scalar" and not s.columns else x for s, x in extra)]
  block = max(elements.block, 1)
  shapes = {"element": (grad.size // block, block), "block": (grad.size // block, 1), "scalar": ()}
  values = []
  for source, x in zip(elements.sources, arrays, strict=True):
    if source.columns:  # one row, repeated for all rows
      x = jnp.tile(x.reshape(-1), grad.size // elements.length)
    values.append(x.reshape(shapes[source.kind]))
  return [x.reshape(old.shape) for x, old in zip(elements.compute(values, shapes, operations), stacks, strict=True)]


@pytest.mark.parametrize(
  ("storage", "shape"),
  [
    ("16 bits", (3, 16, 96)),
    ("8 bits", (2, 4096)),
    ("0 bits", (3, 4, 8, 32)),
    ("compact", (3, 8, 256)),
    ("compact", (2, 4, 4096)),
  ],
)
@pytest.mark.few(1)
def test_it_steps_one_layer_and_leaves_the_others(storage, shape):
  kernel, _, grad, stacks, shared = made(STORAGES[storage](), shape, stacked=True)
  index = shape[0] - 2
  new = exact_jit(interpreted(kernel))(jnp.int32(index), grad[index], stacks, shared)
  expected = computed(kernel, grad[index], [x[index] for x in stacks], shared, index)
  for old, found, layer in zip(stacks, new, expected, strict=True):
    np.testing.assert_array_equal(bits(found), bits(old.at[index].set(layer)))
    assert (bits(found)[index] != bits(old)[index]).any()


@pytest.mark.parametrize(
  ("storage", "shape"), [("16 bits", (24, 96)), ("compact", (8, 256)), ("compact", (4096,)), ("compact", (3, 5, 128))]
)
@pytest.mark.few(2)
def test_it_steps_a_weight_that_is_no_stack(storage, shape):
  kernel, _, grad, stacks, shared = made(STORAGES[storage](), shape, stacked=False)
  new = exact_jit(interpreted(kernel))(jnp.int32(0), grad, stacks, shared)
  for found, expected in zip(new, computed(kernel, grad, stacks, shared), strict=True):
    np.testing.assert_array_equal(bits(found), bits(expected))


def test_several_small_weights_are_stepped_in_one_launch():
  shapes = [(24, 96), (128,), (5, 8, 128), (1024,), (640,)]
  names = ["16 bits", "8 bits", "16 bits", "0 bits", "16 bits"]
  made_of = [made(STORAGES[name](), shape, stacked=False) for name, shape in zip(names, shapes, strict=True)]
  kernels, given = [m[0] for m in made_of], [m[2:] for m in made_of]
  calls = jax.make_jaxpr(lambda given: kernel_launch.call(kernels, given, jnp.int32(0), kernel_launch.Language.TRITON))(
    given
  )
  assert str(calls).count("pallas_call") == 1
  together = functools.partial(kernel_launch.call, kernels, index=jnp.int32(0), language=None)
  new = exact_jit(together, without="fusion,algsimp")(given)  # XLA:CPU would rewrite divisions within branches
  for kernel, one, found in zip(kernels, given, new, strict=True):
    for x, expected in zip(found, computed(kernel, *one), strict=True):
      np.testing.assert_array_equal(bits(x), bits(expected))


def test_what_is_not_for_mosaic_gpu(monkeypatch):
  """Exponentials, whose bits differ there, and arithmetic in bf16. JAX 0.10 has an earlier form of it."""
  monkeypatch.setenv("OPTAX_MPO_KERNELS", "mosaic")
  there = kernel_launch.is_there(kernel_launch.Language.MOSAIC)
  if not there:
    monkeypatch.setattr(kernel_launch, "is_there", lambda _: False)
  exponential = optax.stateless(lambda u, _: jax.tree.map(lambda x: -jnp.exp(x.astype(jnp.float32)), u))
  in_bf16 = optax.chain(
    optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.square(x.astype(jnp.bfloat16)), u)), optax.sgd(0.1)
  )
  cases = {name: (tx(), there) for name, tx in STORAGES.items()}
  cases |= {"exp": (mpo.compensated(exponential), False), "bf16": (mpo.compensated(in_bf16), False)}
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "with_kernels: JAX .* has no mosaic backend")
    found = {}
    for name, (tx, _) in cases.items():
      kernel, *_ = made(tx, (8, 1024), stacked=False)
      found[name] = kernel_launch.chosen([kernel], 1) is kernel_launch.Language.MOSAIC
  assert found == {name: expected for name, (_, expected) in cases.items()}


def test_launches_hold_no_more_arrays_than_a_kernel_is_given():
  kernel, *_ = made(STORAGES["16 bits"](), (256,), stacked=False)
  assert 9 <= kernel.arrays < 20
  parts = step_weight._launches([kernel] * 100)
  assert [k for part in parts for k in part] == list(range(100))
  assert max(len(part) for part in parts) * kernel.arrays <= 400 < (len(parts[0]) + 1) * kernel.arrays
  assert step_weight._launches([]) == []


def test_what_it_computes_for_8_bit_state_is_the_update():
  """Except for divisions by a constant, which XLA turns into products, and (a / b) / c, which becomes a / (b * c)."""
  kernel, group, grad, stacks, shared = made(compact(), (8, 256), stacked=False)
  expected = exact_jit(group.step)([grad], stacks[:1], stacks[1:], shared)
  for found, one in zip(
    exact_jit(computed, 0)(kernel, grad, stacks, shared), [*expected[0], *expected[1]], strict=True
  ):
    np.testing.assert_array_equal(bits(found), bits(one))


def third():
  return optax.chain(optax.stateless(lambda u, _: {"w": u["w"] / 3}), optax.adamw(1e-3))


REFUSED = {
  "a tile": (EXACT, (3, 5, 7), "35 elements do not make tiles of 128 or more"),
  "blocks that are not full": (compact, (3, 8, 400), "blocks of several sizes, or ones that are not full"),
  "4 bits": (functools.partial(compact, bits=4), (3, 8, 256), "stored as uint4"),
  "codes of 4 bits": (lambda: mpo.compensated(mpo.quantized_state(optax.adamw(1e-3), state_bits=4)), (3, 8, 256), "4"),
  "state by rows": (lambda: mpo.compensated(optax.adafactor(1e-3)), (3, 256, 256), "goes into it|not known"),
  "sums": (lambda: mpo.compensated(optax.lamb(1e-3)), (3, 16, 256), "not known to the kernel"),
  "a third, used twice": (lambda: mpo.compensated(third()), (3, 16, 256), "XLA would join"),
  "random rounding": (lambda: EIGHT(rounding="stochastic"), (3, 16, 256), "`iota`"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.few(3)
def test_what_is_left_to_xla(case):
  make, shape, reason = REFUSED[case]
  with pytest.raises(NotElementwiseError, match=reason):
    made(make(), shape, stacked=True)
