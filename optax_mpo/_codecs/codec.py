"""What the codecs of all formats share: how compensation bits are stored, and derivatives of operations on integers.

Why: integer operations have no derivative, and JAX silently takes it for zero. The derivatives here pass straight
through roundings, as `astype` does, and treat the bits as constants.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_mpo._core.annotations import PyTree, Values

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Operation = Callable[..., jax.Array]
WithTangent = tuple[PyTree, PyTree]
"""What a JVP rule returns: a result and its tangent."""


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


def describe(kept: PyTree) -> str:
  """Says which compensation bits a state holds for a leaf, for errors."""
  if isinstance(kept, ScaledBits):
    return f"{dtype_bits(kept.bits.dtype)} compensation bits with scales"
  return "none" if kept is None else f"{dtype_bits(kept.dtype)} compensation bits"


def operation(
  derivative: Callable[..., WithTangent], static: tuple[int, ...] = ()
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
  """Decorates a function: compiled as one call outside of jit, inlined inside, with a derivative.

  Args:
    derivative: `derivative(fun, *static, primals, tangents)` is the JVP rule; `fun` is the decorated function.
    static: the indices of the static arguments.
  """

  def decorate(fun: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    fun = jax.custom_jvp(fun, nondiff_argnums=static)
    jitted = jax.jit(fun, static_argnums=static, inline=True)
    fun.defjvp(functools.partial(derivative, jitted))
    return jitted

  return decorate


def _split_jvp(split: Callable[..., PyTree], bits: int, primals: Values, tangents: Values) -> WithTangent:
  low, kept = split(primals[0], bits)
  constant = None if kept is None else np.zeros(kept.shape, jax.dtypes.float0)
  return (low, kept), (tangents[0].astype(low.dtype), constant)


def _join_jvp(join: Operation, primals: Values, tangents: Values) -> WithTangent:
  return join(*primals), tangents[0].astype(jnp.float32)


def _round_jvp(round_stochastically: Operation, bits: int, primals: Values, tangents: Values) -> WithTangent:
  return round_stochastically(*primals, bits), tangents[0]


split = operation(_split_jvp, static=(1,))
join = operation(_join_jvp)
round_stochastically = operation(_round_jvp, static=(2,))
