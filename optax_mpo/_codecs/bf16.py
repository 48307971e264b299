"""Splits f32 into bf16 plus the bits it cut off, and joins them again.

Why: a bf16 weight drops every update under half an ulp, so mixed-precision training keeps an f32 master weight beside
it. Up to rounding, the two share their sign, exponent and first seven mantissa bits. This module stores those once, as
the bf16 weight, and keeps only the rest.

How: the bit pattern is rounded half away from zero to its upper 16 bits. The rest is kept as a *signed offset* in two's
complement, so that `join` is one shift, one sign extension and one addition. Rounding to even would be ambiguous at
ties (two f32 numbers would give the same pair); truncation would bias every forward pass toward zero. With fewer than
16 bits, the f32 is first rounded the same way to 16 + bits bits. `split` and `join` use only integer operations on the
pattern: XLA may elide a float round trip, and XLA:CPU flushes subnormal numbers.

Source: the layout follows Lewandowski & Kosson, "Memory Efficient Mixed-Precision Optimizers", arXiv:2309.12381. The
idea of a remainder is from NVIDIA Apex's `store_param_remainders`, here without its bug at ties.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._codecs import codec
from optax_mpo._core.annotations import Values

BITS = (0, 4, 8, 16)
"""The supported compensation widths, in bits per parameter."""

CUT = 16
"""The bits of an f32 pattern that bf16 does not have."""

_ALL = 0xFFFF_FFFF
_MAGNITUDE = 0x7FFF_FFFF
_INF = 0x7F80_0000
_NAN = 0x7FC0_0000  # the canonical quiet NaN; its upper half is a bf16 NaN


@codec.split
def split(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array | None]:
  """Splits `x: f32[*s]` into `(low: bf16[*s], kept: uint{bits}[*s])`; `kept` is None where bits is 0.

  With 16 bits, `join` returns every f32 but NaN bit for bit: infinities, -0.0, subnormal numbers, and finite numbers
  that are infinite in bf16. With 8 or 4 bits, `x` is first rounded to the nearest number whose f32 pattern ends in 8 or
  12 zeros (ties away from zero, finite stays finite); `join` returns that number. NaN becomes the canonical quiet NaN.
  """
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  is_nan = (pattern & _MAGNITUDE) > _INF
  if 0 < bits < 16:
    unit = 1 << (16 - bits)
    rounded = (pattern + unit // 2) & jnp.uint32(_ALL ^ (unit - 1))
    overflow = ((rounded & _MAGNITUDE) >= _INF) & ((pattern & _MAGNITUDE) < _INF)
    pattern = jnp.where(overflow, rounded - unit, rounded)
  pattern = jnp.where(is_nan, jnp.uint32(_NAN), pattern)
  low = ((pattern + 0x8000) >> 16).astype(jnp.uint16)
  low = lax.bitcast_convert_type(low, jnp.bfloat16)
  if bits == 0:
    return low, None
  kept = (pattern >> (16 - bits)) & ((1 << bits) - 1)
  return low, kept.astype(codec.bits_dtype(bits))


@codec.round_stochastically
def round_stochastically(x: jax.Array, random: jax.Array, bits: int) -> jax.Array:
  """Rounds `x: f32[*s]` stochastically to a number that `split` with `bits` keeps exactly -> f32[*s].

  The upper bits of `random: u32[*s]` decide. Finite stays finite, and a number that can be kept does not change.
  """
  if bits == 16:
    return x
  dropped = 16 - bits
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  mask = jnp.uint32(_ALL ^ ((1 << dropped) - 1))
  rounded = (pattern + (random >> (32 - dropped))) & mask
  finite = (pattern & _MAGNITUDE) < _INF
  rounded = jnp.where((rounded & _MAGNITUDE) >= _INF, pattern & mask, rounded)
  return lax.bitcast_convert_type(jnp.where(finite, rounded, pattern), jnp.float32)


@codec.join
def join(low: jax.Array, kept: jax.Array | None) -> jax.Array:
  """Joins `(low: bf16[*s], kept: uint{4,8,16}[*s] or None) -> f32[*s]`.

  For every possible pair the result rounds to `low`: bits can refine a weight, but never move it. Pairs that `split`
  does not make (an infinity or a zero with the bits of another number) give `low` itself.
  """
  upper = lax.bitcast_convert_type(low, jnp.uint16).astype(jnp.uint32) << 16
  if kept is None:
    return lax.bitcast_convert_type(upper, jnp.float32)
  bits = codec.dtype_bits(kept.dtype)
  half = 1 << (bits - 1)
  offset = ((kept.astype(jnp.uint32) ^ half) - half) << (16 - bits)  # sign extension, modulo 2^32
  magnitude = upper & _MAGNITUDE
  negative = kept >= jnp.asarray(half, kept.dtype)
  # No magnitude below zero could have been rounded up to zero, and above infinity there is only NaN.
  foreign = jnp.where(magnitude == 0, negative, (magnitude >= _INF) & ~(negative & (magnitude == _INF)))
  return lax.bitcast_convert_type(jnp.where(foreign, upper, upper + offset), jnp.float32)


def widen(low: jax.Array) -> jax.Array:
  """Converts `low: bf16[*s] -> f32[*s]`, exactly and with integer operations only."""
  return join(low, None)


# The rest of this module carries a new weight through `params + updates`.
#
# Optax adds an f32 update to the bf16 weight and casts. u = new - old gives the new weight, except for a few rare
# pairs: for these, no f32 number u has bf16(f32(old) + u) = new. `difference` and `add_difference` share a code for
# these pairs, chosen so that the plain addition of `optax.apply_updates` comes out near the new weight too:
#
# * |old| < 2^-100: the difference may be subnormal, and XLA:CPU flushes it. Also old = inf: a finite master weight that
#   is infinite in bf16. Here u is the new weight itself, marked in its lowest bits. (Unmarked would not do: an update
#   of zero has to mean "stay", since apply_if_finite and MultiSteps send those, and mpo.apply_updates has to add
#   updates that come from elsewhere.)
# * old = 2^e and new = -k 2^(e-24), k odd, k < 256: the new weight has the other sign and is 2^16 times smaller, and
#   u would need 25 bits. Here u = 2 new - old (1 + 2^-15), which no other new weight needs.
#
# No other pairs occur: a new weight is the sum of two f32 numbers, its master and an update. With e the exponent of
# old, such a sum is a multiple of 2^(e-24). The only exception: updates that overflow f32, |new - old| > 3.4e38.
#
# Comparisons with zero read the exponent field: LLVM turns `bits & 0x7FFFFFFF == 0` into a float comparison, which
# takes a subnormal number for zero on XLA:CPU.

_MARK_NORMAL = 1
_MARK_SUBNORMAL = 3  # the new weight's exponent field is 0; the code sets it to 1, so that the code is a normal number


def _is_marked(old: jax.Array) -> jax.Array:
  magnitude = lax.bitcast_convert_type(old, jnp.uint16) & 0x7FFF
  return (magnitude < ((127 - 100) << 7)) | (magnitude == (_INF >> 16))


def _is_power_of_two(old: jax.Array) -> jax.Array:
  return (lax.bitcast_convert_type(old, jnp.uint16) & 0x7F) == 0


def _difference_jvp(difference: codec.Operation, primals: Values, tangents: Values) -> codec.WithTangent:
  return difference(*primals), tangents[1].astype(jnp.float32) - tangents[0].astype(jnp.float32)


@codec.operation(_difference_jvp)
def difference(old: jax.Array, new: jax.Array) -> jax.Array:
  """Returns the update `u: f32[*s]` from `old: bf16[*s]` to `new: bf16[*s]`, for `add_difference`."""
  old32, new32 = widen(old), widen(new)
  u = new32 - old32
  lost = _is_power_of_two(old) & (jnp.abs(new32) < jnp.abs(old32) * 2.0**-16) & (old32 + u != new32)
  u = jnp.where(lost, 2 * new32 - old32 * (1 + 2.0**-15), u)
  pattern = lax.bitcast_convert_type(new32, jnp.uint32)
  exponent = pattern & _INF
  marked = pattern | jnp.where(exponent == 0, jnp.uint32(0x0080_0000 | _MARK_SUBNORMAL), jnp.uint32(_MARK_NORMAL))
  marked = jnp.where(pattern == lax.bitcast_convert_type(old32, jnp.uint32), jnp.uint32(0), marked)
  use_mark = _is_marked(old) & ((exponent < _INF) | (marked == 0))
  return jnp.where(use_mark, lax.bitcast_convert_type(marked, jnp.float32), u)


def _add_difference_jvp(add_difference: codec.Operation, primals: Values, tangents: Values) -> codec.WithTangent:
  return add_difference(*primals), (tangents[0].astype(jnp.float32) + tangents[1]).astype(jnp.bfloat16)


@codec.operation(_add_difference_jvp)
def add_difference(old: jax.Array, u: jax.Array) -> jax.Array:
  """Adds `u: f32[*s]` to `old: bf16[*s]` -> `bf16[*s]`; gives `new` if `u = difference(old, new)`."""
  old32 = widen(old)
  total = old32 + u
  inexact = (lax.bitcast_convert_type(total, jnp.uint32) & 0xFFFF) != 0
  lost = _is_power_of_two(old) & inexact & (jnp.abs(total) < jnp.abs(old32) * 2.0**-14)
  total = jnp.where(lost, (total + old32 * 2.0**-15) * 0.5, total)
  new = lax.bitcast_convert_type(split(total, 0)[0], jnp.uint16)
  pattern = lax.bitcast_convert_type(u, jnp.uint32)
  mark = pattern & 0xFFFF
  subnormal = (mark == _MARK_SUBNORMAL) & ((pattern & _INF) == 0x0080_0000)
  marked = (pattern >> 16).astype(jnp.uint16) & jnp.where(subnormal, jnp.uint16(0xFF7F), jnp.uint16(0xFFFF))
  new = jnp.where(_is_marked(old) & ((mark == _MARK_NORMAL) | subnormal), marked, new)
  new = jnp.where((pattern & _INF) == 0, lax.bitcast_convert_type(old, jnp.uint16), new)
  return lax.bitcast_convert_type(new, jnp.bfloat16)


def reached(old: jax.Array, u: jax.Array, low: jax.Array, kept: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
  """Returns the param that the update `u` leads to from `old`, and its bits: `low`, exactly, and `kept`."""
  return low, kept
