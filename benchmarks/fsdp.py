"""Fully sharded training steps (FSDP) for the memory benchmarks: weights, state and batch are split over all devices.

Each matrix is split by rows, also in a stack of layers, since 8-bit blocks run along the columns. XLA gathers a weight
where the model uses it and scatters its gradient. No devices are needed: shapes on an abstract mesh are enough for
`mpo.gpu_memory`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import optax_mpo as mpo
from benchmarks.modes import Training

PyTree = Any


def rows(leaf: Any, mesh: AbstractMesh) -> NamedSharding:
  """The sharding of a weight: by rows over all devices, or replicated if the rows do not divide."""
  axis = max(leaf.ndim - 2, 0)
  if leaf.ndim >= 2 and leaf.shape[axis] % mesh.size == 0:
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]))
  return NamedSharding(mesh, PartitionSpec())


def shard(training: Training, batch: PyTree, devices: int) -> tuple[Any, PyTree, PyTree, PyTree]:
  """Shards a training over `devices`.

  Returns:
    The jitted step, which donates params and state and keeps their shardings; and its arguments, ShapeDtypeStructs with
    shardings: params, optimizer state and batch. A batch that does not split is replicated.
  """
  mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))

  def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  replicated, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
  params = jax.tree.map(lambda leaf: placed(leaf, rows(leaf, mesh)), training.params)
  opt_state = jax.tree.map(placed, training.opt_state, mpo.state_sharding(params, training.opt_state))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
  step = jax.jit(training.step, donate_argnums=(0, 1), out_shardings=(replicated, *shardings))
  batch = jax.tree.map(lambda leaf: placed(leaf, replicated if leaf.shape[0] % devices else split), batch)
  return step, params, opt_state, batch


def held_bytes(tree: PyTree) -> int:
  """The bytes of a tree on one device. A uint4 takes half a byte."""

  def leaf(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    return -(-math.prod(shape) * (jnp.iinfo if integer else jnp.finfo)(x.dtype).bits // 8)

  return sum(leaf(x) for x in jax.tree.leaves(tree))
