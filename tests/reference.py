"""A reference for the codec, in NumPy float64 arithmetic and without optax_mpo."""

import numpy as np

BF16_MAX = float.fromhex("0x1.fep127")


def round_significand(x: np.ndarray, digits: int, smallest: float) -> np.ndarray:
  """Rounds f32 numbers to `digits` significand bits, ties away from zero, with gradual underflow to `smallest`."""
  wide = x.astype(np.float64)
  exponent = np.frexp(wide)[1]
  place = np.maximum(np.ldexp(1.0, exponent - digits), smallest)
  with np.errstate(invalid="ignore"):
    rounded = np.copysign(np.floor(np.abs(wide) / place + 0.5) * place, wide)
  return np.where(np.isfinite(wide), rounded, wide)


def to_bf16(x: np.ndarray) -> np.ndarray:
  """Rounds f32 to bf16 (8 significand bits, subnormals in units of 2^-133), in float64. Overflow gives infinity."""
  rounded = round_significand(x, 8, 2.0**-133)
  return np.where(np.abs(rounded) > BF16_MAX, np.copysign(np.inf, rounded), rounded)


def to_stored(x: np.ndarray, bits: int) -> np.ndarray:
  """Rounds f32 to bf16 and `bits` compensation bits, in float64. Finite numbers stay finite, except with 0 bits."""
  if bits == 16:
    return x.astype(np.float64)
  if bits == 0:
    return to_bf16(x)
  digits, smallest = 8 + bits, 2.0 ** -(133 + bits)
  largest = (2 - 2.0 ** (1 - digits)) * 2.0**127
  rounded = round_significand(x, digits, smallest)
  return np.where(np.isfinite(x), np.clip(rounded, -largest, largest), rounded)


def to_float8(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rounds finite f32[*s] to float8_e4m3fn and `bits` bits in blocks of 32 along the last axis, all in float64.

  Returns:
    The codes as numbers, the scales [*s] and the master weights.
  """
  count = -(-x.shape[-1] // 32)
  padded = np.pad(np.abs(x.astype(np.float64)), [(0, 0)] * (x.ndim - 1) + [(0, count * 32 - x.shape[-1])])
  largest = padded.reshape(*x.shape[:-1], count, 32).max(-1)
  largest = round_significand(largest, 4 + bits, 0.0)
  scales = np.ldexp(1.0, np.frexp(largest)[1] - 9)
  scales = np.where(largest >= 464 * scales, 2 * scales, scales)
  scales = np.clip(np.where(largest == 0, 0, scales), 2.0**-100, 2.0**119)
  scales = np.repeat(scales, 32, axis=-1)[..., : x.shape[-1]]
  units = round_significand(x / scales, 4 + bits, 2.0 ** -(9 + bits))
  return round_significand(units, 4, 2.0**-9), scales, units * scales
