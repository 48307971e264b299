"""Places the arrays of train_lm.py: on one device, or on all devices of all processes.

data: every device has all weights and its part of each batch. fsdp: weights and optimizer state are sharded over the
devices too, and XLA gathers a weight where it is used. With several processes, arrays are global, and each process
holds the parts on its own devices. The program is the one that a single process would run on as many devices.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lm_config import Config, UsageError

import optax_mpo as mpo

PyTree = Any


def start(config: Config) -> None:
  """Sets the number of CPU devices and connects the processes, if asked to. Call it before JAX is used."""
  try:
    if config.cpu_devices:
      jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if config.coordinator_address:
      jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)
  except RuntimeError as error:
    raise UsageError(f"the processes cannot be started: {str(error).splitlines()[0]}") from error


class Placement:
  """Where params, optimizer state and batches go.

  Args:
    config: its `shard` is one of none, data and fsdp.

  Raises:
    UsageError: if a batch does not split over the devices.
  """

  def __init__(self, config: Config):
    self.mesh, self._fsdp = None, config.shard == "fsdp"
    if config.shard == "none":
      return
    devices = jax.device_count()
    if config.batch % devices:
      raise UsageError(
        f"--batch {config.batch} does not split over {devices} devices: make it a multiple, such as "
        f"{math.ceil(config.batch / devices) * devices}"
      )
    self.mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

  def init(self, make_params: Callable[[], PyTree], init: Callable[[PyTree], Any]) -> tuple[PyTree, Any]:
    """Returns params and optimizer state, created with their shardings."""
    if self.mesh is None:
      return jax.jit(init)(make_params())
    masters = jax.eval_shape(make_params)
    masters = jax.jit(make_params, out_shardings=jax.tree.map(self._sharding, masters))()
    params, opt_state = jax.eval_shape(init, masters)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=self._sharding(p)), params)
    shardings = (jax.tree.map(lambda p: p.sharding, params), mpo.state_sharding(params, opt_state))
    return jax.jit(init, out_shardings=shardings)(masters)

  def results(self, params: PyTree, opt_state: Any) -> Any:
    """The shardings of a step's results: the loss is replicated, params and state stay where they are."""
    if self.mesh is None:
      return None
    return (NamedSharding(self.mesh, P()), *jax.tree.map(lambda a: a.sharding, (params, opt_state)))

  def batch(self, batch: np.ndarray) -> Any:
    """Splits a batch over the devices. Every process has the whole batch."""
    if self.mesh is None:
      return batch
    return jax.make_array_from_callback(batch.shape, NamedSharding(self.mesh, P("data")), lambda index: batch[index])

  def _sharding(self, leaf: Any) -> NamedSharding:
    """With fsdp, splits each matrix by rows, also in a stack of layers: 8-bit blocks run along the columns."""
    assert self.mesh is not None
    rows = leaf.ndim - 2
    if self._fsdp and rows >= 0 and leaf.shape[rows] % self.mesh.size == 0:
      return NamedSharding(self.mesh, P(*[None] * rows, "data"))
    return NamedSharding(self.mesh, P())
