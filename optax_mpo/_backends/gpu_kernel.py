"""Updates a weight, or one layer of a stack, with one GPU kernel that reads and writes every byte once.

Why: an update is bound by memory. XLA:GPU cannot fuse several updates in place, so it writes each stack of layers with
a kernel of its own. Where blocks of state get their scales, it reads the whole update twice. In a scan, AdamW with 16
bits moves 46 bytes per parameter and needs 26 (docs/performance.md).

How: `elementwise` takes the update apart, and a Pallas kernel (Triton) runs it in place on tiles of one layer. It needs
a CUDA GPU, Ampere or later; `step_weight` says what other machines run. This kernel and XLA's divide and take roots
with the same instructions (`div.full.f32`, `sqrt.approx.f32`) and round each product and each sum.
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

from optax_mpo._core import types
from optax_mpo._program import elementwise, jax_forms
from optax_mpo._program.program import Program, Slice

TILE = 1024
"""Elements that one program of the kernel updates, at most: eight for each of its 128 threads."""

_LEAST_TILE = 128
_INDEX_LIMIT = 2**31  # a stack has to have fewer elements, for indices of 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
  """The update of one weight, or of the layers of a stack, as a kernel.

  Attributes:
    elements: what it computes.
    program: the traced update that it was made from.
    shape: the shape of the weight, layers included.
    stacked: whether the first axis of the weight and its states counts layers.
    tile: how many elements one program of the kernel updates.
    given: the variables of the other values that it reads.
  """

  elements: elementwise.Elements
  program: Program
  shape: tuple[int, ...]
  stacked: bool
  tile: int
  given: tuple[int, ...]

  @property
  def layers(self) -> int:
    """How many layers the weight has; 1 if it is not a stack."""
    return self.shape[0] if self.stacked else 1

  @property
  def tiles(self) -> int:
    """How many programs update one layer."""
    return math.prod(self.shape) // self.layers // self.tile

  @property
  def arrays(self) -> int:
    """How many arrays the kernel reads and writes."""
    return sum(not s.counted for s in self.elements.sources) + len(self.elements.outputs)

  def flat(self, grad: Any, stacks: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    """Returns the arrays that the kernel reads: [layers, elements], [layers, blocks, block size] or [layers, blocks].

    The gradient and values by column have no layer axis; scalars are [1].
    """
    env = dict(self.program.constants) | dict(zip(self.given, shared, strict=True))
    jax_forms.run(self.program, self.elements.hoisted, env)
    sources, block = [s for s in self.elements.sources if not s.counted], self.elements.block
    extra = [env[s.var] for s in sources[1 + len(stacks) :]]

    def flat(k: int, x: Any) -> Any:
      if sources[k].kind == "scalar":
        return x.reshape(1)
      lead = (self.layers,) if k > 0 and not sources[k].columns else ()
      return x.reshape(*lead, -1, block) if sources[k].kind == "element" and block else x.reshape(*lead, -1)

    return [flat(k, x) for k, x in enumerate([grad, *stacks, *extra])]

  def _has_layers(self, k: int) -> bool:
    return k > 0 and not self.elements.sources[k].columns

  def step_tile(self, layer: Any, tile: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Updates a tile of a layer, in the kernel. `inputs` are refs of what `flat` returns, `outputs` of the results."""
    from jax.experimental import pallas as pl  # here, since the import is slow and rarely needed

    elements, block, size = self.elements, self.elements.block, self.tile
    start = tile * size
    kinds: dict[elementwise.Kind, tuple[int, ...]] = {
      "element": (size // block, block) if block else (size,),
      "block": (size // max(block, 1), 1),
      "scalar": (),
    }

    def where(k: int) -> tuple[Any, ...]:
      """The index of the tile in the array of source `k`."""
      source = elements.sources[k]
      first = lax.rem(start, jnp.int32(elements.length)) if source.columns else start
      here = pl.ds(first // block, size // block) if block else pl.ds(first, size)
      whole = [slice(None)] if block and source.kind == "element" else []
      return (*([layer] if self._has_layers(k) else []), here, *whole)

    values, refs = [], iter(inputs)
    for k, source in enumerate(elements.sources):
      if source.counted:
        first = lax.rem(start, jnp.int32(elements.length))
        first = first // block if source.kind == "block" else first
        values.append(_count(first, kinds[source.kind]).astype(self.program.aval(source.var).dtype))
      elif source.kind == "scalar":
        values.append(next(refs)[0])
      elif source.kind == "block":
        values.append(next(refs)[where(k)].reshape(kinds["block"]))
      else:
        values.append(next(refs)[where(k)])
    for k, value in enumerate(elements.compute(values, kinds), start=1):
      outputs[k - 1][where(k)] = value.reshape(-1) if elements.sources[k].kind == "block" else value


def _count(first: Any, shape: tuple[int, ...]) -> Any:
  """Returns the integers from `first` on, in the shape of a tile: i32[*shape]."""
  place = sum(
    lax.broadcasted_iota(jnp.int32, shape, axis) * math.prod(shape[axis + 1 :])
    for axis in range(len(shape))
    if shape[axis] > 1
  )
  return jnp.broadcast_to(first + place, shape)


Given = tuple[Any, Sequence[Any], Sequence[Any]]  # a gradient; the weight and its states; the other values it reads


def call(kernels: Sequence[Kernel], given: Sequence[Given], index: Any, interpret: bool = False) -> list[list[Any]]:
  """Updates weights, or the layers of stacks at `index`, in one launch: on a CUDA GPU, or anywhere with `interpret`.

  Args:
    kernels: one for each weight.
    given: what each of them reads.
    index: i32[], which layer; 0 where there are none.
    interpret: whether to run in Pallas' interpreter.

  Returns:
    For each kernel the new weight and states.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  inputs = [kernel.flat(*g) for kernel, g in zip(kernels, given, strict=True)]
  news = [arrays[1 : 1 + len(g[1])] for arrays, g in zip(inputs, given, strict=True)]
  read, written, aliases, stop = [], [], {}, [0]
  first_in, first_out = 1, 0
  for kernel, arrays, new in zip(kernels, inputs, news, strict=True):
    read.append(slice(first_in, first_in + len(arrays)))
    written.append(slice(first_out, first_out + len(new)))
    aliases |= {first_in + 1 + k: first_out + k for k in range(len(new))}
    first_in, first_out = first_in + len(arrays), first_out + len(new)
    stop.append(stop[-1] + kernel.tiles)

  def body(*refs: Any) -> None:
    layer, program, outputs = refs[0][0], pl.program_id(0), refs[first_in:]

    def step(k: int) -> None:
      kernels[k].step_tile(layer, program - stop[k], refs[read[k]], outputs[written[k]])

    if len(kernels) == 1:
      return step(0)
    for k in range(len(kernels)):
      pl.when((program >= stop[k]) & (program < stop[k + 1]))(lambda k=k: step(k))
    return None

  new = pl.pallas_call(
    body,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for arrays in news for x in arrays],
    grid=(stop[-1],),
    input_output_aliases=aliases,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="step_weight" if len(kernels) == 1 else "step_weights",
  )(index.reshape(1), *(x for arrays in inputs for x in arrays))
  return [
    [x.reshape(old.shape) for x, old in zip(new[part], g[1], strict=True)]
    for part, g in zip(written, given, strict=True)
  ]


def make(update: Slice, stacked: bool) -> Kernel:
  """Makes the kernel of an update.

  Args:
    update: updates one weight, or a stack of layers as a whole.
    stacked: whether the first axis of all inputs counts layers.

  Raises:
    NotElementwiseError: where there is none.
  """
  program, operations, inputs, given, _, outputs = update
  shape = program.aval(inputs[1]).shape if len(inputs) > 1 else ()
  if any(isinstance(c, Tracer) for c in program.constants.values()):
    raise elementwise.NotElementwiseError("it closes over a traced value")
  for var in inputs:
    dtype = program.aval(var).dtype
    if types.is_packed(dtype) or dtype.name.startswith("float8"):  # not all cards have instructions for float8
      raise elementwise.NotElementwiseError(f"it is stored as {dtype}")
  elements = elementwise.take_apart(program, operations, inputs, [*given, *program.constants], outputs, shape)
  for var, out in zip(inputs[1:], outputs, strict=True):
    aval = program.aval(out)
    if (aval.shape, aval.dtype) != (program.aval(var).shape, program.aval(var).dtype):
      raise elementwise.NotElementwiseError("it changes the form of its state")
  if math.prod(shape) >= _INDEX_LIMIT:
    raise elementwise.NotElementwiseError(f"it has {math.prod(shape)} elements, more than 32 bits count")
  size = math.prod(shape[1:] if stacked else shape)
  divides = math.gcd(size, elements.length) if any(s.columns for s in elements.sources) else size
  tile = math.gcd(divides, TILE)
  if tile < max(_LEAST_TILE, elements.block):
    raise elementwise.NotElementwiseError(f"{size} elements do not make tiles of {_LEAST_TILE} or more")
  return Kernel(elements, program, tuple(shape), stacked, tile, tuple(given))


# --- Where it can run -------------------------------------------------------------------------------------------------


def is_usable(devices: int | None) -> bool:
  """Whether a program for `devices` CUDA GPUs can use kernels: for one GPU, but not inside a `shard_map` (None)."""
  if devices == 1 and not _has_triton():
    warnings.warn(
      f"with_kernels: JAX {jax.__version__} has no Triton backend for Pallas any more, so that XLA steps all weights, "
      "with the same results. Take with_kernels away, or install a JAX that has it.",
      stacklevel=2,
    )
  return devices == 1 and _is_ampere() and _has_triton()


@contextlib.contextmanager
def lowering() -> Iterator[None]:
  """A context in which kernels can be lowered, with or without a GPU."""
  # Without a GPU, as for `gpu_memory`, later versions of JAX need to be told of one.
  card = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  mesh = None if jax.default_backend() == "gpu" else AbstractMesh((), (), abstract_device=card)
  with use_abstract_mesh(mesh) if mesh else contextlib.nullcontext(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    yield


def _has_triton() -> bool:
  """Whether this JAX has Pallas' Triton backend. JAX 0.12 says that it will be removed one day."""
  try:
    from jax.experimental.pallas import triton
  except ImportError:
    return False
  return hasattr(triton, "CompilerParams")


def _is_ampere() -> bool:
  """Whether Triton makes kernels for the GPU here; True without a GPU."""
  if jax.default_backend() != "gpu":
    return True
  capability = str(getattr(jax.devices()[0], "compute_capability", "0"))
  return float(capability) >= 8 if capability.replace(".", "", 1).isdigit() else False
