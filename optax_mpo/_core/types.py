"""The types of arrays: shapes and dtypes, and where a mesh has explicit or manual axes how they lie over it.

JAX keeps the latter in an array's type, so that a function that is traced with shapes alone does not fit the array.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def struct(x: Any, without: int | None = None) -> jax.ShapeDtypeStruct:
  """The type of an array, of what a ref holds, or of a type, without one of its axes if that is named."""
  aval = _type(x)
  keep = [i for i in range(len(aval.shape)) if i != without]
  sharding, manual = _typed(aval, AxisType.Explicit, AxisType.Manual), getattr(aval, "manual_axis_type", None)
  if sharding is not None:
    spec = [*sharding.spec, *[None] * len(aval.shape)]
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*(spec[i] for i in keep)))
  shape = tuple(aval.shape[i] for i in keep)
  return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding, manual_axis_type=manual)


def zeros(like: Any) -> jax.Array:
  """Zeros of the type of an array, or of a type."""
  aval = _type(like)
  new = jnp.zeros(aval.shape, aval.dtype, device=_typed(aval, AxisType.Explicit))
  varying = getattr(getattr(aval, "manual_axis_type", None), "varying", ())
  return lax.pcast(new, tuple(varying), to="varying") if varying else new


def is_split(x: Any) -> bool:
  """Whether JAX knows that an array, or what a ref holds, lies in parts on several devices."""
  sharding = _typed(_type(x), AxisType.Explicit)
  return sharding is not None and any(sharding.spec)


def _type(x: Any) -> Any:
  if isinstance(x, jax.ShapeDtypeStruct) or not isinstance(x, jax.Array | jax.Ref):
    return x
  aval = jax.typeof(x)
  return getattr(aval, "inner_aval", aval)


def _typed(aval: Any, *kinds: AxisType) -> Any:
  """The sharding that is part of a type, where its mesh has axes of certain kinds."""
  sharding = getattr(aval, "sharding", None)
  axes = getattr(getattr(sharding, "mesh", None), "axis_types", ())
  return sharding if any(kind in axes for kind in kinds) else None
