"""The levels of 8-bit codes: the numbers that codes stand for, as fractions of their block's largest magnitude.

Why: kinds of state differ in what their small numbers need. A momentum may round to zero. A second moment must not: if
it did and the first moment did not, the update would blow up.

How: levels lie closer together toward zero. There is one class for each kind of state, and `KINDS` lists them.

* **Signed.** t / (2 - |t|) for t = code / 127 or, below zero, code / 128; zero is zero. Encoding takes a division.
* **Non-negative.** 2 t^2 / (1 + t) for t = (code + 1/2) / 255.5. No element is zero in a block that is not all zero.
  Encoding takes a square root.
* **Wide**, for signed numbers whose small values must not become zero: the 8-bit floats of `float8_e4m3fn`, in 256ths
  of the largest, down to 7.6e-6 of it.

Rounding computes no level: the position of a number between two levels, and how much levels curve there, tell which is
nearer.

Source: levels by companding, one kind for each kind of state, follow FlashOptim, arXiv:2602.23349.
"""

import abc
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_mpo._core import xla_cpu

BITS = (4, 8)
"""The supported widths of codes, in bits. Wide ones have 8 bits in both cases."""

Kind = Literal["signed", "nonnegative", "wide"]
Spread = Callable[[jax.Array], jax.Array]
Number = jax.Array | np.float32
Codes = jax.Array | None


class Levels(abc.ABC):
  """The codes of one kind and width.

  Attributes:
    kind: the kind of numbers.
    codes: the name of their dtype, in which `{}` stands for the width. No two kinds share a dtype, since the dtypes and
      shapes of a stored leaf describe it completely.
    has_sign: whether negative numbers count; else they are taken for zero.
    dtype: the dtype.
  """

  kind: Kind
  codes: str
  has_sign = True

  def __init__(self, bits: int) -> None:
    self.dtype = jnp.dtype(self.codes.format(bits))

  @abc.abstractmethod
  def decode(self, codes: jax.Array) -> jax.Array:
    """Returns the levels f32[*s] of `codes: f32[*s]`."""

  @abc.abstractmethod
  def ways(self, dither: jax.Array) -> jax.Array:
    """Returns what `encode` needs of random bits, u32[*s] -> [*s], to round up or down in proportion."""

  @abc.abstractmethod
  def encode(self, x: jax.Array, largest: jax.Array, spread: Spread, ways: Any = None, old: Codes = None) -> jax.Array:
    """Returns the codes of `x: f32[*s]`, rounded to nearest; those that move by less than one from `old`, by `ways`.

    Args:
      x: the numbers.
      largest: the largest magnitudes of their blocks, f32[*s[:-1], blocks].
      spread: repeats `[*s[:-1], blocks]` to `[*s]`, each entry over its block.
      ways: from `ways`.
      old: the old codes.
    """


class _Companded(Levels):
  """Integer codes, whose level is a function of the code."""

  @abc.abstractmethod
  def position(self, x: jax.Array, largest: jax.Array, spread: Spread, top: Number) -> jax.Array:
    """The position of `x: f32[*s]` between the levels: a fractional code, f32[*s]."""

  @abc.abstractmethod
  def is_past(self, part: jax.Array, way: Number, lower: jax.Array, top: Number) -> jax.Array:
    """Whether `level(lower + part)` is at least the fraction `way` from `level(lower)` to `level(lower + 1)`."""

  def top(self, negative: jax.Array | bool) -> Number:
    """The magnitude of the last code, whose level is 1. Signed codes have one more below zero than above."""
    info = jnp.iinfo(self.dtype)
    return jnp.where(negative, np.float32(-int(info.min)), np.float32(info.max)) if info.min else np.float32(info.max)

  def corrected(self, way: Number) -> Any:
    """Makes thresholds for `is_past`, f32[*s]: the fractions, in (0, 1), from which on a number is rounded up."""
    return way

  def ways(self, dither: jax.Array) -> jax.Array:
    dither = dither >> 24
    ways = self.corrected((np.float32(255.5) - dither.astype(jnp.float32)) * np.float32(1 / 256))
    return xla_cpu.held(ways, dither.astype(jnp.uint16))  # once per column, not per element

  def encode(self, x: jax.Array, largest: jax.Array, spread: Spread, ways: Any = None, old: Codes = None) -> jax.Array:
    top = self.top(x < 0)
    position = self.position(x, largest, spread, top)
    lower = jnp.floor(position)
    if not self.has_sign:
      lower = _greater(lower, np.float32(0))
    way = self.corrected(np.float32(0.5))
    if old is not None:
      way = jnp.where(jnp.abs(lower + np.float32(0.5) - old.astype(jnp.float32)) < 1, ways, way)
    is_past = self.is_past(position - lower, way, lower, top)
    return _pattern(lower + is_past.astype(jnp.float32)).astype(self.dtype)


class _Signed(_Companded):
  kind, codes = "signed", "int{}"

  def decode(self, codes: jax.Array) -> jax.Array:
    return codes / (2 * self.top(codes < 0) - jnp.abs(codes))

  def position(self, x: jax.Array, largest: jax.Array, spread: Spread, top: Number) -> jax.Array:
    # Halves of numbers near the f32 maximum do not overflow; `tiny` avoids a division by zero.
    half = spread(jnp.maximum(largest * np.float32(0.5), np.finfo(np.float32).tiny))
    return x / (half + jnp.abs(x) * np.float32(0.5)) * top

  def is_past(self, part: jax.Array, way: Number, lower: jax.Array, top: Number) -> jax.Array:
    curve = part * (1 - way)  # how much the levels curve: away from zero on both sides of it
    return (part - way) * (2 * top - jnp.abs(lower)) >= jnp.where(lower < 0, -curve, curve)


class _Nonnegative(_Companded):
  kind, codes, has_sign = "nonnegative", "uint{}", False

  def decode(self, codes: jax.Array) -> jax.Array:
    size, u = self.top(False) + np.float32(0.5), codes + np.float32(0.5)
    return u * u * (2 / size) / (codes + (size + np.float32(0.5)))

  def position(self, x: jax.Array, largest: jax.Array, spread: Spread, top: Number) -> jax.Array:
    # Multiplied by the root twice: the reciprocal of the largest scales is subnormal, and XLA:CPU would flush it.
    root = spread(jnp.where(largest > 0, lax.rsqrt(largest), 0))
    level = _greater(x, np.float32(0)) * root * root
    return (level + jnp.sqrt(level * (level + 8))) * ((top + np.float32(0.5)) / 4) - np.float32(0.5)

  def is_past(self, part: jax.Array, way: Number, lower: jax.Array, top: Number) -> jax.Array:
    size = top + np.float32(0.5)
    t = lower * (1 / size)  # without the 1/2 / size
    slope = t + (1 + np.float32(0.5) / size)
    rest = (lower + np.float32(0.5)) * (t + (2 + np.float32(0.5) / size))
    return part * (rest + part * slope) >= way * (rest + slope)

  def corrected(self, way: Number) -> Any:
    """Corrects thresholds: `is_past` neglects that t grows between two levels.

    This growth shortens a way by `way * (1 - way) / (1 + t)` of the growth. It is corrected here, by columns, with one
    number in place of 1 / (1 + t), which lies between 1/2 and 1. The remaining error is 0.06 / top of a level.
    """
    return way - np.float32(0.72) / (self.top(False) + np.float32(0.5)) * (way * (1 - way))


_WIDE_TOP = 256  # the code of the largest magnitude: a power of two, so that a value on a level stays there
_WIDE_DROPPED = 20  # bits of an f32 pattern that float8_e4m3fn does not have
_WIDE_FIXED = 2.0**-6  # codes below this lie 2^-9 apart


class _Wide(Levels):
  """Nonzero numbers do not become zero. The upper bits of a magnitude's pattern are the number of its code."""

  kind, codes = "wide", "float8_e4m3fn"

  def decode(self, codes: jax.Array) -> jax.Array:
    return codes * np.float32(1 / _WIDE_TOP)

  def ways(self, dither: jax.Array) -> jax.Array:
    return dither

  def encode(self, x: jax.Array, largest: jax.Array, spread: Spread, ways: Any = None, old: Codes = None) -> jax.Array:
    def pattern(magnitude: jax.Array) -> jax.Array:
      fixed = (magnitude + np.float32(_WIDE_FIXED)) * np.float32(0.5)
      return lax.bitcast_convert_type(jnp.where(magnitude < np.float32(_WIDE_FIXED), fixed, magnitude), jnp.int32)

    below = x < 0
    whole = spread(jnp.maximum(largest, np.finfo(np.float32).tiny))
    place = pattern(jnp.minimum(jnp.abs(x) / whole, np.float32(1)) * np.float32(_WIDE_TOP))
    added = np.int32(1 << (_WIDE_DROPPED - 1))
    if old is not None:
      before = old.astype(jnp.float32)
      before = jnp.where((before < 0) == below, jnp.abs(before), 0)
      moved = (place >> _WIDE_DROPPED) - (pattern(before) >> _WIDE_DROPPED)
      proportional = (ways >> np.uint32(32 - _WIDE_DROPPED)).astype(jnp.int32)
      added = jnp.where((moved == 0) | (moved == -1), jnp.broadcast_to(proportional, x.shape), added)
    place = (place + added) >> _WIDE_DROPPED << _WIDE_DROPPED
    code = lax.bitcast_convert_type(place, jnp.float32)
    code = jnp.where(code < np.float32(_WIDE_FIXED), code * np.float32(2) - np.float32(_WIDE_FIXED), code)
    code = jnp.where(x == 0, 0, jnp.maximum(code, np.float32(2.0**-9)))
    return jnp.where(below, -code, code).astype(self.dtype)


_WHOLE = 1.5 * 2**23  # added to a small number, it leaves the nearest integer in the lower bits of the pattern


def _pattern(x: jax.Array) -> jax.Array:
  """Returns i32[*s], with the integer nearest to `x: f32[*s]`, from -2^22 to 2^22, in its lower bits.

  `astype` would do, but XLA makes it handle NaN and infinities too, which takes several instructions.
  """
  return lax.bitcast_convert_type(x + np.float32(_WHOLE), jnp.int32)


def _greater(x: jax.Array, y: Number) -> jax.Array:
  """The greater of two numbers, none a NaN. XLA:CPU's maximum handles NaN, and takes more than one instruction."""
  return jnp.where(x > y, x, y)


KINDS: dict[Kind, type[Levels]] = {levels.kind: levels for levels in (_Signed, _Nonnegative, _Wide)}
"""The kinds of numbers that have codes."""

_BY_DTYPE = {levels.dtype: levels for levels in (kind(bits) for kind in KINDS.values() for bits in BITS)}


def of(dtype: jnp.dtype) -> Levels:
  """Returns the levels of codes of a dtype."""
  return _BY_DTYPE[jnp.dtype(dtype)]
