"""Steps a weight, or one layer of a stack, with one GPU kernel that reads and writes every byte once.

Why: an update is bound by memory. XLA:GPU writes each stack of layers with a kernel of its own, since it does not fuse
several updates in place, and reads all of an update twice where blocks of state get their scales: in a scan, 46 bytes
per parameter where AdamW with 16 bits needs 26 (docs/performance.md).

How: `_elements` takes the update apart, and a Pallas kernel (Triton) runs it on tiles of one layer, in place. One CUDA
GPU, Ampere or later, can run it; `_step_weight` says what anything else does. XLA's kernels and this one divide and
take roots with the same instructions (`div.full.f32`, `sqrt.approx.f32`) and round each product and each sum.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from optax_mpo import _elements, _jaxpr

TILE = 1024
"""Elements that a program of the kernel steps: eight for each of its 128 threads."""

_LEAST_TILE = 128
_INDEX_LIMIT = 2**31  # elements of a stack, up to which 32 bits count them


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
  """The update of one weight, or of the layers of a stack, as a kernel.

  Attributes:
    elements: what it computes.
    program: where that is from.
    shape: of the weight, layers included.
    stacked: whether the first axis of the weight and its states counts layers.
    tile: how many elements a program of the kernel steps.
    given: the variables of what it reads beside the gradient, the weight and the states.
  """

  elements: _elements.Elements
  program: _jaxpr.Program
  shape: tuple[int, ...]
  stacked: bool
  tile: int
  given: tuple[int, ...]

  def call(
    self, index: Any, grad: Any, stacks: Sequence[Any], shared: Sequence[Any], interpret: bool = False
  ) -> list[Any]:
    """Runs the kernel: on a CUDA GPU, or anywhere with `interpret`."""
    from jax.experimental import pallas as pl  # here, since it takes a while to import and most never need it
    from jax.experimental.pallas import triton

    elements, block, tile = self.elements, self.elements.block, self.tile
    layers = self.shape[0] if self.stacked else 1
    size = math.prod(self.shape) // layers
    kinds: dict[_elements.Kind, tuple[int, ...]] = {
      "element": (tile // block, block) if block else (tile,),
      "block": (tile // max(block, 1), 1),
      "scalar": (),
    }
    sources, count = elements.sources, 1 + len(stacks)
    env = dict(self.program.constants) | dict(zip(self.given, shared, strict=True))
    _jaxpr.run(self.program, elements.hoisted, env)
    extra = [env[s.var] for s in sources[count:]]

    def flat(x: Any, source: _elements.Source, lead: tuple[int, ...]) -> Any:
      if source.kind == "scalar":
        return x.reshape(1)
      return x.reshape(*lead, -1, block) if source.kind == "element" and block else x.reshape(*lead, -1)

    def lead(k: int) -> tuple[int, ...]:
      return () if k == 0 or sources[k].columns else (layers,)

    def body(*refs: Any) -> None:
      index_ref, *inputs = refs[: 1 + len(sources)]
      layer, start = index_ref[0], pl.program_id(0) * tile

      def where(k: int) -> tuple[Any, ...]:
        """The tile's place in an array."""
        first = lax.rem(start, jnp.int32(elements.length)) if sources[k].columns else start
        here = pl.ds(first // block, tile // block) if block else pl.ds(first, tile)
        return (*([layer] if lead(k) else []), here, *([slice(None)] if block and sources[k].kind == "element" else []))

      values = []
      for k, ref in enumerate(inputs):
        if sources[k].kind == "scalar":
          values.append(ref[0])
        elif sources[k].kind == "block":
          values.append(ref[where(k)].reshape(kinds["block"]))
        else:
          values.append(ref[where(k)])
      for k, value in enumerate(elements.compute(values, kinds), start=1):
        refs[len(sources) + k][where(k)] = value.reshape(-1) if sources[k].kind == "block" else value

    arrays = [flat(x, s, lead(k)) for k, (x, s) in enumerate(zip([grad, *stacks, *extra], sources, strict=True))]
    new = pl.pallas_call(
      body,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[1:count]],
      grid=(size // tile,),
      input_output_aliases={1 + k: k - 1 for k in range(1, count)},
      compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
      interpret=interpret,
      name="step_weight",
    )(index.reshape(1), *arrays)
    return [x.reshape(old.shape) for x, old in zip(new, stacks, strict=True)]


def make(
  program: _jaxpr.Program,
  operations: Sequence[_jaxpr.Operation],
  inputs: Sequence[int],
  given: Sequence[int],
  outputs: Sequence[_jaxpr.Atom],
  stacked: bool,
) -> Kernel:
  """Makes the kernel of an update.

  Args:
    program: where the operations are from.
    operations: the update of one weight, or of a stack of layers as a whole.
    inputs: the variables of its gradient, the weight and its states.
    given: the variables of what is handed to it beside them.
    outputs: the new weight and states.
    stacked: whether the first axis of all inputs counts layers.

  Raises:
    NotElementwiseError: where there is none.
  """
  shape = program.aval(inputs[1]).shape if len(inputs) > 1 else ()
  if any(isinstance(c, Tracer) for c in program.constants.values()):
    raise _elements.NotElementwiseError("it closes over a traced value")
  if any(program.aval(v).dtype.name in ("int4", "uint4") for v in inputs):
    raise _elements.NotElementwiseError("it is stored in 4 bits")
  elements = _elements.take_apart(program, operations, inputs, [*given, *program.constants], outputs, shape)
  for var, out in zip(inputs[1:], outputs, strict=True):
    aval = program.aval(out)
    if (aval.shape, aval.dtype) != (program.aval(var).shape, program.aval(var).dtype):
      raise _elements.NotElementwiseError("it changes the form of its state")
  if math.prod(shape) >= _INDEX_LIMIT:
    raise _elements.NotElementwiseError(f"it has {math.prod(shape)} elements, more than 32 bits count")
  size = math.prod(shape[1:] if stacked else shape)
  divides = math.gcd(size, elements.length) if any(s.columns for s in elements.sources) else size
  tile = math.gcd(divides, TILE)
  if tile < max(_LEAST_TILE, elements.block):
    raise _elements.NotElementwiseError(f"{size} elements do not make tiles of {_LEAST_TILE} or more")
  return Kernel(elements, program, tuple(shape), stacked, tile, tuple(given))


# --- Where it can run -------------------------------------------------------------------------------------------------


def is_usable(devices: int | None) -> bool:
  """Whether a program for so many CUDA GPUs, None inside of a `shard_map`, can have kernels."""
  if devices == 1 and not _has_triton():
    warnings.warn(
      f"with_kernels: JAX {jax.__version__} has no Triton backend for Pallas any more, so that XLA steps all weights, "
      "with the same results. Take with_kernels away, or install a JAX that has it.",
      stacklevel=2,
    )
  return devices == 1 and _is_ampere() and _has_triton()


@contextlib.contextmanager
def lowering() -> Iterator[None]:
  """Where a kernel is lowered, with a card or without one."""
  # Where the card is not there, as for `gpu_memory`, later versions of JAX want to be told of one.
  card = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  mesh = None if jax.default_backend() == "gpu" else AbstractMesh((), (), abstract_device=card)
  with use_abstract_mesh(mesh) if mesh else contextlib.nullcontext(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    yield


def _has_triton() -> bool:
  """Whether this JAX has Pallas' Triton backend, which JAX 0.12 says will be removed one day."""
  try:
    from jax.experimental.pallas import triton
  except ImportError:
    return False
  return hasattr(triton, "CompilerParams")


def _is_ampere() -> bool:
  """Whether the GPU here, if there is one, is one that Triton makes kernels for."""
  if jax.default_backend() != "gpu":
    return True
  capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
  return float(capability) >= 8 if capability.replace(".", "", 1).isdigit() else False
