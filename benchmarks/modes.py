"""The training modes that the benchmarks compare: ours, and the alternatives users would choose.

A mode turns a model and the name of an optimizer into a training step and the shapes of its params and state. To add a
mode, add an entry to MODES. Those that `python -m optax_mpo plan` compares are in `optax_mpo/_planner/storages.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_mpo as mpo
from optax_mpo._planner.decoder import Model
from optax_mpo._planner.storages import OPTIMIZERS as OPTIMIZERS
from optax_mpo._planner.storages import (
  STORAGES,
  Mode,
  Training,
  automatic,
  compensated,
  on_host,
  optax_f32_master,
  to_bf16,
  transformation,
)

PyTree = Any


def optax_f32_master_and_copy(model: Model, optimizer: str) -> Training:
  """A bf16 copy of the weights persists between steps, instead of a new cast in each step."""
  tx = OPTIMIZERS[optimizer]()

  def step(params, opt_state, batch):
    low, master = params
    loss, grads = jax.value_and_grad(model.loss)(low, batch)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, opt_state = tx.update(grads, opt_state, master)
    master = optax.apply_updates(master, updates)
    return loss, (to_bf16(master), master), opt_state

  params = (jax.eval_shape(to_bf16, model.params), model.params)
  return Training(step, params, jax.eval_shape(tx.init, model.params))


def flashoptim(master_weight_bits: int) -> Callable[[Model, str], Training]:
  """flashoptim-jax with its default 8-bit moments. master_weight_bits includes the 16 bits of bf16."""

  def build(model: Model, optimizer: str) -> Training:
    import flashoptim_jax  # only the benchmarks need it

    tx = {
      "adamw": lambda **k: flashoptim_jax.flash_adamw(3e-4, weight_decay=0.1, **k),
      "sgd": lambda **k: flashoptim_jax.flash_sgdw(1e-2, momentum=0.9, **k),
      "lion": lambda **k: flashoptim_jax.flash_lion(1e-4, weight_decay=0.1, **k),
    }[optimizer](master_weight_bits=master_weight_bits)

    def step(params, opt_state, batch):
      loss, grads = jax.value_and_grad(model.loss)(params, batch)
      params, opt_state = tx.step(params, opt_state, grads)
      return loss, params, opt_state

    params = jax.eval_shape(to_bf16, model.params)
    return Training(step, params, jax.eval_shape(tx.init, params))

  return build


def fused_layers(bits: int, compact: bool = False, kernels: bool = False) -> Callable[[Model, str], Training]:
  """Our storage with gradient release by layers: each layer is updated inside the backward pass."""

  def build(model: Model, optimizer: str) -> Training:
    tx = transformation(optimizer, bits, compact, kernels)
    if model.fused_loss is None:
      raise NotImplementedError(f"{model.name} is not written with fused layers")
    step = mpo.fused_value_and_update(model.fused_loss, tx)
    return Training(step, *jax.eval_shape(lambda p: mpo.init(tx, p), model.params))

  return build


def optax_f32_whole(model: Model, optimizer: str) -> Training:
  """Optax, whose state is moved to the device as a whole for the update, and back."""
  training = optax_f32_master(model, optimizer)
  spaces = jax.memory.Space

  def step(params, opt_state, batch):
    loss, params, new = training.step(params, jax.device_put(opt_state, spaces.Device), batch)
    return loss, params, jax.tree.map(lambda x: jax.device_put(x, spaces.Host) if x.size > 2**16 else x, new)

  return Training(step, training.params, training.opt_state)


MODES = {
  "optax-f32": STORAGES["optax-f32"],
  "optax-bf16": STORAGES["optax-bf16"],
  "flash-24": Mode("flashoptim-jax, 24-bit, 8-bit moments", flashoptim(24)),
  "flash-32": Mode("flashoptim-jax, 32-bit, 8-bit moments", flashoptim(32)),
  "mpo-16": STORAGES["mpo-16"],
  "mpo-8": STORAGES["mpo-8"],
  "mpo-4": Mode("optax_mpo, 4 bits", compensated(4)),
  "mpo-16-layer": Mode("optax_mpo, 16 bits, fused layers", fused_layers(16), exact=True),
  "mpo-8-layer": Mode("optax_mpo, 8 bits, fused layers", fused_layers(8)),
  "mpo-compact": Mode("optax_mpo, 8 bits, 8-bit state", compensated(8, compact=True)),
  "mpo-16-auto": STORAGES["mpo-16-auto"],
  "mpo-16-auto-microbatches": Mode(
    "optax_mpo, 16 bits, value_and_update, microbatches of 1", automatic(16, accumulator=16)
  ),
  "mpo-16-auto-microbatches-8": Mode(
    "optax_mpo, 16 bits, value_and_update, microbatches of 1 added up in 8 bits", automatic(16, accumulator=8)
  ),
  "mpo-float8-auto": Mode("optax_mpo, float8 and 16 bits, value_and_update", automatic(16, dtype=jnp.float8_e4m3fn)),
  "mpo-8-auto": Mode("optax_mpo, 8 bits, value_and_update", automatic(8)),
  "mpo-compact-auto": STORAGES["mpo-compact-auto"],
  "mpo-compact-layer": Mode("optax_mpo, 8 bits, 8-bit state, fused layers", fused_layers(8, compact=True)),
  "optax-f32-host": Mode(
    "Optax, f32 master, state on the host, moved whole", on_host(optax_f32_whole), exact=True, is_on_host=True
  ),
  "mpo-16-host": STORAGES["mpo-16-host"],
  "mpo-16-host-weights": STORAGES["mpo-16-host-weights"],
  "mpo-compact-host": STORAGES["mpo-compact-host"],
  "mpo-compact-host-weights": STORAGES["mpo-compact-host-weights"],
  "mpo-16-kernels": Mode("optax_mpo, 16 bits, kernels", compensated(16, kernels=True), exact=True),
  "mpo-compact-kernels": Mode("optax_mpo, 8 bits, 8-bit state, kernels", compensated(8, compact=True, kernels=True)),
  "mpo-16-layer-kernels": Mode("optax_mpo, 16 bits, fused layers, kernels", fused_layers(16, kernels=True), exact=True),
  "mpo-16-auto-kernels": Mode("optax_mpo, 16 bits, value_and_update, kernels", automatic(16, kernels=True), exact=True),
  "mpo-compact-layer-kernels": Mode(
    "optax_mpo, 8 bits, 8-bit state, fused layers, kernels", fused_layers(8, compact=True, kernels=True)
  ),
  "mpo-compact-auto-kernels": Mode(
    "optax_mpo, 8 bits, 8-bit state, value_and_update, kernels", automatic(8, compact=True, kernels=True)
  ),
}

WITH_COPY = {"optax-f32-copy": Mode("Optax, f32 master, bf16 copy kept", optax_f32_master_and_copy, exact=True)}
"""For step times only: it holds 2 bytes per parameter more than `optax-f32`, and as many arrays as `mpo-16`."""
