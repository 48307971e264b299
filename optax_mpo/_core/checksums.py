"""Checksums of arrays, by which a checkpoint notices that a byte has changed.

A checksum is a sum of hashes of the elements and their positions, so that it does not depend on the sharding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from optax_mpo._core import host


@jax.jit
def _hashes(arrays: list[jax.Array]) -> list[jax.Array]:
  """For each array the sum, modulo 2^32, of a hash of every element and its position."""

  def hash_of(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
      x = jnp.stack([x.real, x.imag], axis=-1)
    pattern = lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    place, stride = jnp.zeros(pattern.shape, jnp.uint32), 1
    for axis in reversed(range(pattern.ndim)):
      place += lax.broadcasted_iota(jnp.uint32, pattern.shape, axis) * jnp.uint32(stride & 0xFFFF_FFFF)
      stride *= pattern.shape[axis]
    mixed = (pattern ^ (place * jnp.uint32(0x9E37_79B1))) * jnp.uint32(0x85EB_CA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2_AE35)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

  return [hash_of(x) for x in arrays]


def _hash_on_host(x: jax.Array) -> int:
  """The same hash of an array in host memory, a few million elements at a time: the device may have no room for it."""
  if not x.is_fully_addressable:
    return int(_hashes([host.fetched(x)])[0])
  flat, total, step = np.asarray(x).reshape(-1), 0, 2**22
  for start in range(0, flat.size, step):
    part = flat[start : start + step]
    pattern = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)
    place = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
    mixed = (pattern ^ (place * np.uint32(0x9E37_79B1))) * np.uint32(0x85EB_CA6B)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2_AE35)
    total += int(np.sum(mixed ^ (mixed >> np.uint32(13)), dtype=np.uint64))
  return total % 2**32


def of(stored: list[jax.Array]) -> list[int]:
  """The checksum of each array."""
  found = [0] * len(stored)
  by_devices: dict[tuple[int, ...], list[int]] = {}
  for i, x in enumerate(stored):
    if host.is_on_host(x):
      found[i] = _hash_on_host(x)
      continue
    mesh = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
    devices = mesh.devices.flat if isinstance(mesh, Mesh) else x.sharding.device_set
    by_devices.setdefault(tuple(d.id for d in devices), []).append(i)
  for indices in by_devices.values():  # one program cannot take arrays of several meshes
    for i, x in zip(indices, _hashes([stored[i] for i in indices]), strict=True):
      found[i] = int(x)
  return found
