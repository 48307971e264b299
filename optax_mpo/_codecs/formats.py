"""The low-precision formats behind one interface, `Format`, in a table by dtype.

Each format is a module that has what `Format` lists. A format without scales keeps an array of bits for each param. A
format whose numbers need scales keeps a `ScaledBits`, and has `COMPUTE`, `decode` and `zero_bits` of its own.
"""

import functools
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from optax_mpo._codecs import bf16, codec, float8, fp16
from optax_mpo._core import host, types
from optax_mpo._core.annotations import Shaped

Kept = jax.Array | codec.ScaledBits | None
"""What the state keeps for a param: its bits, its bits and scales, or nothing."""

Bits = TypeVar("Bits")


class Format(Protocol[Bits]):
  """What a module of a format has; shapes are [*s] throughout, `low` is in the format, `kept` None without bits."""

  @property
  def BITS(self) -> tuple[int, ...]:  # noqa: N802
    """The supported widths of compensation bits; 0 is one."""
    ...

  @property
  def CUT(self) -> int:  # noqa: N802
    """How many bits of an f32 pattern the format cuts off. As many compensation bits are exact in its normal range."""
    ...

  def split(self, x: jax.Array, bits: int) -> tuple[jax.Array, Bits]:
    """Splits `x: f32` into `(low, kept)`, with `bits` in each element of `kept`."""
    ...

  def join(self, low: jax.Array, kept: Bits) -> jax.Array:
    """Joins `(low, kept) -> f32`. Every possible pair gives a number that rounds to `low`."""
    ...

  def round_stochastically(self, x: jax.Array, random: jax.Array, bits: int) -> jax.Array:
    """Rounds `x: f32`, by `random: u32`, to a number that `split` keeps as it is -> f32."""
    ...

  def difference(self, old: jax.Array, new: jax.Array) -> jax.Array:
    """The update `u: f32` from `old` to `new`, both in the format."""
    ...

  def add_difference(self, old: jax.Array, u: jax.Array) -> jax.Array:
    """Adds `u: f32` to `old` -> the format."""
    ...

  def reached(self, old: jax.Array, u: jax.Array, low: jax.Array, kept: Bits) -> tuple[jax.Array, Bits]:
    """The param that `u`, the difference of `old` and `low`, leads to when it is added, and its bits."""
    ...


class Scaled(Format[codec.ScaledBits], Protocol):
  """What a module of a format with scales has besides: `low` alone is no weight, and the loss gets another dtype."""

  @property
  def COMPUTE(self) -> np.dtype:  # noqa: N802
    """The dtype that the loss gets."""
    ...

  def decode(self, low: jax.Array, scales: jax.Array) -> jax.Array:
    """The weights that the loss gets, in COMPUTE, exactly."""
    ...

  def zero_bits(self, low: jax.Array, bits: int) -> codec.ScaledBits:
    """Scales of one and bits of zero, for a param that is its own master."""
    ...


_SCALED: dict[np.dtype, Scaled] = {jnp.dtype(jnp.float8_e4m3fn): float8}
_FORMATS: dict[np.dtype, Format[Any]] = {jnp.dtype(jnp.bfloat16): bf16, jnp.dtype(jnp.float16): fp16, **_SCALED}

NAMES = tuple(dtype.name for dtype in _FORMATS)
BITS = tuple(sorted({bits for format in _FORMATS.values() for bits in format.BITS}))
"""The compensation widths that some format supports, in bits per parameter."""


def is_low(leaf: Shaped) -> bool:
  """Whether the dtype of a leaf is one of the formats."""
  return leaf.dtype in _FORMATS


def is_scaled(leaf: Shaped) -> bool:
  """Whether the dtype of a leaf is a format with scales, whose numbers are no weights without them."""
  return leaf.dtype in _SCALED


def compute_dtype(dtype: np.dtype) -> np.dtype:
  """The dtype in which the loss gets params of a dtype: the same, or another if the dtype has scales."""
  return _SCALED[dtype].COMPUTE if dtype in _SCALED else dtype


def gradient_like(leaf: jax.Array) -> jax.Array | jax.ShapeDtypeStruct:
  """An array or type like the gradient of a param: the param itself, unless the loss gets another dtype or memory."""
  dtype = compute_dtype(jnp.result_type(leaf))
  if host.is_on_host(leaf):
    return types.struct(leaf).update(dtype=dtype, memory_space=jax.memory.Space.Device)
  return leaf if dtype == jnp.result_type(leaf) else types.struct(leaf).update(dtype=dtype)


def widths(dtype: DTypeLike) -> tuple[int, ...]:
  """The compensation widths that a format supports."""
  return _FORMATS[jnp.dtype(dtype)].BITS


def is_exact(dtype: DTypeLike, bits: int) -> bool:
  """Whether `bits` compensation bits hold all that a format cuts off, in the range of its normal numbers."""
  return bits >= _FORMATS[jnp.dtype(dtype)].CUT


def add(x: jax.Array, step: jax.Array) -> jax.Array:
  """Adds an update to weights, in the wider of their floating dtypes, whatever promotion JAX allows."""
  floating = [dtype for dtype in (x.dtype, step.dtype) if jnp.issubdtype(dtype, jnp.floating)]
  if not floating or x.dtype == step.dtype or any(jnp.iscomplexobj(a) for a in (x, step)):
    return x + step
  wider = max(floating, key=lambda dtype: jnp.finfo(dtype).bits)
  return x.astype(wider) + step.astype(wider)


def split(x: jax.Array, dtype: DTypeLike, bits: int) -> tuple[jax.Array, Kept]:
  """Splits `x: f32[*s]` into `(low: dtype[*s], kept)`."""
  return _FORMATS[jnp.dtype(dtype)].split(x, bits)


def join(low: jax.Array, kept: Kept) -> jax.Array:
  """Joins `(low[*s], kept) -> f32[*s]`."""
  return _FORMATS[low.dtype].join(low, kept)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def stored(x: jax.Array, dtype: DTypeLike, bits: int) -> tuple[jax.Array, Kept, jax.Array]:
  """Splits `x: f32[*s]` into `(low: dtype[*s], kept)`, and returns them and what `join` makes of them, f32[*s]."""
  low, kept = split(x, dtype, bits)
  return low, kept, join(low, kept)


def widen(low: jax.Array) -> jax.Array:
  """Converts `low[*s] -> f32[*s]`, exactly; in a format with scales, as if all were one."""
  return join(low, None)


def decode(low: jax.Array, scales: jax.Array | None) -> jax.Array:
  """The weights `[*s]` that the loss gets for a param `low[*s]`: the param itself, unless it has scales."""
  return low if scales is None else _SCALED[low.dtype].decode(low, scales)


def zero_bits(low: jax.Array, bits: int) -> Kept:
  """The bits for a param that is its own master."""
  if is_scaled(low):
    return _SCALED[low.dtype].zero_bits(low, bits)
  return jnp.zeros_like(low, dtype=codec.bits_dtype(bits)) if bits else None


def step(old: jax.Array, master: jax.Array, bits: int, random: jax.Array | None) -> tuple[jax.Array, jax.Array, Kept]:
  """Returns the update `f32[*s]` from `old[*s]` to the new `master: f32[*s]`, the new param, and the bits to keep.

  With `random: u32[*s]`, the master is rounded stochastically to what the bits can hold; without, to nearest.
  """
  format = _FORMATS[old.dtype]
  if random is not None:
    master = format.round_stochastically(master, random, bits)
  low, kept = format.split(master, bits)
  update = format.difference(old, low)
  return update, *format.reached(old, update, low, kept)


def difference(old: jax.Array, new: jax.Array) -> jax.Array:
  """The update `f32[*s]` from `old[*s]` to `new[*s]`, as `step` returns it."""
  return _FORMATS[old.dtype].difference(old, new)


def add_difference(old: jax.Array, u: jax.Array) -> jax.Array:
  """Adds `u: f32[*s]` to `old[*s]`, and gives the param of `step` for the update of `step`, unless f32 overflows."""
  return _FORMATS[old.dtype].add_difference(old, u)
