"""The low-precision formats, bf16 and fp16, behind one set of names."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from optax_mpo._codecs import bf16, fp16


class Codec(Protocol):
  """What a module of a format has; shapes are [*s] throughout, `low` is in the format, `kept` None without bits."""

  @property
  def BITS(self) -> tuple[int, ...]:  # noqa: N802
    """The supported widths of compensation bits; 0 is one."""
    ...

  @property
  def CUT(self) -> int:  # noqa: N802
    """How many bits of an f32 pattern the format cuts off. As many compensation bits are exact in its normal range."""
    ...

  def split(self, x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array | None]:
    """Splits `x: f32` into `(low, kept: uint{bits})`."""
    ...

  def join(self, low: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Joins `(low, kept) -> f32`."""
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

  def reached(
    self, old: jax.Array, u: jax.Array, low: jax.Array, kept: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """The param that `u`, the difference of `old` and `low`, leads to when it is added, and its bits."""
    ...


_CODECS: dict[Any, Codec] = {jnp.dtype(jnp.bfloat16): bf16, jnp.dtype(jnp.float16): fp16}

NAMES = tuple(dtype.name for dtype in _CODECS)
BITS = tuple(sorted({bits for codec in _CODECS.values() for bits in codec.BITS}))
"""The compensation widths that some format supports, in bits per parameter."""


def is_low(leaf: Any) -> bool:
  """Whether the dtype of a leaf is one of the formats."""
  return leaf.dtype in _CODECS


def widths(dtype: Any) -> tuple[int, ...]:
  """The compensation widths that a format supports."""
  return _CODECS[jnp.dtype(dtype)].BITS


def is_exact(dtype: Any, bits: int) -> bool:
  """Whether `bits` compensation bits hold all that a format cuts off, in the range of its normal numbers."""
  return bits >= _CODECS[jnp.dtype(dtype)].CUT


def add(x: jax.Array, step: jax.Array) -> jax.Array:
  """Adds an update to weights, in the wider of their floating dtypes, whatever promotion JAX allows."""
  floating = [dtype for dtype in (x.dtype, step.dtype) if jnp.issubdtype(dtype, jnp.floating)]
  if not floating or x.dtype == step.dtype or any(jnp.iscomplexobj(a) for a in (x, step)):
    return x + step
  wider = max(floating, key=lambda dtype: jnp.finfo(dtype).bits)
  return x.astype(wider) + step.astype(wider)


def split(x: jax.Array, dtype: Any, bits: int) -> tuple[jax.Array, jax.Array | None]:
  """Splits `x: f32[*s]` into `(low: dtype[*s], kept: uint{bits}[*s] or None)`."""
  return _CODECS[jnp.dtype(dtype)].split(x, bits)


def join(low: jax.Array, kept: jax.Array | None) -> jax.Array:
  """Joins `(low[*s], kept: uint{4,8,16}[*s] or None) -> f32[*s]`."""
  return _CODECS[low.dtype].join(low, kept)


def widen(low: jax.Array) -> jax.Array:
  """Converts `low[*s] -> f32[*s]`, exactly."""
  return join(low, None)


def step(
  old: jax.Array, master: jax.Array, bits: int, random: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns the update `f32[*s]` from `old[*s]` to the new `master: f32[*s]`, the new param, and the bits to keep.

  With `random: u32[*s]`, the master is rounded stochastically to what the bits can hold; without, to nearest.
  """
  codec = _CODECS[old.dtype]
  if random is not None:
    master = codec.round_stochastically(master, random, bits)
  low, kept = codec.split(master, bits)
  update = codec.difference(old, low)
  return update, *codec.reached(old, update, low, kept)


def difference(old: jax.Array, new: jax.Array) -> jax.Array:
  """The update `f32[*s]` from `old[*s]` to `new[*s]`, as `step` returns it."""
  return _CODECS[old.dtype].difference(old, new)


def add_difference(old: jax.Array, u: jax.Array) -> jax.Array:
  """Adds `u: f32[*s]` to `old[*s]`, and gives the param of `step` for the update of `step`, unless f32 overflows."""
  return _CODECS[old.dtype].add_difference(old, u)
