"""The training modes that the benchmarks compare: ours, and the alternatives users would choose.

A mode turns a model and the name of an optimizer into a training step and the shapes of its params and state. To add a
mode, add an entry to MODES.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import optax_mpo as mpo
from benchmarks.models import Model

PyTree = Any


def _is_stack(path: Any, leaf: Any) -> bool:
  return path[0].key == "blocks"


def muon_by_layers() -> optax.GradientTransformation:
  """Muon on each layer of the stacks, and SGD with momentum on the rest."""
  muon, sgd = mpo.per_layer(optax.contrib.muon(1e-3)), optax.sgd(1e-2, momentum=0.9)
  parts: dict[Any, optax.GradientTransformation] = {"stacks": muon, "others": sgd}
  return optax.multi_transform(parts, lambda params: {k: "stacks" if k == "blocks" else "others" for k in params})


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  "adamw": lambda: optax.adamw(3e-4, weight_decay=0.1),
  "adamw-clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1)),
  "adamw-recorded": lambda: optax.chain(
    mpo.record_norms(), mpo.clip_by_delayed_norm(1.0), optax.adamw(3e-4, weight_decay=0.1)
  ),
  "muon-layers": muon_by_layers,
  "adafactor-layers": lambda: mpo.per_layer(optax.adafactor(1e-3), _is_stack),
  "lamb-layers": lambda: mpo.per_layer(optax.lamb(1e-3), _is_stack),
  "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
  "lion": lambda: optax.lion(1e-4, weight_decay=0.1),
}


@dataclasses.dataclass(frozen=True)
class Training:
  """A training step with the shapes of its params and state.

  Attributes:
    step: `step(params, opt_state, batch) -> (loss, params, opt_state)`; the first two are meant to be donated.
    params: a tree of ShapeDtypeStructs.
    opt_state: likewise.
  """

  step: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree, PyTree]]
  params: PyTree
  opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Mode:
  """A training mode: `build(model, optimizer)` returns a Training. `exact`: equals f32-master Optax bit for bit."""

  label: str
  build: Callable[[Model, str], Training]
  exact: bool = False

  @property
  def is_on_host(self) -> bool:
    """Whether its state is in host memory."""
    return "on the host" in self.label


def to_bf16(params: PyTree) -> PyTree:
  return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def optax_f32_master(model: Model, optimizer: str) -> Training:
  tx = OPTIMIZERS[optimizer]()

  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(lambda p: model.loss(to_bf16(p), batch))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state

  return Training(step, model.params, jax.eval_shape(tx.init, model.params))


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


def optax_bf16(model: Model, optimizer: str) -> Training:
  tx = OPTIMIZERS[optimizer]()

  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(model.loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state

  params = jax.eval_shape(to_bf16, model.params)
  return Training(step, params, jax.eval_shape(tx.init, params))


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


def transformation(optimizer: str, bits: int, compact: bool, kernels: bool) -> optax.GradientTransformation:
  """Our storage around an optimizer. `compact`: 8-bit optimizer state. `kernels`: our own kernels."""
  inner = OPTIMIZERS[optimizer]()
  tx = mpo.compensated(mpo.quantized_state(inner) if compact else inner, bits=bits)
  return mpo.with_kernels(tx) if kernels else tx


def compensated(bits: int, compact: bool = False, kernels: bool = False) -> Callable[[Model, str], Training]:
  """Our storage with an ordinary step: a tree of gradients, then the update."""

  def build(model: Model, optimizer: str) -> Training:
    tx = transformation(optimizer, bits, compact, kernels)

    def step(params, opt_state, batch):
      loss, grads = jax.value_and_grad(model.loss)(params, batch)
      updates, opt_state = tx.update(grads, opt_state, params)
      return loss, mpo.apply_updates(params, updates), opt_state

    return Training(step, *jax.eval_shape(lambda p: mpo.init(tx, p), model.params))

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


def automatic(
  bits: int, compact: bool = False, kernels: bool = False, accumulator: int | None = None, dtype: Any = jnp.bfloat16
) -> Callable[[Model, str], Training]:
  """Our storage with automatic gradient release: `value_and_update` on the same loss function.

  Takes two passes if the updates of parameters depend on each other, and one otherwise. With `accumulator`, each
  example of the batch is a microbatch, and the sum of gradients has so many bits beside bf16.
  """

  def build(model: Model, optimizer: str) -> Training:
    tx = transformation(optimizer, bits, compact, kernels)
    count = jax.tree.leaves(model.batch)[0].shape[0]
    how = 1 if accumulator is None else mpo.Microbatches(count, accumulator_bits=accumulator)
    step = mpo.value_and_update(model.loss, tx, two_pass=True, microbatches=how)
    return Training(step, *jax.eval_shape(lambda p: mpo.init(tx, p, dtype=dtype), model.params))

  return build


def on_host(build: Callable[[Model, str], Training], weights: bool = False) -> Callable[[Model, str], Training]:
  """The same step with its state in host memory, and with `weights` also the stacks of weights."""
  # Automatic axes, as `state_sharding` gives real arrays on one device: weights without a mesh mix with them.
  mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,))

  def moved(tree: PyTree) -> PyTree:
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), tree
    )
    shardings = mpo.state_sharding(like, tree, memory_kind="pinned_host")
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

  def build_on_host(model: Model, optimizer: str) -> Training:
    training = build(model, optimizer)
    params = training.params
    if weights:
      params = {**params, "blocks": moved(params["blocks"])}
    return Training(training.step, params, moved(training.opt_state))

  return build_on_host


def optax_f32_whole(model: Model, optimizer: str) -> Training:
  """Optax, whose state is moved to the device as a whole for the update, and back."""
  training = optax_f32_master(model, optimizer)
  spaces = jax.memory.Space

  def step(params, opt_state, batch):
    loss, params, new = training.step(params, jax.device_put(opt_state, spaces.Device), batch)
    return loss, params, jax.tree.map(lambda x: jax.device_put(x, spaces.Host) if x.size > 2**16 else x, new)

  return Training(step, training.params, training.opt_state)


MODES = {
  "optax-f32": Mode("Optax, f32 master", optax_f32_master, exact=True),
  "optax-bf16": Mode("Optax, pure bf16 (loses small updates)", optax_bf16),
  "flash-24": Mode("flashoptim-jax, 24-bit, 8-bit moments", flashoptim(24)),
  "flash-32": Mode("flashoptim-jax, 32-bit, 8-bit moments", flashoptim(32)),
  "mpo-16": Mode("optax_mpo, 16 bits", compensated(16), exact=True),
  "mpo-8": Mode("optax_mpo, 8 bits", compensated(8)),
  "mpo-4": Mode("optax_mpo, 4 bits", compensated(4)),
  "mpo-16-layer": Mode("optax_mpo, 16 bits, fused layers", fused_layers(16), exact=True),
  "mpo-8-layer": Mode("optax_mpo, 8 bits, fused layers", fused_layers(8)),
  "mpo-compact": Mode("optax_mpo, 8 bits, 8-bit state", compensated(8, compact=True)),
  "mpo-16-auto": Mode("optax_mpo, 16 bits, value_and_update", automatic(16), exact=True),
  "mpo-16-auto-microbatches": Mode(
    "optax_mpo, 16 bits, value_and_update, microbatches of 1", automatic(16, accumulator=16)
  ),
  "mpo-16-auto-microbatches-8": Mode(
    "optax_mpo, 16 bits, value_and_update, microbatches of 1 added up in 8 bits", automatic(16, accumulator=8)
  ),
  "mpo-float8-auto": Mode("optax_mpo, float8 and 16 bits, value_and_update", automatic(16, dtype=jnp.float8_e4m3fn)),
  "mpo-8-auto": Mode("optax_mpo, 8 bits, value_and_update", automatic(8)),
  "mpo-compact-auto": Mode("optax_mpo, 8 bits, 8-bit state, value_and_update", automatic(8, compact=True)),
  "mpo-compact-layer": Mode("optax_mpo, 8 bits, 8-bit state, fused layers", fused_layers(8, compact=True)),
  "optax-f32-host": Mode("Optax, f32 master, state on the host, moved whole", on_host(optax_f32_whole), exact=True),
  "mpo-16-host": Mode("optax_mpo, 16 bits, state on the host", on_host(automatic(16)), exact=True),
  "mpo-16-host-weights": Mode(
    "optax_mpo, 16 bits, state and layers on the host", on_host(automatic(16), weights=True), exact=True
  ),
  "mpo-compact-host": Mode("optax_mpo, 8 bits, 8-bit state, on the host", on_host(automatic(8, compact=True))),
  "mpo-compact-host-weights": Mode(
    "optax_mpo, 8 bits, 8-bit state and layers on the host", on_host(automatic(8, compact=True), weights=True)
  ),
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
