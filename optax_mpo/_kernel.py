"""Steps a weight, or one layer of a stack, with one GPU kernel that reads and writes every byte once.

Why: an update is bound by memory. XLA:GPU writes each stack of layers with a kernel of its own, since it does not fuse
several updates in place, and reads all of an update twice where blocks of state get their scales: in a scan, 46 bytes
per parameter where AdamW with 16 bits needs 26 (docs/performance.md).

How: `_elements` takes the update apart, and a Pallas kernel (Triton) runs it on tiles of one layer, in place. An
operation that is lowered to that kernel for one CUDA GPU, and to the update as it is for anything else: CPUs, several
devices, cards older than Ampere. XLA's kernels and this one divide and take roots with the same instructions
(`div.full.f32`, `sqrt.approx.f32`) and round each product and each sum.
"""

import contextlib
import contextvars
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from optax_mpo import _elements, _jaxpr

TILE = 1024
"""Elements that a program of the kernel steps: eight for each of its 128 threads."""

_LEAST_TILE = 128
_INDEX_LIMIT = 2**31  # elements of a stack, up to which 32 bits count them

Pure = Callable[[Any, Sequence[Any], Sequence[Any], Any, Sequence[Any]], Sequence[Any]]


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

  def step(
    self, grad: Any, stacks: Sequence[Any], shared: Sequence[Any], index: Any, waits: Sequence[Any], pure: Pure
  ) -> list[Any]:
    """Steps the weight, or the layer at `index`.

    Args:
      grad: the gradient, of one layer where the weight is a stack.
      stacks: the weight and its states.
      shared: the values of `given`.
      index: i32[], which layer; 0 where there are none.
      waits: numbers that are to be there before, where there is no kernel.
      pure: `pure(grad, stacks, shared, index, waits)` does the same without a kernel. It closes over no traced value.

    Returns:
      The new stacks.
    """
    operands = [index, grad, *stacks, *shared, *waits]
    return _step.bind(*operands, kernel=self, pure=pure, stacks=len(stacks), waits=len(waits))

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


# --- Where kernels are asked for --------------------------------------------------------------------------------------

_met: contextvars.ContextVar[list[None] | None] = contextvars.ContextVar("optax_mpo_kernels", default=None)


@contextlib.contextmanager
def left_out() -> Iterator[list[None]]:
  """Within it, what asks for kernels does without them. Yields a list that is not empty once something has asked."""
  met: list[None] = []
  token = _met.set(met)
  try:
    yield met
  finally:
    _met.reset(token)


def asked() -> bool:
  """Asks for kernels; False where they are left out."""
  met = _met.get()
  if met is not None:
    met.append(None)
  return met is None


# --- The operation ----------------------------------------------------------------------------------------------------


def _abstract(*avals: Any, kernel: Kernel, pure: Pure, stacks: int, waits: int) -> Any:
  return list(avals[2 : 2 + stacks])


def _pure(*operands: Any, kernel: Kernel, pure: Pure, stacks: int, waits: int) -> Any:
  index, grad, *rest = operands
  end = len(rest) - waits
  return list(pure(grad, rest[:stacks], rest[stacks:end], index, rest[end:]))


def _fused(*operands: Any, kernel: Kernel, pure: Pure, stacks: int, waits: int) -> Any:
  index, grad, *rest = operands
  return kernel.call(index, grad, rest[:stacks], rest[stacks : len(rest) - waits])


_step = Primitive("step_weight")
_step.multiple_results = True
_step.def_abstract_eval(_abstract)
_step.def_impl(_pure)


def _lower_cuda(context: Any, *operands: Any, **params: Any) -> Any:
  one_device = getattr(context.module_context.axis_context, "num_devices", None) == 1
  if one_device and not _has_triton():
    warnings.warn(
      f"with_kernels: JAX {jax.__version__} has no Triton backend for Pallas any more, so that XLA steps all weights, "
      "with the same results. Take with_kernels away, or install a JAX that has it.",
      stacklevel=2,
    )
  if not (one_device and _is_ampere() and _has_triton()):
    return mlir.lower_fun(_pure, multiple_results=True)(context, *operands, **params)
  # Where the card is not there, as for `gpu_memory`, later versions of JAX want to be told of one.
  card = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
  mesh = None if jax.default_backend() == "gpu" else AbstractMesh((), (), abstract_device=card)
  with use_abstract_mesh(mesh) if mesh else contextlib.nullcontext(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    return mlir.lower_fun(_fused, multiple_results=True)(context, *operands, **params)


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


mlir.register_lowering(_step, mlir.lower_fun(_pure, multiple_results=True))
mlir.register_lowering(_step, _lower_cuda, platform="cuda")
