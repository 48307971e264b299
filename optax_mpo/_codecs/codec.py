"""What the codecs of all formats share: the dtypes of compensation bits, and integer operations with derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = {4: jnp.dtype(jnp.uint4), 8: jnp.dtype(jnp.uint8), 16: jnp.dtype(jnp.uint16)}


def bits_dtype(bits: int) -> jnp.dtype:
  """Returns the unsigned integer dtype that holds `bits` compensation bits."""
  return _DTYPES[bits]


def dtype_bits(dtype: jnp.dtype) -> int:
  """Returns how many compensation bits a `dtype` holds, or -1 if it is not a dtype of compensation bits."""
  return next((bits for bits, each in _DTYPES.items() if each == dtype), -1)


def operation(derivative: Callable[..., Any], static: tuple[int, ...] = ()) -> Callable[[Any], Any]:
  """Decorates a function: compiled as one call outside of jit, inlined inside, with a derivative.

  Integer operations have no derivative, and JAX silently takes it for zero. The derivatives below pass straight through
  roundings, as `astype` does, and treat the bits as constants.
  """

  def decorate(fun: Any) -> Any:
    fun = jax.custom_jvp(fun, nondiff_argnums=static)
    fun.defjvp(derivative)
    return jax.jit(fun, static_argnums=static, inline=True)

  return decorate


def no_tangent(x: jax.Array) -> Any:
  """The tangent of an integer array."""
  return np.zeros(x.shape, jax.dtypes.float0)
