"""Shardings for optimizer state: each leaf gets the sharding of its param.

Why: under FSDP or tensor parallelism, the state is most of the memory. XLA would choose its shardings for each program
separately, and state from a checkpoint or from `init` outside of jit has none.

How: a leaf of the state belongs to a param if its path contains the path of the param, as in `mu['head']['w']`, and it
has the same shape. That holds for moments, compensation bits, 8-bit codes and accumulated gradients, through every
wrapper, without a list of wrappers.
"""

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from optax_mpo._codecs import blocks, codec
from optax_mpo._core import host, modules, trees
from optax_mpo._core.annotations import KeyPath, PyTree

_SMALL = 2**16  # elements up to which a leaf stays on the device: to move it would take longer than to update it

Entry = str | tuple[str, ...] | None
"""What a `PartitionSpec` has for an axis."""

Shape = TypeVar("Shape")
Place = TypeVar("Place")


def state_sharding(
  params: PyTree,
  opt_state: PyTree,
  *,
  memory_kind: str | None = None,
  where: Callable[[KeyPath, jax.Array], bool] | None = None,
) -> PyTree:
  """Returns shardings for `opt_state`: leaves shaped like a param get its sharding.

  Compensation bits, moments, 8-bit codes and other leaves with the shape of their param get its sharding. So do the
  scales of their blocks; if the mesh does not divide their number, the axis before is split instead. All other state
  (counts, keys, factored moments) is replicated over the same mesh.

  Args:
    params: a tree of arrays or `jax.ShapeDtypeStruct`, each with a `NamedSharding`; with `memory_kind`, they may also
      lie on one device without.
    opt_state: the state of any Optax transformation for them: arrays or ShapeDtypeStructs, on any devices.
    memory_kind: the memory for the state, such as "pinned_host": a step then streams it (docs/offload.md). None: that
      of the params.
    where: `where(path, leaf) -> bool` says which leaves of `opt_state` go to that memory; the others stay on the
      device. None: those with more than 65536 elements.

  Returns:
    A tree like `opt_state` of `NamedSharding`, for `jax.device_put`, for restoring a checkpoint, or for `out_shardings`
    of a jitted `init` or step. Pass `out_shardings` to the step: without it, XLA may return replicated state with
    another sharding, and the next call compiles again.

  Raises:
    ValueError: if a param has no such sharding, if there are no params, if they lie on different meshes, if the device
      has no memory of this kind, or for `where` without `memory_kind`.
    TypeError: if the arguments are swapped.

  Memory: none; nothing is moved.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> tx = mpo.compensated(optax.adamw(3e-4))
    >>> masters = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data")))}
    >>> params, opt_state = mpo.init(tx, masters)
    >>> shardings = mpo.state_sharding(params, opt_state)
    >>> opt_state = jax.device_put(opt_state, shardings)
    >>> opt_state.inner_state[0].mu["w"].sharding == params["w"].sharding
    True

  References:
    Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
    <https://arxiv.org/abs/1910.02054>`_, 2020
  """
  given, params, opt_state = opt_state, modules.pure(params), modules.pure(opt_state)
  if where is not None and memory_kind is None:
    raise ValueError(
      'state_sharding: where chooses the leaves for memory_kind, which is not given. Pass memory_kind="pinned_host", '
      "or leave where out."
    )
  known = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    sharding = getattr(leaf, "sharding", None)
    if memory_kind is not None and isinstance(sharding, SingleDeviceSharding):
      # JAX shows the memory of an array in its type only if its sharding has a mesh.
      sharding = NamedSharding(Mesh(np.array(list(sharding.device_set)), ("device",)), PartitionSpec())
    if not isinstance(sharding, NamedSharding):
      raise ValueError(
        f"state_sharding: {trees.name(path)} has {'no sharding' if sharding is None else sharding}; a NamedSharding is "
        "needed. Put the params on a mesh with jax.device_put, or pass ShapeDtypeStructs with sharding=..."
      )
    known[path] = (leaf.shape, sharding.with_memory_kind("device") if host.is_on_host(leaf) else sharding)
  meshes = list(dict.fromkeys(sharding.mesh for _, sharding in known.values()))
  if len(meshes) > 1:
    raise ValueError(
      f"state_sharding: the params lie on {len(meshes)} meshes; put them on one: {meshes[0]}, {meshes[1]}"
    )
  if not meshes:
    raise ValueError("state_sharding: there are no params, and so no mesh.")
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]
  if not any(_owner(path, known)[1] for path in paths) and any(
    _owner(path, dict.fromkeys(paths, (0, 1)))[1] for path in known
  ):
    raise TypeError(
      "state_sharding: params has the leaves of opt_state, and more. Call state_sharding(params, opt_state)."
    )
  replicated = NamedSharding(meshes[0], PartitionSpec())

  def choose(path: KeyPath, leaf: PyTree) -> PyTree:
    shape, sharding = _owner(path, known)
    if _is_scaled(leaf):
      elements, scales = leaf
      by_element = sharding if sharding is not None and elements.shape == shape else replicated
      return type(leaf)(by_element, _per_block(by_element, scales.shape))
    return sharding if sharding is not None and getattr(leaf, "shape", None) == shape else replicated

  shardings = jax.tree_util.tree_map_with_path(choose, opt_state, is_leaf=_is_scaled)
  if memory_kind is not None:
    _check_memory(replicated, memory_kind)
    chosen = where or (lambda _, leaf: leaf.size > _SMALL)
    if where is None and not any(leaf.size > _SMALL for leaf in jax.tree.leaves(opt_state)):
      warnings.warn(
        f"state_sharding: no leaf has more than {_SMALL} elements, so that all of them stay on the device. To move "
        "them, pass where=lambda path, leaf: True.",
        stacklevel=2,
      )
    shardings = jax.tree_util.tree_map_with_path(
      lambda path, leaf, s: s.with_memory_kind(memory_kind) if chosen(path, leaf) else s, opt_state, shardings
    )
  return modules.in_form_of(given, shardings)


def _check_memory(sharding: jax.sharding.Sharding, memory_kind: str) -> None:
  """Raises ValueError where devices have no memory of this kind; those of an abstract mesh may have any."""
  try:
    device = next(iter(sharding.device_set))
  except ValueError:
    return
  kinds = [memory.kind for memory in device.addressable_memories()]
  if memory_kind not in kinds:
    raise ValueError(
      f"state_sharding: {device.device_kind} has no memory {memory_kind!r}, but {', '.join(map(repr, kinds))}. Choose "
      "one of these, or leave memory_kind out, which keeps the state on the device."
    )


def _is_scaled(x: object) -> bool:
  """Whether `x` is an array in blocks: its elements and the scales of its blocks."""
  return isinstance(x, blocks.Quantized | codec.ScaledBits) and all(map(trees.is_array, x))


def _owner(path: KeyPath, known: dict[KeyPath, tuple[Shape, Place]]) -> tuple[Shape | None, Place | None]:
  """The shape and sharding of the param whose path is the end of `path`, or inside it if a wrapper splits the param."""
  for end in range(len(path), -1, -1):
    for start in range(end + 1):  # the longest first
      if path[start:end] in known:
        return known[path[start:end]]
  return None, None


def _per_block(codes: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """The sharding of scales of `shape`: that of their codes.

  If their last axis does not divide, the one before is split instead. Scales for which that does not divide either, and
  small ones, are replicated along it.
  """
  spec = list(codes.spec) + [None] * (len(shape) - len(codes.spec))
  if shape[-1] % _parts(codes.mesh, spec[-1]):
    moved, spec[-1] = _axes(spec[-1]), None
    if len(shape) > 1 and math.prod(shape) > _SMALL:
      both = (*_axes(spec[-2]), *moved)
      spec[-2] = spec[-2] if shape[-2] % _parts(codes.mesh, both) else both
  return NamedSharding(codes.mesh, PartitionSpec(*spec))


def _axes(entry: Entry) -> tuple[str, ...]:
  """The mesh axes that an axis of an array is split over."""
  return (entry,) if isinstance(entry, str) else entry or ()


def _parts(mesh: Mesh | AbstractMesh, entry: Entry) -> int:
  return math.prod(mesh.shape[axis] for axis in _axes(entry))
