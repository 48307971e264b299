"""Chooses the language of GPU kernels, and launches them.

Why: Pallas makes kernels by Triton, for cards from Ampere on, and by Mosaic GPU, from Hopper on. JAX 0.12 says that its
Triton backend will be removed one day.

How: Triton where the JAX at hand has it, since a card has run these kernels; else Mosaic. Both run the nodes of
`elementwise`.
"""

import contextlib
import enum
import os
import warnings
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from optax_mpo._backends.gpu_kernel import Given, Kernel


class Language(enum.Enum):
  """What Pallas makes a kernel of; the value is the first compute capability that it is for."""

  TRITON = 8.0
  MOSAIC = 9.0


def call(
  kernels: Sequence[Kernel], given: Sequence[Given], index: jax.Array, language: Language | None
) -> list[list[jax.Array]]:
  """Updates weights, or the layers of stacks at `index`, in one launch.

  Args:
    kernels: one for each weight.
    given: what each of them reads.
    index: i32[], which layer; 0 where there are none.
    language: None for Pallas' interpreter, on any machine.

  Returns:
    For each kernel the new weight and states.
  """
  arrays = [kernel.flat(*g) for kernel, g in zip(kernels, given, strict=True)]
  counts = [len(stacks) for _, stacks, _ in given]
  if language is Language.MOSAIC:  # modules of Pallas take long to import, and are rarely needed
    from optax_mpo._backends import mosaic_kernel

    new = mosaic_kernel.launch(kernels, arrays, counts, index)
  else:
    from optax_mpo._backends import triton_kernel

    new = triton_kernel.launch(kernels, arrays, counts, index, interpret=language is None)
  return [
    [x.reshape(old.shape) for x, old in zip(one, stacks, strict=True)]
    for one, (_, stacks, _) in zip(new, given, strict=True)
  ]


def chosen(kernels: Sequence[Kernel], devices: int | None) -> Language | None:
  """The language for a program for `devices` CUDA GPUs; None where XLA has to update the weights.

  Kernels are for one GPU, and not for the inside of a `shard_map`, where `devices` is None. The environment variable
  OPTAX_MPO_KERNELS (triton or mosaic) allows only one language.
  """
  if devices != 1:
    return None
  allowed = os.environ.get("OPTAX_MPO_KERNELS", "")
  if allowed and allowed.upper() not in Language.__members__:
    raise ValueError(f"OPTAX_MPO_KERNELS has to be triton or mosaic, but it is {allowed!r}.")
  there = [one for one in Language if is_there(one) and allowed.upper() in ("", one.name)]
  if not there:
    warnings.warn(
      f"with_kernels: JAX {jax.__version__} has no {allowed or 'Triton or Mosaic GPU'} backend for Pallas, so that XLA "
      "updates all weights, with the same results. Take with_kernels away, or install a JAX that has it.",
      stacklevel=2,
    )
  for language in there:
    if is_for_this_card(language) and (language is Language.TRITON or _is_for_mosaic(kernels)):
      return language
  return None


def is_there(language: Language) -> bool:
  """Whether the JAX at hand has a language."""
  try:
    if language is Language.TRITON:
      from jax.experimental.pallas import triton

      return hasattr(triton, "CompilerParams")
    from optax_mpo._backends import mosaic_kernel
  except (ImportError, AttributeError):
    return False
  return mosaic_kernel.IS_KNOWN


def is_for_this_card(language: Language) -> bool:
  """Whether the GPU here is recent enough for a language; without one, whether Hopper is."""
  return _capability() >= language.value


@contextlib.contextmanager
def lowering() -> Iterator[None]:
  """A context in which kernels can be lowered, with or without a GPU."""
  # Without a GPU, as for `gpu_memory`, later versions of JAX need to be told of one.
  card = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  mesh = None if jax.default_backend() == "gpu" else AbstractMesh((), (), abstract_device=card)
  with use_abstract_mesh(mesh) if mesh else contextlib.nullcontext(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    yield


def _is_for_mosaic(kernels: Sequence[Kernel]) -> bool:
  from optax_mpo._backends import mosaic_kernel

  return all(map(mosaic_kernel.can_run, kernels))


def _capability() -> float:
  """The compute capability of the GPU here; without one, that of Hopper."""
  if jax.default_backend() != "gpu":
    return 9.0
  capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
  return float(capability) if capability.replace(".", "", 1).isdigit() else 0.0
