"""The types of arrays: shape, dtype and, where a mesh has explicit or manual axes, the sharding over them.

JAX keeps that sharding in an array's type, so a function traced with shapes alone does not accept the array.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from optax_mpo._core import host
from optax_mpo._core.annotations import Shaped

LOW_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float8_e4m3fn))
"""The floating-point dtypes in which weights are stored instead of float32; `_codecs/formats.py` has their codecs."""


def is_packed(dtype: DTypeLike) -> bool:
  """Whether several elements of a dtype share a byte, such as two of `int4`."""
  info = {jnp.integer: jnp.iinfo, jnp.floating: jnp.finfo}
  return any(jnp.issubdtype(dtype, kind) and of(dtype).bits < 8 for kind, of in info.items())


def struct(x: Shaped, without: int | None = None) -> jax.ShapeDtypeStruct:
  """The type of an array, a ref or a type, as a `ShapeDtypeStruct`, less the axis `without` if given."""
  aval = _type(x)
  return _cut(aval, [(i, n) for i, n in enumerate(aval.shape) if i != without])


def resized(x: Shaped, axis: int, size: int) -> jax.ShapeDtypeStruct:
  """The same type with another number of entries along an axis, which is not split over devices."""
  aval = _type(x)
  return _cut(aval, [(None, size) if i == axis else (i, n) for i, n in enumerate(aval.shape)])


def _cut(aval: Any, axes: Sequence[tuple[int | None, int]]) -> jax.ShapeDtypeStruct:
  """The type with these axes: for each the one it comes from, whose sharding it keeps, and its size."""
  sharding, manual = _typed(aval, AxisType.Explicit, AxisType.Manual), getattr(aval, "manual_axis_type", None)
  if sharding is not None:
    spec = [*sharding.spec, *[None] * len(aval.shape)]
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*(None if i is None else spec[i] for i, _ in axes)))
  shape = tuple(n for _, n in axes)
  if host.is_on_host(aval) and not isinstance(aval, jax.ShapeDtypeStruct):  # which only has a memory with a mesh
    return aval.update(shape=shape, **({} if sharding is None else {"sharding": sharding}))
  return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding, manual_axis_type=manual)


def zeros(like: Shaped) -> jax.Array:
  """Zeros of the type of `like`, an array or a type."""
  aval = _type(like)
  new = jnp.zeros(aval.shape, aval.dtype, device=_typed(aval, AxisType.Explicit))
  varying = getattr(getattr(aval, "manual_axis_type", None), "varying", ())
  return lax.pcast(new, tuple(varying), to="varying") if varying else new


def is_split(x: Shaped) -> bool:
  """Whether the type of an array, or of what a ref holds, splits it over several devices."""
  sharding = _typed(_type(x), AxisType.Explicit)
  return sharding is not None and any(sharding.spec)


def _type(x: Shaped) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct) or not isinstance(x, jax.Array | jax.Ref):
    return x
  aval = jax.typeof(x)
  return getattr(aval, "inner_aval", aval)


def _typed(aval: Shaped, *kinds: AxisType) -> NamedSharding | None:
  """The sharding in a type, if its mesh has axes of one of these kinds; else None."""
  sharding = getattr(aval, "sharding", None)
  axes = getattr(getattr(sharding, "mesh", None), "axis_types", ())
  return sharding if any(kind in axes for kind in kinds) else None
