"""Fully sharded training steps (FSDP): weights, state and batch are split over all devices.

Each matrix is split by rows, also in a stack of layers, since 8-bit blocks run along the columns; or by columns, or
along its largest axis, as many trainers do. XLA gathers a weight where the model uses it and scatters its gradient. No
devices are needed: shapes on an abstract mesh are enough for `mpo.gpu_memory`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from optax_mpo._core.annotations import PyTree, Shaped
from optax_mpo._planner.storages import Training
from optax_mpo._transforms.sharding import state_sharding

SPLITS: dict[str, Callable[[Sequence[int]], int]] = {
  "rows": lambda shape: 0,
  "columns": lambda shape: 1,
  "largest": lambda shape: int(shape[1] > shape[0]),
}
"""Along which axis of a matrix of some shape it is split."""


def split_of(leaf: Shaped, mesh: AbstractMesh, split: str) -> NamedSharding:
  """The sharding of a weight over all devices: replicated if the axis does not divide."""
  first = leaf.ndim - 2
  axis = first + SPLITS[split](leaf.shape[-2:]) if first >= 0 else 0
  if first >= 0 and leaf.shape[axis] % mesh.size == 0:
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]))
  return NamedSharding(mesh, PartitionSpec())


def by_batch(devices: int) -> NamedSharding:
  """The sharding of activations that keeps each sequence on one of the devices that `shard` uses."""
  return NamedSharding(_mesh(devices), PartitionSpec("data"))


def _mesh(devices: int) -> AbstractMesh:
  return AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def shard(
  training: Training, batch: PyTree, devices: int, split: str = "rows"
) -> tuple[Wrapped, PyTree, PyTree, PyTree]:
  """Shards a training over `devices`, with each matrix split as one of SPLITS says.

  Leaves in host memory stay in the memory of their hosts.

  Returns:
    The jitted step, which donates params and state and keeps their shardings; and its arguments, ShapeDtypeStructs with
    shardings: params, optimizer state and batch. A batch that does not split is replicated.
  """
  mesh = _mesh(devices)

  def placed(leaf: Shaped, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  replicated, over_batch = NamedSharding(mesh, PartitionSpec()), by_batch(devices)

  def within_memory(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    on_host = leaf.sharding is not None and leaf.sharding.memory_kind == "pinned_host"
    return placed(leaf, sharding.with_memory_kind("pinned_host") if on_host else sharding)

  params = jax.tree.map(lambda leaf: placed(leaf, split_of(leaf, mesh, split)), training.params)
  opt_state = jax.tree.map(within_memory, training.opt_state, state_sharding(params, training.opt_state))
  params = jax.tree.map(lambda leaf, split: within_memory(leaf, split.sharding), training.params, params)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
  step = jax.jit(training.step, donate_argnums=(0, 1), out_shardings=(replicated, *shardings))
  batch = jax.tree.map(lambda leaf: placed(leaf, replicated if leaf.shape[0] % devices else over_batch), batch)
  return step, params, opt_state, batch


def held_bytes(tree: PyTree) -> int:
  """The bytes of a tree on one device. A uint4 takes half a byte."""

  def leaf(x: jax.Array) -> int:
    shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    return -(-math.prod(shape) * (jnp.iinfo if integer else jnp.finfo)(x.dtype).bits // 8)

  return sum(leaf(x) for x in jax.tree.leaves(tree))
