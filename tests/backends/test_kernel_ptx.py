"""Compiled kernels, run thread by thread without a card (`ptx`): their bits are those of the update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_mpo as mpo
from optax_mpo._backends import kernel_launch
from optax_mpo._backends.kernel_launch import Language
from optax_mpo._program.elements import COMPUTE
from tests.backends import ptx
from tests.backends.test_gpu_kernel import STORAGES, bits, computed, made

ROUNDED = {**COMPUTE, "rsqrt": lambda node, x: jnp.asarray(ptx.rsqrt(x))}  # once, as in `ptx`


def launched(kernels, given, index, language, folder):
  """Compiles a launch for an H100, and runs its PTX. Returns the new arrays of each weight."""

  def call(index: jax.Array, given):
    return kernel_launch.call(kernels, given, index, Language[language])

  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (jnp.int32(0), given))
  with kernel_launch.lowering():
    mpo.gpu_memory(jax.jit(call), *shapes, target="h100", dump_to=folder / "xla")
  texts = [path.read_text() for path in folder.rglob("*.ptx")]
  (text,) = (text for text in texts if "entry step_weight" in text)
  arrays, written = [np.array([index], np.int32)], []
  for kernel, one in zip(kernels, given, strict=True):
    written.append(range(len(arrays) + 1, len(arrays) + 1 + len(one[1])))
    arrays += map(np.asarray, kernel.flat(*one))
  again = [k for part in written for k in part] if language == "TRITON" else []  # Mosaic's results are no parameters
  new = ptx.run(text, arrays, sum(kernel.tiles for kernel in kernels), again)
  return [[new[k] for k in part] for part in written]


@pytest.fixture(autouse=True)
def _without_flags_for_cpus(monkeypatch):
  """The process that compiles would read them."""
  monkeypatch.setenv("XLA_FLAGS", "")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.few(1, full=2)
def test_one_layer_of_a_stack(storage, language, tmp_path):
  kernel, _, grad, stacks, shared = made(STORAGES[storage](), (3, 8, 512), stacked=True)
  index = 1
  grad = grad.at[index, 0, :4].set(jnp.array([0.0, -0.0, 1e-39, 3e38], grad.dtype))
  (new,) = launched([kernel], [(grad[index], stacks, shared)], index, language, tmp_path)
  expected = computed(kernel, grad[index], [x[index] for x in stacks], shared, index, ROUNDED)
  for old, found, layer in zip(stacks, new, expected, strict=True):
    np.testing.assert_array_equal(bits(found.reshape(old.shape)), bits(old.at[index].set(layer)))
    assert (bits(layer) != bits(old[index])).any()


@pytest.mark.full
def test_several_weights_in_one_launch(language, tmp_path):
  names, shapes = ["16 bits", "8 bits", "0 bits"], [(24, 96), (128,), (640,)]
  made_of = [made(STORAGES[name](), shape, stacked=False) for name, shape in zip(names, shapes, strict=True)]
  kernels, given = [m[0] for m in made_of], [m[2:] for m in made_of]
  assert len({kernel.tile for kernel in kernels}) > 1
  for kernel, one, new in zip(kernels, given, launched(kernels, given, 0, language, tmp_path), strict=True):
    for old, found, expected in zip(one[1], new, computed(kernel, *one), strict=True):
      np.testing.assert_array_equal(bits(found.reshape(old.shape)), bits(expected))
