"""Random numbers for stochastic rounding: a hash of the seed, the step, the leaf and the element, without state.

Why: if a weight keeps few bits, rounding to nearest drops every update under half an ulp. Rounded up or down at random,
in proportion, weights are right on average. Training has to give the same result every time, on one device or many,
updated layer by layer or all at once. So an element's number depends only on its place, the step and the seed.

How: lowbias32, an integer hash with full avalanche, of the element's index and a key that is a hash of the rest. It is
elementwise in iotas, so sharded arrays need no communication.

Source: C. Wellons, "Prospecting for Hash Functions", 2018, for lowbias32.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


def _hash(x: jax.Array) -> jax.Array:
  """lowbias32: u32[*s] -> u32[*s], a bijection."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB_352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846C_A68B)
  return x ^ (x >> 16)


def random_bits(seed: int, step: jax.Array, leaf: int, shape: tuple[int, ...]) -> jax.Array:
  """Returns u32[*shape], in practice independent of those for any other seed, step or leaf.

  Args:
    seed: any Python int.
    step: i32[].
    leaf: the index of a leaf of the params.
    shape: its shape.
  """
  key = jnp.uint32(seed & 0xFFFF_FFFF)
  for part in (jnp.uint32(leaf), step.astype(jnp.uint32)):
    key = _hash(key ^ part) + jnp.uint32(0x9E37_79B9)
  index = key
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1 :]) & 0xFFFF_FFFF
    index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
  return _hash(_hash(index) ^ key)
