"""Splits f32 into fp16 plus the bits it cut off, and joins them again: `bf16` for the other half precision.

Why: GPUs before Ampere have fast fp16 and no bf16; the V100 runs of the paper cited in `bf16` use it. fp16 has 11
significand bits, 13 fewer than f32, and a narrow range: below 2^-14 it loses significand bits one by one.

How: from 2^-14 on, as in `bf16`, the bit pattern is rounded half away from zero to its upper 19 bits, and the signed
offset is kept. 13 bits hold all of it; with fewer, the lowest 13 - bits bits are rounded off first. Below 2^-14, fp16
is a fixed-point format in units of 2^-24, and the bits hold the distance in units of 2^-(24 + bits). Beside a zero they
have the sign of the number, since an addition that ends in zero gives 0.0 and never -0.0.

With 16 bits, every f32 of magnitude 2^-17 (7.6e-6) to 65504 comes back bit for bit, and a smaller one to within 2^-41
(4.5e-13). With 8 bits, the error is at most 2^-19 of a number, or 2^-33 (1.2e-10) below 2^-14. Numbers that round to
infinity in fp16, from 65520 on, are infinite in the master too: fp16 training that gets there has diverged.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._codecs import codec

BITS = (0, 4, 8, 16)
"""The supported compensation widths, in bits per parameter."""

CUT = 13
"""The bits of an f32 pattern that fp16 does not have."""

_MAGNITUDE = 0x7FFF_FFFF
_INF = 0x7F80_0000
_REBIAS = (127 - 15) << 10  # from the exponent bias of f32 to that of fp16, in patterns with 10 bits of mantissa
_SMALLEST_NORMAL = (127 - 14) << 23
_OVERFLOW = (127 + 15) << 23 | 0x7F_F000  # 65520, which rounds to infinity
_LOW_SMALLEST_NORMAL, _LOW_INF, _LOW_NAN = 0x0400, 0x7C00, 0x7E00


@codec.split
def split(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array | None]:
  """Splits `x: f32[*s]` into `(low: f16[*s], kept: uint{bits}[*s])`; `kept` is None where bits is 0.

  `low` is `x` rounded to fp16, ties away from zero (with 8 or 4 bits, after rounding `x` to what those hold).
  """
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  magnitude = pattern & _MAGNITUDE
  dropped = max(CUT - bits, 0)

  # From 2^-14 on: the pattern, rounded to what the bits can hold, then to the nearest multiple of 2^13.
  rounded = magnitude
  if 0 < bits < CUT:
    rounded = (magnitude + (1 << (dropped - 1))) >> dropped << dropped
  normal = (rounded + (1 << (CUT - 1))) >> CUT
  normal_offset = (rounded.astype(jnp.int32) - (normal << CUT).astype(jnp.int32)) >> dropped

  # Below: whole units of 2^-(24 + bits), which an f32 can count exactly.
  scaled = jnp.minimum(jnp.abs(x), 2.0**-14) * jnp.float32(2.0 ** (24 + bits))
  units = jnp.floor(scaled)
  units = (units + (scaled - units >= 0.5).astype(jnp.float32)).astype(jnp.int32)
  fixed = (units + (1 << bits >> 1)) >> bits
  fixed_offset = units - (fixed << bits)
  fixed_offset = jnp.where((fixed == 0) & (pattern >> 31 == 1), -fixed_offset, fixed_offset)

  is_fixed = magnitude < _SMALLEST_NORMAL
  low = jnp.where(is_fixed, fixed.astype(jnp.uint32), jnp.minimum(normal - _REBIAS, _LOW_INF))
  is_infinite = ~is_fixed & (low == _LOW_INF)
  low = jnp.where(magnitude > _INF, jnp.uint32(_LOW_NAN), low)
  offset = jnp.where(is_infinite | (magnitude > _INF), 0, jnp.where(is_fixed, fixed_offset, normal_offset))
  low = low | jnp.where(magnitude > _INF, jnp.uint32(0), pattern >> 31 << 15)
  low = lax.bitcast_convert_type(low.astype(jnp.uint16), jnp.float16)
  if bits == 0:
    return low, None
  return low, (offset & ((1 << bits) - 1)).astype(codec.bits_dtype(bits))


@codec.join
def join(low: jax.Array, kept: jax.Array | None) -> jax.Array:
  """Joins `(low: f16[*s], kept: uint{4,8,16}[*s] or None) -> f32[*s]`.

  For every possible pair the result rounds to `low`. Pairs that `split` does not make give `low` itself.
  """
  pattern = lax.bitcast_convert_type(low, jnp.uint16).astype(jnp.uint32)
  sign, magnitude = pattern >> 15 << 31, pattern & 0x7FFF
  bits = 0 if kept is None else codec.dtype_bits(kept.dtype)
  offset = jnp.zeros(low.shape, jnp.int32)
  if kept is not None and bits:
    half = 1 << (bits - 1)
    offset = (kept.astype(jnp.int32) ^ half) - half
    offset = jnp.where((magnitude == 0) & (offset == -half), 0, offset)  # `split` never makes this
  is_fixed = (magnitude < _LOW_SMALLEST_NORMAL) | ((magnitude == _LOW_SMALLEST_NORMAL) & (offset < 0))
  dropped, limit = max(CUT - bits, 0), 1 << (CUT - 1)

  moved = offset << dropped
  moved = jnp.where((moved >= limit) | (moved < -limit), 0, moved)  # bits of another number
  normal = ((magnitude + _REBIAS) << CUT) + moved.astype(jnp.uint32)
  special = jnp.where(magnitude > _LOW_INF, jnp.uint32(0x7FC0_0000), jnp.uint32(_INF))
  normal = jnp.where(magnitude >= _LOW_INF, special, normal)

  units = jnp.where(is_fixed, (magnitude.astype(jnp.int32) << bits) + offset, 0)
  sign = jnp.where((magnitude == 0) & (units != 0), (units < 0).astype(jnp.uint32) << 31, sign)
  units = jnp.abs(units)
  fixed = lax.bitcast_convert_type(units.astype(jnp.float32) * jnp.float32(2.0 ** -(24 + bits)), jnp.uint32)
  return lax.bitcast_convert_type(jnp.where(is_fixed, fixed, normal) | sign, jnp.float32)


def widen(low: jax.Array) -> jax.Array:
  """Converts `low: f16[*s] -> f32[*s]`, exactly."""
  return join(low, None)


@codec.round_stochastically
def round_stochastically(x: jax.Array, random: jax.Array, bits: int) -> jax.Array:
  """Rounds `x: f32[*s]` stochastically to a number that `split` with `bits` keeps exactly -> f32[*s].

  The upper bits of `random: u32[*s]` decide. A number in the range of fp16 stays there, and a number that can be kept
  does not change.
  """
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  magnitude = pattern & _MAGNITUDE
  dropped = max(CUT - bits, 0)
  normal = pattern
  if dropped:
    normal = (pattern + (random >> (32 - dropped))) >> dropped << dropped
    normal = jnp.where((normal & _MAGNITUDE) >= _OVERFLOW, pattern >> dropped << dropped, normal)
    normal = jnp.where(magnitude >= _OVERFLOW, pattern, normal)
  scaled = jnp.minimum(jnp.abs(x), 2.0**-14) * jnp.float32(2.0 ** (24 + bits))
  units = jnp.floor(scaled)
  up = (scaled - units) * 2.0**16 > (random >> 16).astype(jnp.float32)
  fixed = (units + up.astype(jnp.float32)) * jnp.float32(2.0 ** -(24 + bits))
  fixed = lax.bitcast_convert_type(fixed, jnp.uint32) | (pattern & ~jnp.uint32(_MAGNITUDE))
  return lax.bitcast_convert_type(jnp.where(magnitude < _SMALLEST_NORMAL, fixed, normal), jnp.float32)


def difference(old: jax.Array, new: jax.Array) -> jax.Array:
  """Returns the update `u: f32[*s]` from `old: f16[*s]` to `new: f16[*s]`; see `reached`."""
  return widen(new) - widen(old)


def add_difference(old: jax.Array, u: jax.Array) -> jax.Array:
  """Adds `u: f32[*s]` to `old: f16[*s]` -> `f16[*s]`."""
  return split(widen(old) + u, 0)[0]


def reached(old: jax.Array, u: jax.Array, low: jax.Array, kept: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  """Returns the param that results from adding `u: f32[*s]`, the update to `low: f16[*s]`, to `old`, and its bits.

  The difference of two fp16 numbers of very different size may need more than 24 bits. Then the addition misses `low`
  by up to 2^-25 of `old`. The bits were made for `low`, so they are cleared, and the resulting param becomes its own
  master. This takes an update that makes a weight about a thousand times smaller.
  """
  result = add_difference(old, u)
  if kept is None:
    return result, None
  hit = (result == low) | ~jnp.isfinite(widen(low))
  return result, jnp.where(hit, kept, jnp.zeros_like(kept))
