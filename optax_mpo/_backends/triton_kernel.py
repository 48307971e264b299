"""Runs the update of a tile as a Pallas kernel in Triton: for cards from Ampere on."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from optax_mpo._backends.gpu_kernel import Kernel, for_each
from optax_mpo._core.annotations import Values
from optax_mpo._program.elements import Kind


def launch(
  kernels: Sequence[Kernel], arrays: Sequence[Values], counts: Sequence[int], index: jax.Array, interpret: bool = False
) -> list[list[jax.Array]]:
  """Updates weights in one launch.

  Args:
    kernels: one for each weight.
    arrays: what each of them reads, as `Kernel.flat` returns it.
    counts: how many of these, from the second on, each of them writes.
    index: i32[], which layer.
    interpret: whether to run in Pallas' interpreter, on any machine.

  Returns:
    For each kernel the new arrays.
  """
  news = [one[1 : 1 + count] for one, count in zip(arrays, counts, strict=True)]
  read, written, aliases = [], [], {}
  first_in, first_out = 1, 0
  for one, new in zip(arrays, news, strict=True):
    read.append(slice(first_in, first_in + len(one)))
    written.append(slice(first_out, first_out + len(new)))
    aliases |= {first_in + 1 + k: first_out + k for k in range(len(new))}
    first_in, first_out = first_in + len(one), first_out + len(new)

  def body(*refs: jax.Ref) -> None:
    layer, outputs = refs[0][0], refs[first_in:]

    def step(k: int, tile: jax.Array) -> None:
      step_tile(kernels[k], layer, tile, refs[read[k]], outputs[written[k]])

    for_each(kernels, pl.program_id(0), step)

  results = pl.pallas_call(
    body,
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for new in news for x in new],
    grid=(sum(kernel.tiles for kernel in kernels),),
    input_output_aliases=aliases,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="step_weight" if len(kernels) == 1 else "step_weights",
  )(index.reshape(1), *(x for one in arrays for x in one))
  return [list(results[part]) for part in written]


def step_tile(
  kernel: Kernel, layer: jax.Array, tile: jax.Array, inputs: Sequence[jax.Ref], outputs: Sequence[jax.Ref]
) -> None:
  """Updates a tile of a layer, in the kernel. `inputs` are refs of what `flat` returns, `outputs` of the results."""
  elements, block, size = kernel.elements, kernel.elements.block, kernel.tile
  start = tile * size
  kinds: dict[Kind, tuple[int, ...]] = {
    "element": (size // block, block) if block else (size,),
    "block": (size // max(block, 1), 1),
    "scalar": (),
  }

  def where(k: int) -> tuple[jax.Array | pl.Slice | slice, ...]:
    """The index of the tile in the array of source `k`."""
    source = elements.sources[k]
    first = lax.rem(start, jnp.int32(elements.length)) if source.columns else start
    here = pl.ds(first // block, size // block) if block else pl.ds(first, size)
    whole = [slice(None)] if block and source.kind == "element" else []
    return (*([layer] if kernel.has_layers(k) else []), here, *whole)

  values, refs = [], iter(inputs)
  for k, source in enumerate(elements.sources):
    if source.counted:
      first = lax.rem(start, jnp.int32(elements.length))
      first = first // block if source.kind == "block" else first
      values.append(_count(first, kinds[source.kind]).astype(kernel.program.aval(source.var).dtype))
    elif source.kind == "scalar":
      values.append(next(refs)[0])
    elif source.kind == "block":
      values.append(next(refs)[where(k)].reshape(kinds["block"]))
    else:
      values.append(next(refs)[where(k)])
  for k, value in enumerate(elements.compute(values, kinds), start=1):
    outputs[k - 1][where(k)] = value.reshape(-1) if elements.sources[k].kind == "block" else value


def _count(first: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns the integers from `first` on, in the shape of a tile: i32[*shape]."""
  place = sum(
    lax.broadcasted_iota(jnp.int32, shape, axis) * math.prod(shape[axis + 1 :])
    for axis in range(len(shape))
    if shape[axis] > 1
  )
  return jnp.broadcast_to(first + place, shape)
