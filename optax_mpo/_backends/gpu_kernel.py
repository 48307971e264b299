"""Describes the update of a weight, or of one layer of a stack, as a GPU kernel that reads and writes every byte once.

Why: an update is bound by memory. XLA:GPU cannot fuse several updates in place, so it writes each stack of layers with
a kernel of its own. Where blocks of state get their scales, it reads the whole update twice. In a scan, AdamW with 16
bits moves 46 bytes per parameter and needs 26 (docs/performance.md).

How: `elementwise` takes the update apart, and a Pallas kernel runs it in place on tiles of one layer: in Triton
(`triton_kernel`) or Mosaic GPU (`mosaic_kernel`). `kernel_launch` chooses; `step_weight` says what other machines run.
These kernels and XLA's divide and take roots with the same instructions (`div.full.f32`, `sqrt.approx.f32`) and round
each product and each sum.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.core import Tracer

from optax_mpo._core import types
from optax_mpo._core.annotations import Values
from optax_mpo._program import elementwise, jax_forms
from optax_mpo._program.elements import Elements, NotElementwiseError
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

  elements: Elements
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

  def flat(self, grad: jax.Array, stacks: Values, shared: Values) -> list[jax.Array]:
    """Returns the arrays that the kernel reads: [layers, elements], [layers, blocks, block size] or [layers, blocks].

    The gradient and values by column have no layer axis; scalars are [1].
    """
    env = dict(self.program.constants) | dict(zip(self.given, shared, strict=True))
    jax_forms.run(self.program, self.elements.hoisted, env)
    sources, block = [s for s in self.elements.sources if not s.counted], self.elements.block
    extra = [env[s.var] for s in sources[1 + len(stacks) :]]

    def flat(k: int, x: jax.Array) -> jax.Array:
      if sources[k].kind == "scalar":
        return x.reshape(1)
      lead = (self.layers,) if k > 0 and not sources[k].columns else ()
      return x.reshape(*lead, -1, block) if sources[k].kind == "element" and block else x.reshape(*lead, -1)

    return [flat(k, x) for k, x in enumerate([grad, *stacks, *extra])]

  def has_layers(self, k: int) -> bool:
    """Whether the array of source `k` has an axis of layers."""
    return k > 0 and not self.elements.sources[k].columns


Given = tuple[jax.Array, Values, Values]  # a gradient; the weight and its states; the other values it reads


def for_each(kernels: Sequence[Kernel], program: jax.Array, step: Callable[[int, jax.Array], None]) -> None:
  """Within a launch for several weights, runs `step(k, tile)` for the kernel `k` that has a program of the grid."""
  from jax.experimental import pallas as pl  # here, since the import is slow and rarely needed

  if len(kernels) == 1:
    return step(0, program)
  first = 0
  for k, kernel in enumerate(kernels):
    here = (program >= first) & (program < first + kernel.tiles)
    pl.when(here)(functools.partial(step, k, program - first))
    first += kernel.tiles
  return None


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
    raise NotElementwiseError("it closes over a traced value")
  for var in inputs:
    dtype = program.aval(var).dtype
    if types.is_packed(dtype) or dtype.name.startswith("float8"):  # not all cards have instructions for float8
      raise NotElementwiseError(f"it is stored as {dtype}")
  elements = elementwise.take_apart(program, operations, inputs, [*given, *program.constants], outputs, shape)
  for var, out in zip(inputs[1:], outputs, strict=True):
    aval = program.aval(out)
    if (aval.shape, aval.dtype) != (program.aval(var).shape, program.aval(var).dtype):
      raise NotElementwiseError("it changes the form of its state")
  if math.prod(shape) >= _INDEX_LIMIT:
    raise NotElementwiseError(f"it has {math.prod(shape)} elements, more than 32 bits count")
  size = math.prod(shape[1:] if stacked else shape)
  divides = math.gcd(size, elements.length) if any(s.columns for s in elements.sources) else size
  tile = math.gcd(divides, TILE)
  if tile < max(_LEAST_TILE, elements.block):
    raise NotElementwiseError(f"{size} elements do not make tiles of {_LEAST_TILE} or more")
  return Kernel(elements, program, tuple(shape), stacked, tile, tuple(given))
