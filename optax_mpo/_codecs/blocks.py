"""Stores optimizer state in 8 bits, by blocks: `f32[*s]` <-> 8-bit codes and one 16-bit scale per block.

Why: two f32 moments are 8 of the 12 bytes that AdamW holds per parameter. They do not need the precision of f32 nor,
within a row of weights, its range.

How: the last axis is cut into blocks. Each block is divided by its largest magnitude, the *scale*, and every element
becomes one of 256 levels (`levels`), which lie closer together toward zero. Only the last axis is ever reshaped, so
that leaves stay sharded and stacks of layers stay stacks.

* **Scales** are f32 patterns rounded to 16 bits: no sign, 8 bits of exponent, 8 of mantissa. That is bf16 with the sign
  bit, which a magnitude does not need, spent on precision. The range is that of f32.
* **No value gets stuck.** A moment that decays by 0.1% per step moves by less than half a level, and a 16-bit scale by
  less than half an ulp: rounding to nearest would undo every such step. So scales, and values that move by less than
  one level, are rounded up or down in proportion (that is, without bias), by a low-discrepancy sequence in step and
  column. Larger moves are rounded to nearest. A value on a level stays there: storing it again changes nothing.
* **Non-finite values are not stored.** A block with a non-finite element keeps its old state.

Source: blocks with one scale each follow Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
arXiv:2110.02861.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_mpo._codecs import levels

_SCALE_SHIFT = 15  # of an f32 pattern without its sign, the upper 16 bits are kept
_LARGEST_SCALE = 0xFEFF  # the largest finite one


class Quantized(NamedTuple):
  """An array in blocks along its last axis; see `dequantize`.

  It describes itself: codes of each kind have a dtype of their own. The block size, a power of two or the whole axis,
  follows from the two shapes.

  Attributes:
    values: codes, `int8[*s]`, `uint8[*s]`, `int4[*s]`, `uint4[*s]` or `float8_e4m3fn[*s]`, in the array's shape.
    scales: `uint16[*s[:-1], blocks]`, the f32 patterns of the blocks' largest magnitudes, without sign, upper 16 bits.
  """

  values: jax.Array
  scales: jax.Array


def is_quantized(x: object) -> bool:
  """Whether `x` is a `Quantized`."""
  return isinstance(x, Quantized)


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


def _unpack_scales(scales: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(scales.astype(jnp.uint32) << _SCALE_SHIFT, jnp.float32)


def spread(per_block: jax.Array, length: int) -> jax.Array:
  """Repeats `[*s, blocks]` to `[*s, length]`, each entry over its block."""
  *lead, count = per_block.shape
  if count == 1:
    return jnp.broadcast_to(per_block, (*lead, length))
  size = block_size_of(length, count)
  whole = jnp.broadcast_to(per_block[..., None], (*lead, count, size)).reshape(*lead, count * size)
  return whole if count * size == length else lax.slice_in_dim(whole, 0, length, axis=whole.ndim - 1)


def block_max(x: jax.Array, count: int) -> jax.Array:
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
  codes = stored.values.astype(jnp.float32)
  level = levels.of(stored.values.dtype).decode(codes)
  return level * spread(_unpack_scales(stored.scales), codes.shape[-1])


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def quantize(x: jax.Array, dtype: jnp.dtype, block_size: int) -> Quantized:
  """Rounds `x: f32[*s]`, of one axis or more, to the nearest numbers that codes of `dtype` can store.

  Non-finite entries are taken for zero, and so are negative ones if the codes have no sign.
  """
  count = blocks(x.shape[-1], block_size)
  x = jnp.where(jnp.isfinite(x), x, 0)
  scales = _pack_scales(_largest_magnitude(x, dtype, count), jnp.uint32(1 << (_SCALE_SHIFT - 1)))
  codes = levels.of(dtype).encode(x, _unpack_scales(scales), functools.partial(spread, length=x.shape[-1]))
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
  ways = _by_columns(levels.of(dtype).ways(dither), x.ndim)
  codes = levels.of(dtype).encode(x, largest, functools.partial(spread, length=length), ways, old.values)
  return Quantized(jnp.where(spread(finite, length), codes, old.values), jnp.where(finite, scales, old.scales))


def _largest_magnitude(x: jax.Array, dtype: jnp.dtype, count: int) -> jax.Array:
  """The largest magnitude in each block, f32[*s] -> f32[*s[:-1], count]; not finite if an element is not.

  Patterns of magnitudes, as integers, sort like the magnitudes, with non-finite ones last. XLA:CPU reduces integers in
  the loop that makes them. For floats it calls a library, and has to write them to an array first.
  """
  pattern = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFF_FFFF
  if not levels.of(dtype).has_sign:
    pattern = jnp.where((x < 0) & jnp.isfinite(x), 0, pattern)
  return lax.bitcast_convert_type(block_max(pattern, count), jnp.float32)


def _pack_scales(largest: jax.Array, dither: jax.Array) -> jax.Array:
  pattern = lax.bitcast_convert_type(largest, jnp.uint32)
  return jnp.minimum((pattern + dither) >> _SCALE_SHIFT, _LARGEST_SCALE).astype(jnp.uint16)


# The two-dimensional Weyl sequence of the plastic number: step times one constant plus column times another, modulo 1.
_STEP, _COLUMN, _SALT = 0xC13F_A9A9, 0x91E1_0DA5, 0x9E37_79B9


def _by_columns(x: jax.Array, ndim: int) -> jax.Array:
  """`[length]` as `[1, ..., length]`, to broadcast over rows."""
  return lax.expand_dims(x, range(ndim - 1))


def _dither(step: jax.Array, salt: int, length: int) -> jax.Array:
  """Returns u32[length], spread evenly over columns and steps."""
  start = step.astype(jnp.uint32) * jnp.uint32(_STEP) + jnp.uint32(salt * _SALT & 0xFFFF_FFFF)
  return start + lax.iota(jnp.uint32, length) * jnp.uint32(_COLUMN)
