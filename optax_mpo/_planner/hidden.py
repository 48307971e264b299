"""From how many tokens per step the transfer of state takes no longer than the computation.

  seconds of transfer    = max(bytes to the device, bytes to the host) / bytes per second of the bus
  seconds of computation = operations per token * tokens / (operations per second of the card * utilization)

The two directions of a bus run at the same time, so the larger one counts. A parameter takes 6 operations per token: 2
forward, 4 backward; and 8 with layers that are recomputed. The embedding, of which a token reads a row, takes none
unless it is the head too. Attention's own products are left out: they make the true number of tokens smaller.
"""

from optax_mpo._memory.gpu_targets import Target

BUSES = {"PCIe 4": 31.5e9, "PCIe 5": 63.0e9, "NVLink-C2C": 450e9}
"""Bytes per second in one direction, as specified: 16 lanes of PCIe, and the link between CPU and GPU of a GH200."""
REACHED = 0.8
"""The fraction of it that transfers are assumed to reach."""
UTILIZATION = 0.5
"""The fraction of a card's operations per second that a step is assumed to reach, by default."""


def seconds(to_device: int, to_host: int, bus: str) -> float:
  """How long the transfers of a step take."""
  return max(to_device, to_host) / (BUSES[bus] * REACHED)


def tokens(
  to_device: int, to_host: int, bus: str, card: Target, parameters: int, *, remat: bool = True, utilization: float
) -> int:
  """The tokens of one device from which the computation takes as long as the transfer."""
  per_token = (8 if remat else 6) * parameters
  return round(seconds(to_device, to_host, bus) * card.flops * utilization / per_token)
