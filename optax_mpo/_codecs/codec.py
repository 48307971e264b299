"""What the codecs of all formats share: how compensation bits are stored, and derivatives of operations on integers.

Why: integer operations have no derivative, and JAX silently takes it for zero. The derivatives here pass straight
through roundings, as `astype` does, and treat the bits as constants.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ScaledBits(NamedTuple):
  """The compensation bits of a param whose low precision needs scales, such as float8, in the place of its bits.

  Attributes:
    bits: `uint{8,16}[*s]`, in the param's shape.
    scales: `uint8[*s[:-1], blocks]`, one for each block of 32 along the last axis: the scale is 2^(scales - 127), as in
      the dtype `float8_e8m0fnu` of the MX formats. A scalar has one scale, `uint8[1]`.
  """

  bits: jax.Array
  scales: jax.Array


_DTYPES = {4: jnp.dtype(jnp.uint4), 8: jnp.dtype(jnp.uint8), 16: jnp.dtype(jnp.uint16)}


def bits_dtype(bits: int) -> jnp.dtype:
  """Returns the unsigned integer dtype that holds `bits` compensation bits."""
  return _DTYPES[bits]


def dtype_bits(dtype: jnp.dtype) -> int:
  """Returns how many compensation bits a `dtype` holds, or -1 if it is not a dtype of compensation bits."""
  return next((bits for bits, each in _DTYPES.items() if each == dtype), -1)


def describe(kept: Any) -> str:
  """Says which compensation bits a state holds for a leaf, for errors."""
  if isinstance(kept, ScaledBits):
    return f"{dtype_bits(kept.bits.dtype)} compensation bits with scales"
  return "none" if kept is None else f"{dtype_bits(kept.dtype)} compensation bits"


def operation(derivative: Callable[..., Any], static: tuple[int, ...] = ()) -> Callable[[Any], Any]:
  """Decorates a function: compiled as one call outside of jit, inlined inside, with a derivative.

  Args:
    derivative: `derivative(fun, *static, primals, tangents)` is the JVP rule; `fun` is the decorated function.
    static: the indices of the static arguments.
  """

  def decorate(fun: Any) -> Any:
    fun = jax.custom_jvp(fun, nondiff_argnums=static)
    jitted = jax.jit(fun, static_argnums=static, inline=True)
    fun.defjvp(functools.partial(derivative, jitted))
    return jitted

  return decorate


def _split_jvp(split: Any, bits: int, primals: Any, tangents: Any) -> Any:
  low, kept = split(primals[0], bits)
  constant = None if kept is None else np.zeros(kept.shape, jax.dtypes.float0)
  return (low, kept), (tangents[0].astype(low.dtype), constant)


def _join_jvp(join: Any, primals: Any, tangents: Any) -> Any:
  return join(*primals), tangents[0].astype(jnp.float32)


def _round_jvp(round_stochastically: Any, bits: int, primals: Any, tangents: Any) -> Any:
  return round_stochastically(*primals, bits), tangents[0]


split = operation(_split_jvp, static=(1,))
join = operation(_join_jvp)
round_stochastically = operation(_round_jvp, static=(2,))
