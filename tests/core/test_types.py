"""Which dtypes are packed into bytes, and which have low precision."""

import jax
import jax.numpy as jnp

from optax_mpo._codecs import formats
from optax_mpo._core import types


def test_dtypes_of_less_than_a_byte_are_packed():
  packed = "int2 uint2 int4 uint4 float4_e2m1fn"
  others = "bool int8 uint8 uint16 int32 float8_e4m3fn bfloat16 float16 float32 complex64"
  assert all(types.is_packed(jnp.dtype(name)) for name in packed.split())
  assert not any(types.is_packed(jnp.dtype(name)) for name in others.split())
  assert not types.is_packed(jax.random.key(0).dtype)


def test_each_low_dtype_has_a_codec_and_no_other_has():
  assert tuple(formats._FORMATS) == types.LOW_DTYPES
