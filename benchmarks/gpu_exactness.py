"""What must be equal on a card, bit for bit, and what training must come out at. Parts of gpu_check.py."""

import functools
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_mpo as mpo
from benchmarks.gpu_claims import MOSAIC
from benchmarks.gpu_parts import MODELS, described, drawn, on_gpu, say
from benchmarks.modes import MODES, OPTIMIZERS, transformation
from optax_mpo._backends import kernel_launch
from optax_mpo._backends.kernel_launch import Language

PyTree = Any
TRANSFORMATIONS = {"mpo-16-auto": (16, False, False), "mpo-compact-auto": (8, True, False)}  # bits, compact, kernels
TRAINING_STEPS = {"gpu": (300, 2000), "cpu": (20, 20)}
"""Steps that training needs, and that it takes at most."""
_GROUP = 10


def exactness(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """The fraction of numbers that differ after ten steps.

  Params and state with gradient release, with kernels in Triton and in Mosaic GPU and with state and weights in host
  memory are compared with those of the ordinary step, and the masters of the ordinary step with 16 bits with f32 Optax.
  The programs differ around their matrix products. So XLA must not choose algorithms by timing, and must sum in a fixed
  order: `FIXED` of gpu_check.py sets both.
  """
  for mode in modes:
    shares: dict[str, float] = {}
    failed: dict[str, str] = {}
    row = {"model": model_name, "mode": mode, "share_of_difference": shares}
    for name, share in differences(model_name, compact=mode.endswith("compact")):
      (shares if isinstance(share, float) else failed)[name] = share
      say(**row, error="not all compared")
    if failed:
      row["error"] = "; ".join(f"{name}: {error}" for name, error in failed.items())
    say(**row)


def differences(model_name: str, compact: bool) -> Iterator[tuple[str, Any]]:
  """Yields (name, fraction of numbers that differ, or the error) for each kind of step."""
  model = MODELS[model_name]()
  tokens = jax.random.randint(jax.random.key(1), model.batch.shape, 0, 256)
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(model.params))))
  masters = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape) * 0.05, model.params)
  adamw = optax.adamw(3e-4, weight_decay=0.1)
  tx = transformation("adamw", 8 if compact else 16, compact, kernels=False)
  fast = mpo.with_kernels(tx)

  def unfused(params: PyTree, state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(model.loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return value, mpo.apply_updates(params, updates), state

  def plain(params: PyTree, state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(model.loss)(mpo.cast(params), batch)
    updates, state = adamw.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)
    return value, optax.apply_updates(params, updates), state

  def is_large(path: Any, leaf: Any) -> bool:
    return leaf.size >= 2**12

  def on_host(params: PyTree, state: Any) -> tuple[PyTree, Any]:
    shardings = mpo.state_sharding(params, state, memory_kind="pinned_host", where=is_large)
    return params, jax.device_put(state, shardings)

  def all_on_host(params: PyTree, state: Any) -> tuple[PyTree, Any]:
    _, state = on_host(params, state)
    shardings = mpo.state_sharding(params, params, memory_kind="pinned_host", where=is_large)
    blocks = jax.device_put(params["blocks"], shardings["blocks"])
    return {**params, "blocks": blocks}, state

  def here(params: PyTree, state: Any) -> tuple[PyTree, Any]:
    return params, state

  assert model.fused_loss is not None
  auto = mpo.value_and_update(model.loss, tx)
  steps: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "layer": (mpo.fused_value_and_update(model.fused_loss, tx), here),
    "layer with kernels": (mpo.fused_value_and_update(model.fused_loss, fast), here),
    "auto": (auto, here),
    "auto with kernels": (mpo.value_and_update(model.loss, fast), here),
    "state on the host": (auto, on_host),
    "state and weights on the host": (auto, all_on_host),
  }
  if kernel_launch.is_there(Language.MOSAIC) and kernel_launch.is_for_this_card(Language.MOSAIC):
    steps[MOSAIC] = steps["layer with kernels"]
  ordinary = ten_steps(unfused, *mpo.init(tx, masters), tokens)
  if not compact:
    f32 = ten_steps(plain, masters, adamw.init(masters), tokens)
    yield "optax-f32", share_of_difference(mpo.master_params(*ordinary), f32[0])
  for name, (step, place) in steps.items():
    try:
      params, state = place(*mpo.init(tx, masters))
      os.environ["OPTAX_MPO_KERNELS"] = "mosaic" if name == MOSAIC else ""
      found = ten_steps(step, params, state, tokens)
      yield name, share_of_difference(found, ordinary)
    except Exception as error:  # the others go on
      yield name, described(error)


def ten_steps(step: Callable[..., Any], params: PyTree, state: Any, batch: Any) -> tuple[PyTree, Any]:
  jitted = jax.jit(step, compiler_options={"xla_allow_excess_precision": False})
  for _ in range(10):
    _, params, state = jitted(params, state, batch)
  return params, state


def share_of_difference(a: PyTree, b: PyTree) -> float:
  """The fraction of numbers that differ between two trees, in any memory."""
  pairs = [jax.device_get(pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
  return float(sum(int(np.sum(np.asarray(x) != np.asarray(y))) for x, y in pairs) / sum(x.size for x, _ in pairs))


# --- Training ---------------------------------------------------------------------------------------------------------


def initial(params: PyTree) -> PyTree:
  """Initial f32 weights: ones in norms, small normal numbers elsewhere."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf, x: jnp.ones(leaf.shape) if "norm" in str(path[-1]) else x, params, drawn(params)
  )


def standard_library() -> np.ndarray:
  """The source of the standard library's modules as bytes: u8[n]."""
  sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))
  return np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)


class Run:
  """Training in one mode: its compiled step, weights and state."""

  def __init__(self, model_name: str, mode: str, masters: PyTree):
    self._step = jax.jit(MODES[mode].build(MODELS[model_name](), "adamw").step, donate_argnums=(0, 1))
    if mode == "optax-f32":
      self._params = jax.tree.map(jnp.copy, masters)  # the step donates them
      self._state = OPTIMIZERS["adamw"]().init(self._params)
    else:
      tx = transformation("adamw", *TRANSFORMATIONS[mode])
      self._params, self._state = jax.jit(functools.partial(mpo.init, tx))(masters)
    self.losses: list[Any] = []

  def step(self, batch: jax.Array) -> None:
    loss, self._params, self._state = self._step(self._params, self._state, batch)
    self.losses.append(loss)

  def fetch(self) -> None:
    """Waits for the losses, so that the host does not run ahead without limit."""
    self.losses = [float(loss) for loss in self.losses]


def train(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """Trains on text, all modes in turn, until the time is up: from the same weights, on the same batches."""
  started = time.perf_counter()
  model = MODELS[model_name]()
  runs: dict[str, Run] = {}

  def failed(mode: str, error: Exception) -> None:
    runs.pop(mode, None)
    gc.collect()
    say(model=model_name, mode=mode, error=described(error))

  masters = initial(model.params)
  for mode in modes:  # "train mpo-16-auto"
    try:
      runs[mode] = Run(model_name, mode.partition(" ")[2], masters)
    except Exception as error:  # the others go on
      failed(mode, error)
  del masters
  least, most = TRAINING_STEPS["gpu" if on_gpu() else "cpu"]
  text, draw = standard_library(), np.random.default_rng(0)
  count, length = model.batch.shape
  for index in range(1, most + 1):
    starts = draw.integers(0, len(text) - length, count)
    batch = jnp.asarray(np.stack([text[s : s + length] for s in starts]), jnp.int32)
    for mode in list(runs):
      try:
        runs[mode].step(batch)
        if index % _GROUP == 0:
          runs[mode].fetch()
      except Exception as error:
        failed(mode, error)
    late = index % _GROUP == 0 and time.perf_counter() - started > seconds - 5
    if index % 100 == 0 or index == most or late:
      for mode, run in runs.items():
        report(model_name, model.count, mode, run.losses, enough=index >= least)
    if late:
      return


def report(model_name: str, parameters: int, mode: str, losses: Sequence[float], enough: bool) -> None:
  """Prints the losses so far: means over ten steps, and over the last twenty."""
  means = np.array(losses[: len(losses) // _GROUP * _GROUP]).reshape(-1, _GROUP).mean(axis=1)
  row = {
    "model": model_name,
    "parameters": parameters,
    "mode": mode,
    "steps": len(losses),
    "losses": [round(float(x), 4) for x in means],
    "last_losses_mean": float(np.mean(losses[-20:])),
  }
  say(**row) if enough else say(**row, error=f"only {len(losses)} steps")
