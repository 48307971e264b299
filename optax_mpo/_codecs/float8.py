"""Splits f32 into float8_e4m3fn, scales of blocks and the bits it cut off, and joins them again. Experimental.

Why: a weight in one byte leaves room for more compensation bits. But e4m3 has 4 significand bits and numbers from 2^-9
to 448, with less than 4 bits below 2^-6: weights of size 0.02 need a scale.

How: as in the MX formats, each block of 32 along the last axis has a scale, a power of two. It is the smallest one with
which the block's largest magnitude does not round beyond 448. So scales follow their weights in every step. They are a
function of the master weights alone: no state is lost or gets stuck, and to store a number again changes nothing.

In units of its scale, a master is a number with the 4 exponent bits of e4m3 and `3 + bits` bits of mantissa, subnormal
numbers included. Its pattern is treated as `bf16` treats that of an f32: rounded half away from zero, the upper 7 bits
and the sign are the code, and the lower `bits` bits are the signed offset from it. A code of zero is always +0, and its
offset has the sign of the number.

With 16 bits, a master is right to 2^-20 of itself down to 2^-13 of the block's largest, and to 2^-33 of the largest
below; with 8 bits, to 2^-12 and 2^-25. Scales lie between 2^-100 and 2^119, so that nothing here is subnormal in
f32 or bf16. What is not finite becomes NaN, since e4m3fn has no infinity.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification v1.0", 2023, for blocks of e4m3 with scales
of 8 exponent bits. There the largest may round beyond 448 and is clipped; here the scale is then twice as large.
"""

from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_mpo._codecs import blocks, codec
from optax_mpo._codecs.codec import ScaledBits

BITS = (8, 16)
"""The supported compensation widths, in bits per parameter."""

CUT = 20
"""The bits of an f32 pattern that e4m3 does not have."""

COMPUTE = jnp.dtype(jnp.bfloat16)
"""The dtype of decoded weights. It holds every product of a code and a scale exactly."""

BLOCK = 32
"""The elements of a block."""

_MAGNITUDE, _INF, _NAN = 0x7FFF_FFFF, 0x7F80_0000, 0x7FC0_0000
_ONE = 127  # the stored scale that stands for 1
_SMALLEST, _LARGEST = _ONE - 100, _ONE + 119
_LOW_TOP, _LOW_NAN = 0x7E, 0x7F  # the codes of 448 and NaN
_BEYOND = 0x0068_0000  # the mantissa of 464, which rounds to 480


def _refuse(fun: object, *_: object) -> NoReturn:
  raise TypeError(
    "float8_e4m3fn params cannot be differentiated: a derivative would have their dtype, without their scales. "
    "Differentiate with respect to decoded weights, jax.grad(loss_fn)(optax_mpo.decoded(params, opt_state), ...), or "
    "train with optax_mpo.value_and_update. A whole step can be differentiated with bfloat16 or float16 params."
  )


def _scales(x: jax.Array, bits: int, up: bool = False) -> jax.Array:
  """The scales of blocks, i32[*s[:-1], blocks], of `x: f32[*s]`, whose largest is rounded to nearest or up."""
  *lead, length = x.shape
  pattern = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
  if not length:
    return jnp.full((*lead, 1), _SMALLEST, jnp.int32)
  largest = blocks.block_max(jnp.where(pattern < _INF, pattern, 0), blocks.blocks(length, BLOCK))
  dropped = CUT - bits
  largest = (largest + ((1 << dropped) - 1 if up else 1 << dropped >> 1)) >> dropped << dropped
  return jnp.clip(((largest + (0x0080_0000 - _BEYOND)) >> 23) - 8, _SMALLEST, _LARGEST)


def _patterns(x: jax.Array, scale: jax.Array, bits: int, random: jax.Array | None = None) -> jax.Array:
  """The magnitudes of `x: f32[*s]` in units of `scale: i32[*s]`, as e4m3 patterns with `bits` more bits, i32[*s]."""
  dropped = CUT - bits
  magnitude = lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
  if random is None:
    added: jax.Array = jnp.int32(1 << dropped >> 1)
  else:
    added = (random >> (32 - dropped)).astype(jnp.int32)
  normal = ((magnitude + added) >> dropped) - ((scale - 7) << (CUT - 17 + bits))

  # Below 2^-6 of the scale: whole units of 2^-(9 + bits) of it, which an f32 can count exactly.
  limit = lax.bitcast_convert_type((scale - 6) << 23, jnp.float32)
  unit = lax.bitcast_convert_type((9 + bits + 2 * _ONE - scale) << 23, jnp.float32)
  scaled = jnp.minimum(jnp.abs(x), limit) * unit
  whole = jnp.floor(scaled)
  way = 0.5 if random is None else ((random >> 16).astype(jnp.float32) + 0.5) * 2.0**-16
  past = scaled - whole >= way
  fixed = (whole + past.astype(jnp.float32)).astype(jnp.int32)
  found = jnp.where((magnitude >> 23) < scale - 6, fixed, normal)
  return jnp.minimum(found, (_LOW_TOP << bits) + max((1 << bits >> 1) - 1, 0))


def _numbers(patterns: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
  """The numbers f32[*s] that `_patterns` made these patterns of."""
  normal = (patterns << (CUT - bits)) + ((scale - 7) << 23)
  unit = lax.bitcast_convert_type((scale - 9 - bits) << 23, jnp.float32)
  fixed = lax.bitcast_convert_type(patterns.astype(jnp.float32) * unit, jnp.int32)
  return lax.bitcast_convert_type(jnp.where(patterns < 1 << (3 + bits), fixed, normal), jnp.float32)


def _codes(x: jax.Array, patterns: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
  """The codes f8[*s] and the offsets i32[*s], modulo 2^bits, of the numbers `x` with these patterns."""
  pattern = lax.bitcast_convert_type(x, jnp.int32)
  code = (patterns + (1 << bits >> 1)) >> bits
  offset = jnp.where((code == 0) & (pattern < 0), -patterns, patterns) & ((1 << bits) - 1)
  is_finite = (pattern & _MAGNITUDE) < _INF
  code = jnp.where((pattern < 0) & (code != 0), code | 0x80, code)
  low = jnp.where(is_finite, code, _LOW_NAN).astype(jnp.uint8)
  return lax.bitcast_convert_type(low, jnp.float8_e4m3fn), jnp.where(is_finite, offset, 0)


def _with_an_axis(x: jax.Array) -> jax.Array:
  return x if x.ndim else x.reshape(1)


@codec.operation(_refuse, static=(1,))
def split(x: jax.Array, bits: int) -> tuple[jax.Array, ScaledBits]:
  """Splits `x: f32[*s]` into `(low: f8[*s], ScaledBits(uint{bits}[*s], uint8[*s[:-1], blocks]))`.

  `low` times its block's scale is `x` rounded to e4m3, ties away from zero, after rounding `x` to what the bits hold.
  """
  shape, x = x.shape, _with_an_axis(x)
  scales = _scales(x, bits)
  low, offset = _codes(x, _patterns(x, blocks.spread(scales, x.shape[-1]), bits), bits)
  kept = offset.astype(codec.bits_dtype(bits))
  return low.reshape(shape), ScaledBits(kept.reshape(shape), scales.astype(jnp.uint8))


@codec.operation(_refuse)
def join(low: jax.Array, kept: ScaledBits | None) -> jax.Array:
  """Joins `(low: f8[*s], ScaledBits(uint{8,16}[*s], uint8[*s[:-1], blocks])) -> f32[*s]`.

  For every possible triple the result rounds to `low` in units of the scale. Without bits, the result is `low` in units
  of 1.
  """
  if kept is None:
    return low.astype(jnp.float32)
  shape, low, bits = low.shape, _with_an_axis(low), codec.dtype_bits(kept.bits.dtype)
  scale = blocks.spread(jnp.clip(kept.scales.astype(jnp.int32), _SMALLEST, _LARGEST), low.shape[-1])
  half = 1 << (bits - 1)
  offset = (_with_an_axis(kept.bits).astype(jnp.int32) ^ half) - half
  pattern = lax.bitcast_convert_type(low, jnp.uint8).astype(jnp.int32)
  code, negative = pattern & 0x7F, pattern >= 0x80
  offset = jnp.where((code == 0) & (offset == -half), 0, offset)  # `split` never makes this
  negative = jnp.where(code == 0, offset < 0, negative)
  magnitude = _numbers(jnp.abs((code << bits) + offset), scale, bits)
  number = lax.bitcast_convert_type(magnitude, jnp.int32) | jnp.where(negative, np.int32(-1 << 31), 0)
  return lax.bitcast_convert_type(jnp.where(code == _LOW_NAN, _NAN, number), jnp.float32).reshape(shape)


@codec.operation(_refuse, static=(2,))
def round_stochastically(x: jax.Array, random: jax.Array, bits: int) -> jax.Array:
  """Rounds `x: f32[*s]` stochastically to a number that `split` with `bits` keeps exactly -> f32[*s].

  The upper bits of `random: u32[*s]` decide. A number that can be kept does not change, and finite stays finite.
  """
  shape, x, random = x.shape, _with_an_axis(x), _with_an_axis(random)
  scale = blocks.spread(_scales(x, bits, up=True), x.shape[-1])
  magnitude = lax.bitcast_convert_type(_numbers(_patterns(x, scale, bits, random), scale, bits), jnp.int32)
  pattern = lax.bitcast_convert_type(x, jnp.int32)
  rounded = jnp.where((pattern & _MAGNITUDE) < _INF, magnitude | (pattern & ~_MAGNITUDE), pattern)
  return lax.bitcast_convert_type(rounded, jnp.float32).reshape(shape)


@codec.operation(_refuse)
def decode(low: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns the weights that a loss gets, bf16[*s]: `low: f8[*s]` times its block's scale, exactly.

  `scales` are those of a `ScaledBits`, `uint8[*s[:-1], blocks]`.
  """
  shape, low = low.shape, _with_an_axis(low)
  scales = jnp.clip(scales, _SMALLEST, _LARGEST).astype(jnp.uint16) << 7
  scales = blocks.spread(lax.bitcast_convert_type(scales, jnp.bfloat16), low.shape[-1])
  return (low.astype(jnp.bfloat16) * scales).reshape(shape)


def zero_bits(low: jax.Array, bits: int) -> ScaledBits:
  """Returns the bits and scales of `low: f8[*s]` as the master weight that it is in units of 1."""
  *lead, length = low.shape or (1,)
  scales = jnp.full((*lead, max(blocks.blocks(length, BLOCK), 1)), _ONE, jnp.uint8)
  return ScaledBits(jnp.zeros_like(low, dtype=codec.bits_dtype(bits)), scales)


# Updates are differences of codes, in units of 1: f32 holds each of them exactly, and they need no scale to be added.


def difference(old: jax.Array, new: jax.Array) -> jax.Array:
  """Returns the update `u: f32[*s]` from `old: f8[*s]` to `new: f8[*s]`, of the codes without their scales."""
  return new.astype(jnp.float32) - old.astype(jnp.float32)


def add_difference(old: jax.Array, u: jax.Array) -> jax.Array:
  """Adds `u: f32[*s]` to `old: f8[*s]` -> `f8[*s]`; gives `new` if `u = difference(old, new)`."""
  total = old.astype(jnp.float32) + u
  return _codes(total, _patterns(total, jnp.full(total.shape, _ONE, jnp.int32), 0), 0)[0]


def reached(old: jax.Array, u: jax.Array, low: jax.Array, kept: ScaledBits) -> tuple[jax.Array, ScaledBits]:
  """Returns the param that the update `u` leads to from `old`, and its bits: `low`, exactly, and `kept`."""
  return low, kept
