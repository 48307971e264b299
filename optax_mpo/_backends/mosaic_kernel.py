"""Runs the update of a tile as a Pallas kernel in Mosaic GPU: for cards from Hopper on.

How: a warpgroup of 128 threads updates a tile, each thread `tile / 128` elements in a row. So every value is an array
[tile] in one layout, also one per block or a scalar, and nothing is exchanged but the largest element of a block, by
shuffles between the threads of the block.

Exactness: Mosaic's compiler would fuse products and sums, which XLA does not. So these, quotients and roots are PTX
instructions, those of XLA. Tests compile it without a card and read them. No card has run it yet (docs/gpu.md).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector
from jax.typing import DTypeLike

from optax_mpo._backends.gpu_kernel import Kernel, for_each
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program.elements import COMPUTE, Kind, Node

IS_KNOWN = hasattr(plgpu, "inline_mgpu") and {"out_type", "debug"} <= {*inspect.signature(plgpu.kernel).parameters}
"""Whether this JAX has what is used here, as 0.11.2 and 0.12 have. That of 0.10 cannot be lowered within a step."""

_THREADS, _WARP = 128, 32
_PTX = {
  "add": "add.rn.f32",
  "sub": "sub.rn.f32",
  "mul": "mul.rn.f32",
  "div": "div.full.f32",
  "sqrt": "sqrt.approx.f32",
  "rsqrt": "rsqrt.approx.f32",
  "floor": "cvt.rmi.f32.f32",
  "ceil": "cvt.rpi.f32.f32",
}
_NO_ARITHMETIC = frozenset("input literal convert_element_type bitcast_convert_type select_n eq ne lt le gt ge".split())
_OTHER_BITS = ("exp", "log")  # Mosaic and XLA compute them in different ways


def can_run(kernel: Kernel) -> bool:
  """Whether there is a kernel in Mosaic: all arithmetic in f32, blocks within a warp."""
  width = kernel.tile // _THREADS
  if kernel.elements.block and not (width <= kernel.elements.block <= width * _WARP):
    return False
  for node in kernel.elements.nodes:
    is_float = jnp.issubdtype(node.dtype, jnp.floating)
    if node.name in _OTHER_BITS or (is_float and node.dtype != jnp.float32 and node.name not in _NO_ARITHMETIC):
      return False
  return True


def launch(
  kernels: Sequence[Kernel], arrays: Sequence[Values], counts: Sequence[int], index: jax.Array
) -> list[list[jax.Array]]:
  """Updates weights in one launch; see `triton_kernel.launch`."""
  flat = [_without_blocks(kernel, one) for kernel, one in zip(kernels, arrays, strict=True)]
  news = [tuple(one[1 : 1 + count]) for one, count in zip(flat, counts, strict=True)]
  lengths = [len(one) for one in flat]

  def body(*refs: jax.Ref) -> None:
    layer, rest = refs[0][0], list(refs[1:])
    inputs = [[rest.pop(0) for _ in range(length)] for length in lengths]

    def step(k: int, tile: jax.Array) -> None:
      _Tile(kernels[k]).step(layer, tile, inputs[k], inputs[k][1 : 1 + counts[k]])

    for_each(kernels, lax.axis_index("program"), step)

  body.__name__ = "step_weight" if len(kernels) == 1 else "step_weights"  # which names the kernel

  def run(refs: Sequence[Sequence[jax.Ref]]) -> None:
    plgpu.kernel(
      body,
      out_type=(),
      grid=(sum(kernel.tiles for kernel in kernels),),
      grid_names=("program",),
      compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(
      index.reshape(1),
      *(x for one, new in zip(flat, refs, strict=True) for x in (one[0], *new, *one[1 + len(new) :])),
    )

  return [list(new) for new in pl.run_state(run)(news)]


def _without_blocks(kernel: Kernel, arrays: Values) -> list[jax.Array]:
  """Arrays of elements without the axis of blocks."""
  sources = [s for s in kernel.elements.sources if not s.counted]
  if not kernel.elements.block:
    return list(arrays)
  return [x.reshape(*x.shape[:-2], -1) if s.kind == "element" else x for s, x in zip(sources, arrays, strict=True)]


class _Tile:
  """The update of a tile. Integers of 8 bits are held in 32, since Mosaic computes nothing with fewer than 16."""

  def __init__(self, kernel: Kernel):
    self.kernel, self.size, self.block = kernel, kernel.tile, kernel.elements.block
    self.width = kernel.tile // _THREADS
    self.layout = plgpu.Layout.WG_STRIDED((self.size,), vec_size=self.width)
    self.places = plgpu.broadcasted_iota(jnp.int32, (self.size,), 0, layout=self.layout)

  def step(self, layer: jax.Array, tile: jax.Array, inputs: Sequence[jax.Ref], outputs: Sequence[jax.Ref]) -> None:
    """Updates a tile of a layer. `inputs` and `outputs` are refs."""
    kernel, elements = self.kernel, self.kernel.elements
    start = tile * self.size
    column = lax.rem(start, jnp.int32(elements.length))

    def part(k: int, ref: jax.Ref) -> jax.Ref:
      """The part of the array of source `k` that the tile has."""
      first, count = column if elements.sources[k].columns else start, self.size
      if elements.sources[k].kind == "block":
        first, count = first // self.block, count // self.block
      return ref.at[(*([layer] if kernel.has_layers(k) else []), pl.ds(first, count))]

    values, refs = [], iter(inputs)
    for k, source in enumerate(elements.sources):
      if source.counted:
        place = self.places + column
        place = lax.div(place, jnp.full_like(place, self.block)) if source.kind == "block" else place
        values.append(place.astype(_held(kernel.program.aval(source.var).dtype)))
      elif source.kind == "scalar":
        values.append(next(refs)[0])
      elif source.kind == "block":
        values.append(self._load_block(part(k, next(refs))))
      else:
        value = plgpu.layout_cast(part(k, next(refs))[...], self.layout)
        values.append(value.astype(_held(value.dtype)))
    shapes: dict[Kind, tuple[int, ...]] = dict.fromkeys(("element", "block", "scalar"), (self.size,))
    new = elements.compute(values, shapes, self._operations())
    for k, (value, ref) in enumerate(zip(new, outputs, strict=True), start=1):
      if elements.sources[k].kind == "block":
        self._store_block(part(k, ref), value)
      else:
        part(k, ref)[...] = value.astype(ref.dtype)

  def _operations(self) -> dict[str, Callable[..., jax.Array]]:
    """The operations of nodes, each with a result that a value of the node's dtype can have."""
    own: dict[str, Callable[..., jax.Array]] = {
      "literal": lambda node: jnp.full((), node.params, _held(node.dtype)),
      "convert_element_type": _convert,
      "bitcast_convert_type": lambda node, x: lax.bitcast_convert_type(x, _held(node.dtype)),
      "reduce_max": lambda node, x: self._block_max(x),
      **{name: self._instruction(name) for name in _PTX},
    }
    every = {**COMPUTE, **own}
    return {name: lambda node, *args, f=f: _cut_to(node.dtype, f(node, *args)) for name, f in every.items()}

  def _instruction(self, name: str) -> Callable[..., jax.Array]:
    def apply(_: object, first: FragmentedArray, *rest: FragmentedArray) -> FragmentedArray:
      return first._pointwise(first._lift_fast_instr(_PTX[name]), *rest)

    def run(node: Node, *args: jax.Array) -> jax.Array:
      if node.dtype != jnp.float32:
        return COMPUTE[name](node, *args)
      return self._inline(apply, jnp.float32, args)

    return run

  def _inline(
    self, fun: Callable[..., FragmentedArray | None], dtype: Any, arrays: Values, refs: Sequence[jax.Ref] = ()
  ) -> PyTree:
    """Runs a function that writes MLIR, on arrays in the layout of the tile and on refs."""
    result = None if dtype is None else plgpu.ShapeDtypeStruct((self.size,), dtype, layout=self.layout)
    types = (*(self.layout for _ in arrays), *(plgpu.RefType() for _ in refs))
    inline = plgpu.inline_mgpu(arg_types=types, return_type=result)
    return inline(fun)(*(plgpu.layout_cast(x, self.layout) for x in arrays), *refs)

  def _block_max(self, x: jax.Array) -> jax.Array:
    """The largest element of each block, for each of its elements."""
    is_float, is_signed = (jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.signedinteger))
    largest = arith.maximumf if is_float else arith.maxsi if is_signed else arith.maxui

    def fun(_: object, x: FragmentedArray) -> FragmentedArray:
      (register,) = x.registers.flat
      found = functools.reduce(largest, [_extract(register, i) for i in range(self.width)])
      distance = 1  # in threads
      while distance * self.width < self.block:
        found, distance = largest(found, utils.shfl_bfly(found, distance)), 2 * distance
      return x._pointwise(lambda old: vector.broadcast(old.type, found))

    return self._inline(fun, x.dtype, [x])

  def _load_block(self, ref: jax.Ref) -> jax.Array:
    """A value of each block, for each of its elements."""
    is_signed = bool(jnp.issubdtype(ref.dtype, jnp.signedinteger))

    def fun(_: object, places: FragmentedArray, ref: ir.Value) -> FragmentedArray:
      value = memref.load(ref, [self._number_of_block(places)])
      kind = ir.VectorType.get((self.width,), value.type)
      signed = None if jnp.issubdtype(dtype, jnp.floating) else is_signed
      return places._pointwise(lambda _: vector.broadcast(kind, value), output_is_signed=signed)

    dtype = ref.dtype
    value = self._inline(fun, dtype, [self.places], [ref])
    return value.astype(_held(dtype))

  def _store_block(self, ref: jax.Ref, value: jax.Array) -> None:
    """Stores a value of each block, from the first of its threads."""

    def fun(_: object, places: FragmentedArray, value: FragmentedArray, ref: ir.Value) -> None:
      (register,), (values,) = places.registers.flat, value.registers.flat
      rest = arith.remui(_extract(register, 0), _constant(self.block))
      with ir.InsertionPoint(scf.IfOp(arith.cmpi(arith.CmpIPredicate.eq, rest, _constant(0))).then_block):
        memref.store(_extract(values, 0), ref, [self._number_of_block(places)])
        scf.yield_([])

    self._inline(fun, None, [self.places, value.astype(ref.dtype)], [ref])

  def _number_of_block(self, places: FragmentedArray) -> ir.Value:
    (register,) = places.registers.flat
    return arith.index_cast(ir.IndexType.get(), arith.divui(_extract(register, 0), _constant(self.block)))


def _held(dtype: DTypeLike) -> DTypeLike:
  """The dtype in which the values of a dtype are held."""
  return {"int8": jnp.int32, "uint8": jnp.uint32}.get(jnp.dtype(dtype).name, dtype)


def _cut_to(dtype: DTypeLike, x: jax.Array) -> jax.Array:
  """Cuts an integer that is held in 32 bits to 8, as arithmetic in 8 bits does."""
  if dtype == jnp.uint8:
    return x & jnp.full_like(x, 0xFF)
  if dtype == jnp.int8:
    bits = jnp.full_like(x, 24)
    return lax.shift_right_arithmetic(lax.shift_left(x, bits), bits)
  return x


def _convert(node: Node, x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    return jnp.where(x, jnp.ones_like(x, _held(node.dtype)), jnp.zeros_like(x, _held(node.dtype)))
  return x != jnp.zeros_like(x) if node.dtype == jnp.bool_ else lax.convert_element_type(x, _held(node.dtype))


def _extract(register: ir.Value, i: int) -> ir.Value:
  return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def _constant(value: int) -> ir.Value:
  return arith.constant(ir.IntegerType.get_signless(32), value)
