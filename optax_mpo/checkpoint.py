"""Checkpoints of a training run, with Orbax: params, bits and state as they are stored, with checksums.

Why: a run that stopped has to continue bit for bit. Orbax writes arrays of any sharding, keeps the last few
checkpoints, and writes each completely or not at all. But it does not name the leaf that belongs to another model, it
does not notice that a byte has changed, and it cannot store 4-bit integers, empty arrays or typed random keys.

How: the tree is stored as a list of leaves and a list of their names, shapes, dtypes and checksums. A checksum is a sum
of hashes of the elements and their positions, so that it does not depend on the sharding. With several processes, an
array that each process has a copy of is saved once, as an array replicated on all devices.

Needs orbax-checkpoint: `pip install 'optax_mpo[checkpoint]'`.
"""

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from optax_mpo._core import checksums, host, renames, trees
from optax_mpo._core.annotations import PyTree, Shaped

_Leaf = jax.Array | jax.ShapeDtypeStruct | np.ndarray
_Saved = Mapping[str, Any]  # from JSON: the name, shape, dtype and checksum of a leaf

_FORMAT = 2  # in format 1, the codes of second moments stand for other levels
_STORED_AS = {"bool": "uint8", "int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
_STORED_AS |= {"float4_e2m1fn": "uint8", "float8_e4m3": "uint8"}  # as bit patterns
_STORED_AS |= {
  name: name
  for name in (
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "complex64", "complex128"),
    *("float16", "bfloat16", "float32", "float64", "float8_e3m4", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
  )
}


class Checkpointer:
  """Saves and restores the state of a run in a folder.

  Args:
    directory: the folder; it is created.
    max_to_keep: how many checkpoints to keep; older ones are deleted.

  Raises:
    ValueError: if `max_to_keep` is less than 1.

  Memory: on disk the size of the arrays, or less (Orbax compresses); integers of 2 and 4 bits are stored in 8, and
    random keys as their data.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo, tempfile
    >>> from optax_mpo.checkpoint import Checkpointer
    >>> tx = mpo.compensated(optax.adamw(1e-3))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.full(4, 0.1)})
    >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, max_to_keep=2) as checkpoints:
    ...   checkpoints.save(100, (params, opt_state))
    ...   step, (params, opt_state) = checkpoints.restore((params, opt_state))
    >>> step, params["w"].dtype.name
    (100, 'bfloat16')

  References:
    `Orbax <https://orbax.readthedocs.io>`_
  """

  @renames.renamed(keep="max_to_keep")
  def __init__(self, directory: str | os.PathLike[str], max_to_keep: int = 3):
    if max_to_keep < 1:
      raise ValueError(f"Checkpointer: max_to_keep is {max_to_keep}: make it 1 or more.")
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False, create=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes Orbax's manager and ends its background work."""
    self._manager.close()

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, in increasing order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, tree: PyTree) -> None:
    """Saves the arrays of `tree` as the checkpoint of `step`, and deletes the oldest one beyond `max_to_keep`.

    When it returns, the checkpoint is complete. If the process is killed during a save, the one before remains.

    Args:
      step: a number greater than those before.
      tree: arrays, on any devices: params, optimizer state, random keys, whatever the run needs to continue. With
        several processes, all have to call this, and arrays that are not sharded over them have to be the same in each.
        NumPy arrays and Python numbers are saved in full, even if JAX would cut them to 32 bits.

    Raises:
      TypeError: for a leaf that is not an array, a number or random keys, with its name.
      ValueError: if there is a checkpoint of this step or of a later one.
    """
    latest = self._manager.latest_step()
    if latest is not None and step <= latest:
      raise ValueError(f"Checkpointer.save: step {step} is not after {latest}, the last in {self.directory}.")
    names, leaves = _flatten(tree, "save")
    stored = [_on_all(_to_stored(leaf)) for leaf in leaves]
    about = {
      "format": _FORMAT,
      "leaves": [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype), "words": _in_words(x), "checksum": checksum}
        for name, x, checksum in zip(names, leaves, checksums.of(stored), strict=True)
      ],
    }
    parts: dict[str, ocp.args.CheckpointArgs] = {"about": ocp.args.JsonSave(about)}
    arrays = {_key(i): x for i, x in enumerate(stored) if x.size}  # Orbax has neither empty arrays nor empty trees
    if arrays:
      parts["arrays"] = ocp.args.StandardSave(arrays)
    self._manager.save(step, args=ocp.args.Composite(**parts))
    self._manager.wait_until_finished()

  def restore(self, like: PyTree, step: int | None = None) -> tuple[int, PyTree]:
    """Restores the last undamaged checkpoint.

    A checkpoint that cannot be read, or whose checksums do not match, is skipped with a warning that says why, and the
    one before it is tried. If one is restored, the folders of those skipped are renamed to `damaged-STEP`, so that
    their steps can be saved again.

    Args:
      like: a tree of arrays or `jax.ShapeDtypeStruct`, with the structure, shapes and dtypes that were saved. If its
        leaves have a sharding, the restored ones get it, also on another mesh than that of the run that saved. If they
        are NumPy arrays or Python numbers, the restored ones are too.
      step: restore this checkpoint and no other.

    Returns:
      The step and the tree.

    Raises:
      FileNotFoundError: if there is no checkpoint (of `step`), or none that is undamaged.
      ValueError: if a checkpoint does not match `like`, with the leaf. For other `bits`, optimizer state or precision,
        restore it as it was saved and use `optax_mpo.convert`.
    """
    steps = self.steps()
    if step is not None and step not in steps:
      raise FileNotFoundError(f"Checkpointer.restore: there is no step {step} in {self.directory}, but {steps}.")
    tried = [step] if step is not None else steps[::-1]
    for i, candidate in enumerate(tried):
      try:
        tree = self._read(candidate, like)
        self._put_aside(tried[:i])
        return candidate, tree
      except _DamagedError as error:
        following = f"taking step {tried[i + 1]}" if i + 1 < len(tried) else "there is none before it"
        warnings.warn(f"the checkpoint of step {candidate} in {self.directory} {error}: {following}", stacklevel=2)
    raise FileNotFoundError(f"Checkpointer.restore: there is no whole checkpoint in {self.directory} among {tried}.")

  def _put_aside(self, damaged: Sequence[int]) -> None:
    if damaged and jax.process_index() == 0:
      for step in damaged:
        shutil.rmtree(self.directory / f"damaged-{step}", ignore_errors=True)
        os.rename(self.directory / str(step), self.directory / f"damaged-{step}")
    if damaged:
      self._manager.reload()

  def _read(self, step: int, like: PyTree) -> PyTree:
    names, leaves = _flatten(like, "restore")
    about = self._read_part(step, about=ocp.args.JsonRestore())
    if about.get("format") not in (1, _FORMAT):
      raise ValueError(
        f"Checkpointer.restore: step {step} in {self.directory} has the format {about.get('format')!r}, and this "
        f"version of optax_mpo reads 1 and {_FORMAT}."
      )
    if about["format"] == 1:
      _check_levels(f"step {step} in {self.directory}", about["leaves"])
    _check_like(f"step {step} in {self.directory}", about["leaves"], names, leaves)
    structs = [_struct(*each) for each in zip(names, leaves, about["leaves"], strict=True)]
    there = {_key(i): struct for i, struct in enumerate(structs) if struct.size}
    arrays = self._read_part(step, arrays=ocp.args.StandardRestore(there)) if there else {}
    stored = [
      arrays[_key(i)] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding) for i, x in enumerate(structs)
    ]
    for found, saved in zip(checksums.of(stored), about["leaves"], strict=True):
      if found != saved["checksum"]:
        raise _DamagedError(f"is damaged ({saved['name']} has not the checksum that it was saved with)")
    restored = [_from_stored(*each) for each in zip(stored, leaves, about["leaves"], strict=True)]
    given, treedef = jax.tree.flatten(like)
    return treedef.unflatten([_of_the_kind(x, leaf) for x, leaf in zip(restored, given, strict=True)])

  def _read_part(self, step: int, **part: ocp.args.CheckpointArgs) -> PyTree:
    (name,) = part
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**part))[name]
    except Exception as error:  # a damaged file may raise anything
      raise _DamagedError(f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from error


class _DamagedError(Exception):
  """A checkpoint that is damaged, and why."""


def _check_levels(where: str, saved: Sequence[_Saved]) -> None:
  """Raises ValueError if leaves of format 1 are codes that stand for other numbers now."""
  for leaf in saved:
    if leaf["name"].endswith(".values") and leaf["dtype"] in ("uint8", "uint4"):
      raise ValueError(
        f"Checkpointer.restore: {leaf['name']} of {where} has codes from before optax_mpo changed the levels of "
        "second moments. Restore it with the commit that saved it, and save it in f32 (optax_mpo.convert), or start "
        "from its weights with a new state."
      )


def _key(index: int) -> str:
  return f"{index:06d}"


def _is_key(leaf: Shaped) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(key: _Leaf) -> Any:
  """The PRNG implementation of an array of random keys, or of its ShapeDtypeStruct."""
  found = []
  jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
  return found[0]


def _flatten(tree: PyTree, caller: str) -> tuple[list[str], list[PyTree]]:
  """The names of the leaves, and the leaves: JAX arrays, ShapeDtypeStructs, and everything else as NumPy arrays."""
  names, leaves = [], []
  for name, leaf in trees.named_leaves(tree, "tree"):
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
      leaf = np.asarray(leaf)
      leaf = leaf.astype(leaf.dtype.newbyteorder("="), copy=False)
    if not _is_key(leaf) and str(leaf.dtype) not in _STORED_AS:
      raise TypeError(
        f"Checkpointer.{caller}: {name} is of the dtype {leaf.dtype}, which cannot be saved. Convert it to a JAX array "
        "of numbers, or take it out of the tree and keep it by other means."
      )
    names.append(name)
    leaves.append(leaf)
  return names, leaves


def _in_words(leaf: _Leaf) -> bool:
  """Whether a NumPy array has more bits than JAX would keep, so that it is stored as 32-bit words."""
  return isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def _to_stored(leaf: PyTree) -> jax.Array:
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  if _in_words(leaf):
    return jnp.asarray(np.ascontiguousarray(leaf[..., None]).view(np.uint32))
  leaf, dtype = jnp.asarray(leaf), _STORED_AS[str(leaf.dtype)]
  if host.is_on_host(leaf):
    if str(leaf.dtype) == dtype and leaf.dtype.itemsize <= 4:
      return leaf
    leaf = host.fetched(leaf)
  if jnp.issubdtype(leaf.dtype, jnp.floating) and dtype == "uint8":
    leaf = lax.bitcast_convert_type(leaf, f"uint{jnp.finfo(leaf.dtype).bits}")
  return leaf.astype(dtype)


def _from_stored(stored: jax.Array, like: _Leaf, saved: _Saved) -> jax.Array | np.ndarray:
  """Converts a stored leaf to the dtype of `like`."""
  if saved.get("words"):
    found = np.asarray(stored).view(saved["dtype"])[..., 0]
    if isinstance(like, np.ndarray):
      return found
    cut = found.astype(like.dtype)
    if jnp.issubdtype(cut.dtype, jnp.integer) and not np.array_equal(cut, found):
      raise ValueError(
        f"Checkpointer.restore: {saved['name']} was saved as {found.dtype} and has numbers beyond {cut.dtype}. Pass a "
        "NumPy array of its shape in `like`, or set jax_enable_x64."
      )
    return jnp.asarray(cut)
  if not stored.is_fully_addressable and _is_local(getattr(like, "sharding", None)):
    stored = jax.device_put(np.asarray(stored), getattr(like, "sharding", None))
  if _is_key(like):
    return jax.random.wrap_key_data(stored, impl=_key_impl(like))
  dtype = jnp.dtype(saved["dtype"])
  if jnp.issubdtype(dtype, jnp.floating) and stored.dtype == jnp.uint8:
    return lax.bitcast_convert_type(stored.astype(f"uint{jnp.finfo(dtype).bits}"), dtype)
  return np.asarray(stored).astype(like.dtype) if isinstance(like, np.ndarray) else stored.astype(like.dtype)


def _of_the_kind(restored: jax.Array | np.ndarray, like: PyTree) -> PyTree:
  """Converts a leaf to what `like` is: a JAX array, a NumPy array or scalar, or a Python number."""
  if isinstance(like, jax.Array | jax.ShapeDtypeStruct):
    return restored
  restored = np.asarray(restored)
  if isinstance(like, bool | int | float | complex) and not isinstance(like, np.generic):
    return type(like)(restored[()])
  return restored if isinstance(like, np.ndarray) else restored[()]


def _is_local(sharding: jax.sharding.Sharding | None) -> bool:
  return sharding is None or sharding.is_fully_addressable


def _all_devices() -> NamedSharding:
  return NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())


def _on_all(x: jax.Array) -> jax.Array:
  """Makes one replicated array of all processes from an array that each process has a copy of."""
  if jax.process_count() == 1 or not x.is_fully_addressable:
    return x
  return jax.make_array_from_process_local_data(_all_devices(), np.asarray(x), x.shape)


def _struct(name: str, leaf: _Leaf, saved: _Saved) -> jax.ShapeDtypeStruct:
  """The shape, dtype and sharding to read a leaf with, as it is stored."""
  one = SingleDeviceSharding(jax.devices()[0]) if jax.process_count() == 1 else _all_devices()
  sharding = getattr(leaf, "sharding", None) or one
  if jax.process_count() > 1 and _is_local(sharding):
    sharding = one
  try:
    sharding.shard_shape(leaf.shape)
  except ValueError as error:
    raise ValueError(f"Checkpointer.restore: {name} cannot have the sharding that it is to get: {error}") from error
  if saved.get("words"):
    words = np.dtype(saved["dtype"]).itemsize // 4
    return jax.ShapeDtypeStruct((*leaf.shape, words), jnp.uint32, sharding=one)
  if _is_key(leaf):  # the sharding still fits: the data has more axes at the end
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
  return jax.ShapeDtypeStruct(leaf.shape, _STORED_AS[saved["dtype"]], sharding=sharding)


def _check_like(what: str, saved: Sequence[_Saved], names: Sequence[str], leaves: Sequence[Shaped]) -> None:
  """Raises ValueError with the first leaf that is not in the checkpoint, or has another shape or dtype there."""
  advice = (
    "Restore it into the form that it was saved in; optax_mpo.convert takes it from there to other bits or storage."
  )
  known = {leaf["name"]: leaf for leaf in saved}
  for name, leaf in zip(names, leaves, strict=True):
    if name not in known:
      raise ValueError(f"Checkpointer.restore: {what} has no {name}. {advice}")
    have = f"{_canonical(known[name]['dtype'])}{known[name]['shape']}"
    want = f"{_canonical(str(leaf.dtype))}{list(leaf.shape)}"
    if have != want:
      raise ValueError(f"Checkpointer.restore: in {what}, {name} is {have}, and it is to be {want}. {advice}")
  extra = [name for name in known if name not in set(names)]
  if extra:
    raise ValueError(f"Checkpointer.restore: {what} has {trees.listed(extra)}, which has no place in `like`. {advice}")
  if list(known) != list(names):
    raise ValueError(f"Checkpointer.restore: {what} has its leaves in another order. {advice}")


def _canonical(dtype: str) -> str:
  """The name of the dtype that JAX uses for a dtype, with or without x64."""
  return dtype if dtype.startswith("key<") else str(jax.dtypes.canonicalize_dtype(dtype))
