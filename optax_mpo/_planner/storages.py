"""Ways to store weights and state, and the training step of each: what `python -m optax_mpo plan` compares.

A storage turns a model and the name of an optimizer into a training step and the shapes of its params and state.
"""

import dataclasses
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from optax_mpo._codecs.apply import apply_updates
from optax_mpo._core.annotations import KeyPath, PyTree
from optax_mpo._planner.decoder import Model
from optax_mpo._stepping.microbatches import Microbatches
from optax_mpo._stepping.value_and_update import value_and_update
from optax_mpo._transforms.compensated import compensated as compensate
from optax_mpo._transforms.compensated import init
from optax_mpo._transforms.norms import clip_by_delayed_norm, record_norms
from optax_mpo._transforms.per_layer import per_layer
from optax_mpo._transforms.quantized import quantized_state
from optax_mpo._transforms.sharding import state_sharding
from optax_mpo._transforms.with_kernels import with_kernels


def _is_stack(path: KeyPath, leaf: jax.Array) -> bool:
  return path[0].key == "blocks"


def muon_by_layers() -> optax.GradientTransformation:
  """Muon on each layer of the stacks, and SGD with momentum on the rest."""
  muon, sgd = per_layer(optax.contrib.muon(1e-3)), optax.sgd(1e-2, momentum=0.9)
  parts: dict[Hashable, optax.GradientTransformation] = {"stacks": muon, "others": sgd}
  return optax.multi_transform(parts, lambda params: {k: "stacks" if k == "blocks" else "others" for k in params})


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  "adamw": lambda: optax.adamw(3e-4, weight_decay=0.1),
  "adamw-clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, weight_decay=0.1)),
  "adamw-recorded": lambda: optax.chain(record_norms(), clip_by_delayed_norm(1.0), optax.adamw(3e-4, weight_decay=0.1)),
  "muon-layers": muon_by_layers,
  "adafactor-layers": lambda: per_layer(optax.adafactor(1e-3), _is_stack),
  "lamb-layers": lambda: per_layer(optax.lamb(1e-3), _is_stack),
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
  """A training mode.

  Attributes:
    label: its name in tables.
    build: `build(model, optimizer)` returns a Training.
    exact: whether it equals f32-master Optax bit for bit.
    is_on_host: whether its state is in host memory.
  """

  label: str
  build: Callable[[Model, str], Training]
  exact: bool = False
  is_on_host: bool = False


def to_bf16(params: PyTree) -> PyTree:
  return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def optax_f32_master(model: Model, optimizer: str) -> Training:
  tx = OPTIMIZERS[optimizer]()

  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(lambda p: model.loss(to_bf16(p), batch))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state

  return Training(step, model.params, jax.eval_shape(tx.init, model.params))


def optax_bf16(model: Model, optimizer: str) -> Training:
  tx = OPTIMIZERS[optimizer]()

  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(model.loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return loss, optax.apply_updates(params, updates), opt_state

  params = jax.eval_shape(to_bf16, model.params)
  return Training(step, params, jax.eval_shape(tx.init, params))


def transformation(optimizer: str, bits: int, compact: bool, kernels: bool) -> optax.GradientTransformation:
  """Our storage around an optimizer. `compact`: 8-bit optimizer state. `kernels`: our own kernels."""
  inner = OPTIMIZERS[optimizer]()
  tx = compensate(quantized_state(inner) if compact else inner, extra_bits=bits)
  return with_kernels(tx) if kernels else tx


def compensated(bits: int, compact: bool = False, kernels: bool = False) -> Callable[[Model, str], Training]:
  """Our storage with an ordinary step: a tree of gradients, then the update."""

  def build(model: Model, optimizer: str) -> Training:
    tx = transformation(optimizer, bits, compact, kernels)

    def step(params, opt_state, batch):
      loss, grads = jax.value_and_grad(model.loss)(params, batch)
      updates, opt_state = tx.update(grads, opt_state, params)
      return loss, apply_updates(params, updates), opt_state

    return Training(step, *jax.eval_shape(lambda p: init(tx, p), model.params))

  return build


def automatic(
  bits: int,
  compact: bool = False,
  kernels: bool = False,
  accumulator: int | None = None,
  dtype: DTypeLike = jnp.bfloat16,
) -> Callable[[Model, str], Training]:
  """Our storage with automatic gradient release: `value_and_update` on the same loss function.

  Takes two passes if the updates of parameters depend on each other, and one otherwise. With `accumulator`, each
  example of the batch is a microbatch, and the sum of gradients has so many bits beside bf16.
  """

  def build(model: Model, optimizer: str) -> Training:
    tx = transformation(optimizer, bits, compact, kernels)
    count = jax.tree.leaves(model.batch)[0].shape[0]
    how = 1 if accumulator is None else Microbatches(count, accumulator_bits=accumulator)
    step = value_and_update(model.loss, tx, two_pass=True, microbatches=how)
    return Training(step, *jax.eval_shape(lambda p: init(tx, p, dtype=dtype), model.params))

  return build


def on_host(build: Callable[[Model, str], Training], weights: bool = False) -> Callable[[Model, str], Training]:
  """The same step with its state in host memory, and with `weights` also the stacks of weights."""
  # Automatic axes, as `state_sharding` gives real arrays on one device: weights without a mesh mix with them.
  mesh = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,))

  def moved(tree: PyTree) -> PyTree:
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), tree
    )
    shardings = state_sharding(like, tree, memory_kind="pinned_host")
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

  def build_on_host(model: Model, optimizer: str) -> Training:
    training = build(model, optimizer)
    params = training.params
    if weights:
      params = {**params, "blocks": moved(params["blocks"])}
    return Training(training.step, params, moved(training.opt_state))

  return build_on_host


STORAGES = {
  "optax-f32": Mode("Optax, f32 master", optax_f32_master, exact=True),
  "optax-bf16": Mode("Optax, pure bf16 (loses small updates)", optax_bf16),
  "mpo-16": Mode("optax_mpo, 16 bits", compensated(16), exact=True),
  "mpo-8": Mode("optax_mpo, 8 bits", compensated(8)),
  "mpo-16-auto": Mode("optax_mpo, 16 bits, value_and_update", automatic(16), exact=True),
  "mpo-compact-auto": Mode("optax_mpo, 8 bits, 8-bit state, value_and_update", automatic(8, compact=True)),
  "mpo-16-host": Mode("optax_mpo, 16 bits, state on the host", on_host(automatic(16)), exact=True, is_on_host=True),
  "mpo-16-host-weights": Mode(
    "optax_mpo, 16 bits, state and layers on the host",
    on_host(automatic(16), weights=True),
    exact=True,
    is_on_host=True,
  ),
  "mpo-compact-host": Mode(
    "optax_mpo, 8 bits, 8-bit state, on the host", on_host(automatic(8, compact=True)), is_on_host=True
  ),
  "mpo-compact-host-weights": Mode(
    "optax_mpo, 8 bits, 8-bit state and layers on the host",
    on_host(automatic(8, compact=True), weights=True),
    is_on_host=True,
  ),
}
