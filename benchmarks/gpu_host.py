"""Host streaming on a card: its steps against the same steps with everything on the device, and against the bus.

A part of gpu_check.py. The bus is measured in the same process: bytes per second to the card, back, and both at once.
A step cannot take less time than the bus needs for what the step moves: all state there and back, and the weights of
layers twice there (for the forward and the backward pass) and once back. `bus_share` is that time as a fraction of the
step's.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.gpu_parts import MODELS, described, on_gpu, peak_bytes, quartiles, say, tree_bytes, warm
from benchmarks.modes import MODES, Training

PyTree = Any
ON_DEVICE = {
  "optax-f32-host": "optax-f32",
  "mpo-16-host": "mpo-16-auto",
  "mpo-16-host-weights": "mpo-16-auto",
  "mpo-compact-host": "mpo-compact-auto",
}
"""For each mode with state on the host, the same step with everything on the device."""
_CHUNKS = 8


def bus() -> dict[str, float]:
  """Bytes per second between host and card: `to_card`, `to_host`, and `both`, the sum when both are under way.

  Each is the faster of a plain `device_put` and of one inside a jitted function.
  """
  mesh, size = Mesh(np.array(jax.devices()[:1]), ("device",)), 2**28 if on_gpu() else 2**20
  spaces = [NamedSharding(mesh, PartitionSpec(), memory_kind=kind) for kind in ("device", "pinned_host")]
  there, back = spaces
  on_card = [jax.device_put(jnp.full(size // 4, k, jnp.float32), there) for k in range(_CHUNKS)]
  on_host = [jax.device_put(x, back) for x in on_card]
  jax.block_until_ready((on_card, on_host))
  jitted = {s: jax.jit(lambda x, s=s: jax.device_put(x, s), out_shardings=s) for s in spaces}
  found = {"to_card": 0.0, "to_host": 0.0, "both": 0.0}
  ways: list[Callable[[jax.Array, NamedSharding], jax.Array]] = [jax.device_put, lambda x, s: jitted[s](x)]
  for put in ways:
    for name in found:
      pairs = [(x, there) for x in on_host] if name == "to_card" else [(x, back) for x in on_card]
      if name == "both":
        pairs = [pair for x, y in zip(on_host, on_card, strict=True) for pair in ((x, there), (y, back))]
      for _ in range(3):  # the first allocates and compiles
        started = time.perf_counter()
        jax.block_until_ready([put(x, s) for x, s in pairs])
        found[name] = max(found[name], size * len(pairs) / (time.perf_counter() - started))
  return found


def moved(training: Training) -> tuple[int, int]:
  """Returns the bytes that a step moves to the card and back."""

  def on_host(tree: PyTree) -> int:
    return tree_bytes([x for x in jax.tree.leaves(tree) if x.sharding and x.sharding.memory_kind == "pinned_host"])

  state, weights = on_host(training.opt_state), on_host(training.params)
  return state + 2 * weights, state + weights


def bus_seconds(to_card: int, to_host: int, rates: dict[str, float]) -> float:
  """The least time in which the bus moves so many bytes each way."""
  return max(to_card / rates["to_card"], to_host / rates["to_host"], (to_card + to_host) / rates["both"])


def host(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """The times of modes with state on the host, each in turn with the same step on the device."""
  rates, model = bus(), MODELS[model_name]()
  for mode in modes:
    try:
      training = MODES[mode].build(model, "adamw")
      ours, _ = warm(mode, model)
      theirs, once = warm(ON_DEVICE[mode], model)
      each, rounds = (1 if once > 0.1 else 2, 5) if on_gpu() else (1, 2)
      done = np.array([[ours.run(each)[1], theirs.run(each)[1]] for _ in range(rounds)])
      del ours, theirs
      there, back = moved(training)
      taken, least = float(np.median(done[:, 0])), bus_seconds(there, back, rates)
      say(
        model=model_name,
        parameters=model.count,
        mode=mode,
        seconds=taken,
        quartiles=quartiles(done[:, 0]),
        device_seconds=float(np.median(done[:, 1])),
        device_ratio=float(np.median(done[:, 0] / done[:, 1])),
        to_card_bytes=there,
        to_host_bytes=back,
        bus=rates,
        bus_seconds=least,
        bus_share=least / taken,
        process_peak_bytes=peak_bytes(),  # of both steps
      )
    except Exception as error:  # a mode that does not run becomes a row; the others go on
      say(model=model_name, mode=mode, error=described(error))
    gc.collect()
