"""Stores optimizer state in 8 bits, by blocks: `f32[*s]` <-> 8-bit codes and one 16-bit scale per block.

Why: two f32 moments are 8 of the 12 bytes that AdamW holds per parameter. They do not need the precision of f32 nor,
within a row of weights, its range.

How: the last axis is cut into blocks. Each block is divided by its largest magnitude, the *scale*, and every element
becomes one of 256 levels, which lie closer together toward zero. Only the last axis is ever reshaped, so that leaves
stay sharded and stacks of layers stay stacks.

* **Scales** are f32 patterns rounded to 16 bits: no sign, 8 bits of exponent, 8 of mantissa. That is bf16 with the sign
  bit, which a magnitude does not need, spent on precision. The range is that of f32.
* **Levels.** Signed: t / (2 - |t|) for t = code / 127 or, below zero, code / 128; zero is zero. Non-negative:
  2 t^2 / (1 + t) for t = (code + 1/2) / 255.5. No element is zero in a block that is not all zero: if a second moment
  rounded to zero and the first did not, the update would blow up. Encoding takes a division for signed levels, a square
  root for non-negative ones. *Wide*, for signed numbers whose small values must not become zero: the 8-bit floats of
  `float8_e4m3fn`, in 256ths of the largest, down to 7.6e-6 of it.
* **No value gets stuck.** A moment that decays by 0.1% per step moves by less than half a level, and a 16-bit scale by
  less than half an ulp: rounding to nearest would undo every such step. So scales, and values that move by less than
  one level, are rounded up or down in proportion (that is, without bias), by a low-discrepancy sequence in step and
  column. Larger moves are rounded to nearest. A value on a level stays there: storing it again changes nothing.
* **Non-finite values are not stored.** A block with a non-finite element keeps its old state.

Source: blocks with one scale each follow Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
arXiv:2110.02861; levels by companding, one kind for each kind of state, follow FlashOptim, arXiv:2602.23349.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_mpo._core import xla_cpu

BITS = (4, 8)
"""The supported widths of codes, in bits."""

Kind = Literal["signed", "nonnegative", "wide"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of numbers that have codes."""

_SCALE_SHIFT = 15  # of an f32 pattern without its sign, the upper 16 bits are kept
_LARGEST_SCALE = 0xFEFF  # the largest finite one


class Quantized(NamedTuple):
  """An array in blocks along its last axis; see `dequantize`.

  It describes itself: codes are signed integers for signed numbers, unsigned ones for non-negative numbers and floats
  for wide ones. The block size, a power of two or the whole axis, follows from the two shapes.

  Attributes:
    values: codes, `int8[*s]`, `uint8[*s]`, `int4[*s]`, `uint4[*s]` or `float8_e4m3fn[*s]`, in the array's shape.
    scales: `uint16[*s[:-1], blocks]`, the f32 patterns of the blocks' largest magnitudes, without sign, upper 16 bits.
  """

  values: jax.Array
  scales: jax.Array


def codes_dtype(bits: int, kind: Kind) -> jnp.dtype:
  """Returns the dtype of the codes. Wide ones have 8 bits, whatever `bits` is."""
  return jnp.dtype({"signed": f"int{bits}", "nonnegative": f"uint{bits}", "wide": jnp.float8_e4m3fn}[kind])


def kind_of(dtype: jnp.dtype) -> Kind:
  """Returns the kind of numbers that codes of a dtype store."""
  if jnp.issubdtype(dtype, jnp.floating):
    return "wide"
  return "signed" if jnp.issubdtype(dtype, jnp.signedinteger) else "nonnegative"


def blocks(length: int, block_size: int) -> int:
  """Returns the number of blocks in an axis of `length`."""
  return -(-length // block_size)


def block_size_of(length: int, count: int) -> int:
  """Returns the block size of an axis of `length` in `count` blocks: a power of two, or `length` for one block."""
  if count <= 1:
    return max(length, 1)
  size = 1
  while blocks(length, size) > count:
    size *= 2
  if blocks(length, size) != count:
    raise ValueError(f"no power of two cuts an axis of {length} into {count} blocks")
  return size


def _top(negative: Any, dtype: jnp.dtype) -> Any:
  """The magnitude of the last code, whose level is 1. Signed codes have one more below zero than above."""
  info = jnp.iinfo(dtype)
  return jnp.where(negative, np.float32(-int(info.min)), np.float32(info.max)) if info.min else np.float32(info.max)


_WHOLE = 1.5 * 2**23  # added to a small number, it leaves the nearest integer in the lower bits of the pattern


def _pattern(x: jax.Array) -> jax.Array:
  """Returns i32[*s], with the integer nearest to `x: f32[*s]`, from -2^22 to 2^22, in its lower bits.

  `astype` would do, but XLA makes it handle NaN and infinities too, which takes several instructions.
  """
  return lax.bitcast_convert_type(x + np.float32(_WHOLE), jnp.int32)


def _greater(x: jax.Array, y: Any) -> jax.Array:
  """The greater of two numbers, none a NaN. XLA:CPU's maximum handles NaN, and takes more than one instruction."""
  return jnp.where(x > y, x, y)


def _unpack_scales(scales: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(scales.astype(jnp.uint32) << _SCALE_SHIFT, jnp.float32)


def _spread(per_block: jax.Array, length: int) -> jax.Array:
  """Repeats `[*s, blocks]` to `[*s, length]`, each entry over its block."""
  *lead, count = per_block.shape
  if count == 1:
    return jnp.broadcast_to(per_block, (*lead, length))
  size = block_size_of(length, count)
  whole = jnp.broadcast_to(per_block[..., None], (*lead, count, size)).reshape(*lead, count * size)
  return whole if count * size == length else lax.slice_in_dim(whole, 0, length, axis=whole.ndim - 1)


def _block_max(x: jax.Array, count: int) -> jax.Array:
  """The largest entry of each block of `x: i32[*s]`, without negative entries -> i32[*s[:-1], count]."""
  *lead, length = x.shape
  if count > 1:
    size = block_size_of(length, count)
    if count * size != length:
      x = lax.pad(x, np.int32(0), [(0, 0, 0)] * len(lead) + [(0, count * size - length, 0)])
    x = x.reshape(*lead, count, size)
    return jnp.max(x, axis=-1)
  return jnp.max(x, axis=-1, keepdims=True)


# Compiled as one call outside of jit, inlined inside.
@functools.partial(jax.jit, inline=True)
def dequantize(stored: Quantized) -> jax.Array:
  """Returns the numbers in `stored`, f32[*s]."""
  codes, dtype = stored.values.astype(jnp.float32), stored.values.dtype
  kind = kind_of(dtype)
  if kind == "wide":
    level = codes * np.float32(1 / _WIDE_TOP)
  elif kind == "signed":
    level = codes / (2 * _top(codes < 0, dtype) - jnp.abs(codes))
  else:
    top = _top(False, dtype)
    size, u = top + np.float32(0.5), codes + np.float32(0.5)
    level = u * u * (2 / size) / (codes + (size + np.float32(0.5)))
  return level * _spread(_unpack_scales(stored.scales), codes.shape[-1])


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def quantize(x: jax.Array, dtype: jnp.dtype, block_size: int) -> Quantized:
  """Rounds `x: f32[*s]`, of one axis or more, to the nearest numbers that codes of `dtype` can store.

  Non-finite entries are taken for zero, and so are negative ones if the codes have no sign.
  """
  count = blocks(x.shape[-1], block_size)
  x = jnp.where(jnp.isfinite(x), x, 0)
  scales = _pack_scales(_largest_magnitude(x, dtype, count), jnp.uint32(1 << (_SCALE_SHIFT - 1)))
  scale = _unpack_scales(scales)
  codes = _encode_wide(x, scale) if kind_of(dtype) == "wide" else _encode(x, scale, dtype)
  return Quantized(codes, scales)


@functools.partial(jax.jit, inline=True)
def largest_of(x: jax.Array, old: Quantized) -> jax.Array:
  """Returns the largest magnitude in each block of what `requantize(x, old, ...)` would store, f32[*s[:-1], blocks].

  It is not finite if an element of the block is not finite.
  """
  return _largest_magnitude(x, old.values.dtype, old.scales.shape[-1])


@functools.partial(jax.jit, static_argnums=3, inline=True)
def requantize(x: jax.Array, old: Quantized, step: jax.Array, salt: int, largest: jax.Array | None = None) -> Quantized:
  """Stores `x: f32[*s]` in the format of `old`, rounded so that values can move by less than a level per step.

  Args:
    x: the new numbers. A block with a non-finite one keeps its codes and scale from `old`.
    old: the state before.
    step: i32[], the step count, which selects the rounding.
    salt: a number for this array, so that not all arrays round alike.
    largest: `largest_of(x, old)`, if it is known already.
  """
  dtype, length = old.values.dtype, x.shape[-1]
  if largest is None:
    largest = jnp.asarray(largest_of(x, old))
  finite = largest < np.float32(np.inf)
  scale_dither = _dither(step, salt, old.scales.shape[-1]) >> (32 - _SCALE_SHIFT)
  scales = _pack_scales(largest, _by_columns(scale_dither, x.ndim))

  # Divided by the exact maximum, not the stored one, so that a block that only decays keeps its codes.
  dither = _dither(step, salt + 1, length)
  if kind_of(dtype) == "wide":
    codes = _encode_wide(x, largest, _by_columns(dither, x.ndim), old.values)
  else:
    dither >>= 24
    ways = _ways((np.float32(255.5) - dither.astype(jnp.float32)) * np.float32(1 / 256), dtype)
    ways = xla_cpu.held(ways, dither.astype(jnp.uint16))  # once per column, not per element
    codes = _encode(x, largest, dtype, _by_columns(ways, x.ndim), old.values)
  return Quantized(jnp.where(_spread(finite, length), codes, old.values), jnp.where(finite, scales, old.scales))


def _largest_magnitude(x: jax.Array, dtype: jnp.dtype, count: int) -> jax.Array:
  """The largest magnitude in each block, f32[*s] -> f32[*s[:-1], count]; not finite if an element is not.

  Patterns of magnitudes, as integers, sort like the magnitudes, with non-finite ones last. XLA:CPU reduces integers in
  the loop that makes them. For floats it calls a library, and has to write them to an array first.
  """
  pattern = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFF_FFFF
  if kind_of(dtype) == "nonnegative":
    pattern = jnp.where((x < 0) & jnp.isfinite(x), 0, pattern)
  return lax.bitcast_convert_type(_block_max(pattern, count), jnp.float32)


def _pack_scales(largest: jax.Array, dither: jax.Array) -> jax.Array:
  pattern = lax.bitcast_convert_type(largest, jnp.uint32)
  return jnp.minimum((pattern + dither) >> _SCALE_SHIFT, _LARGEST_SCALE).astype(jnp.uint16)


def _encode(
  x: jax.Array, scale: jax.Array, dtype: jnp.dtype, ways: Any = None, old: jax.Array | None = None
) -> jax.Array:
  """Returns the codes of `x`, rounded to nearest; those that move by less than one from `old`, rounded by `ways`.

  Args:
    x: the numbers, f32[*s].
    scale: the largest magnitudes of their blocks.
    dtype: the dtype of the codes.
    ways: from `_ways`. A number is rounded up from this fraction, in (0, 1), of the distance between two levels on.
    old: the old codes.
  """
  signed, top = kind_of(dtype) == "signed", _top(x < 0, dtype)
  position = (_signed_position if signed else _nonnegative_position)(x, scale, top)
  lower = jnp.floor(position)
  if not signed:
    lower = _greater(lower, np.float32(0))
  way = _ways(np.float32(0.5), dtype)
  if old is not None:
    way = jnp.where(jnp.abs(lower + np.float32(0.5) - old.astype(jnp.float32)) < 1, ways, way)
  is_past = (_is_past_signed if signed else _is_past_nonnegative)(position - lower, way, lower, top)
  return _pattern(lower + is_past.astype(jnp.float32)).astype(dtype)


_WIDE_TOP = 256  # the code of the largest magnitude: a power of two, so that a value on a level stays there
_WIDE_DROPPED = 20  # bits of an f32 pattern that float8_e4m3fn does not have
_WIDE_FIXED = 2.0**-6  # codes below this lie 2^-9 apart


def _encode_wide(
  x: jax.Array, scale: jax.Array, dither: jax.Array | None = None, old: jax.Array | None = None
) -> jax.Array:
  """Returns wide codes of `x: f32[*s]`, rounded to nearest; those that move by less than one from `old`, by `dither`.

  Nonzero numbers do not become zero. The upper bits of a magnitude's pattern are the number of its code.

  Args:
    x: the numbers.
    scale: the largest magnitudes of their blocks, f32[*s[:-1], blocks].
    dither: u32, by columns, with as many axes as `x`.
    old: the old codes.
  """

  def pattern(magnitude: jax.Array) -> jax.Array:
    fixed = (magnitude + np.float32(_WIDE_FIXED)) * np.float32(0.5)
    return lax.bitcast_convert_type(jnp.where(magnitude < np.float32(_WIDE_FIXED), fixed, magnitude), jnp.int32)

  below = x < 0
  whole = _spread(jnp.maximum(scale, np.finfo(np.float32).tiny), x.shape[-1])
  place = pattern(jnp.minimum(jnp.abs(x) / whole, np.float32(1)) * np.float32(_WIDE_TOP))
  added: Any = np.int32(1 << (_WIDE_DROPPED - 1))
  if old is not None and dither is not None:
    before = old.astype(jnp.float32)
    before = jnp.where((before < 0) == below, jnp.abs(before), 0)
    moved = (place >> _WIDE_DROPPED) - (pattern(before) >> _WIDE_DROPPED)
    proportional = (dither >> np.uint32(32 - _WIDE_DROPPED)).astype(jnp.int32)
    added = jnp.where((moved == 0) | (moved == -1), jnp.broadcast_to(proportional, x.shape), added)
  place = (place + added) >> _WIDE_DROPPED << _WIDE_DROPPED
  code = lax.bitcast_convert_type(place, jnp.float32)
  code = jnp.where(code < np.float32(_WIDE_FIXED), code * np.float32(2) - np.float32(_WIDE_FIXED), code)
  code = jnp.where(x == 0, 0, jnp.maximum(code, np.float32(2.0**-9)))
  return jnp.where(below, -code, code).astype(jnp.float8_e4m3fn)


def _signed_position(x: jax.Array, scale: jax.Array, top: Any) -> jax.Array:
  """The position of `x: f32[*s]` between the levels of signed codes: a fractional code, f32[*s] from -top to top."""
  # Halves of numbers near the f32 maximum do not overflow; `tiny` avoids a division by zero.
  half = _spread(jnp.maximum(scale * np.float32(0.5), np.finfo(np.float32).tiny), x.shape[-1])
  return x / (half + jnp.abs(x) * np.float32(0.5)) * top


def _nonnegative_position(x: jax.Array, scale: jax.Array, top: Any) -> jax.Array:
  """The position of `x: f32[*s]` between the levels of non-negative codes, f32[*s] from -1/2 to top."""
  # Multiplied by the root twice: the reciprocal of the largest scales is subnormal, and XLA:CPU would flush it.
  root = _spread(jnp.where(scale > 0, lax.rsqrt(scale), 0), x.shape[-1])
  level = _greater(x, np.float32(0)) * root * root
  return (level + jnp.sqrt(level * (level + 8))) * ((top + np.float32(0.5)) / 4) - np.float32(0.5)


def _is_past_signed(part: jax.Array, way: Any, lower: jax.Array, top: Any) -> jax.Array:
  """Whether `level(lower + part)` is at least the fraction `way` from `level(lower)` to `level(lower + 1)`.

  No level is computed. The right side is how much the levels curve: away from zero on both sides of it.
  """
  curve = part * (1 - way)
  return (part - way) * (2 * top - jnp.abs(lower)) >= jnp.where(lower < 0, -curve, curve)


def _is_past_nonnegative(part: jax.Array, way: Any, lower: jax.Array, top: np.float32) -> jax.Array:
  """The same for non-negative codes, with `way` from `_ways`."""
  size = top + np.float32(0.5)
  t = lower * (1 / size)  # without the 1/2 / size
  slope = t + (1 + np.float32(0.5) / size)
  rest = (lower + np.float32(0.5)) * (t + (2 + np.float32(0.5) / size))
  return part * (rest + part * slope) >= way * (rest + slope)


def _ways(way: Any, dtype: jnp.dtype) -> Any:
  """Corrects thresholds f32[*s]: `_is_past_nonnegative` neglects that t grows between two levels.

  This growth shortens a way by `way * (1 - way) / (1 + t)` of the growth. It is corrected here, by columns, with one
  number in place of 1 / (1 + t), which lies between 1/2 and 1. The remaining error is 0.06 / top of a level.
  """
  if kind_of(dtype) == "signed":
    return way
  return way - np.float32(0.72) / (_top(False, dtype) + np.float32(0.5)) * (way * (1 - way))


# The two-dimensional Weyl sequence of the plastic number: step times one constant plus column times another, modulo 1.
_STEP, _COLUMN, _SALT = 0xC13F_A9A9, 0x91E1_0DA5, 0x9E37_79B9


def _by_columns(x: jax.Array, ndim: int) -> jax.Array:
  """`[length]` as `[1, ..., length]`, to broadcast over rows."""
  return lax.expand_dims(x, range(ndim - 1))


def _dither(step: jax.Array, salt: int, length: int) -> jax.Array:
  """Returns u32[length], spread evenly over columns and steps."""
  start = step.astype(jnp.uint32) * jnp.uint32(_STEP) + jnp.uint32(salt * _SALT & 0xFFFF_FFFF)
  return start + lax.iota(jnp.uint32, length) * jnp.uint32(_COLUMN)
