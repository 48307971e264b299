"""Writes the f32 master weights to a safetensors file, and reads weights from such files.

Why: other tools do not know compensation bits. They read f32 weights by name, and write weights in f32 or bf16. A run
can start from those without losing a bit.

Needs safetensors: `pip install 'optax_mpo[checkpoint]'`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import optax
import safetensors
import safetensors.numpy
from jax.tree_util import keystr, tree_flatten_with_path

from optax_mpo._codecs import masters
from optax_mpo._core import modules, trees
from optax_mpo._core.annotations import PyTree, Shaped


def save_safetensors(
  path: str | os.PathLike[str], params: PyTree, opt_state: optax.OptState, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes the f32 master weights of a run to a file.

  A tensor is named by the path of its weight in the tree, such as `blocks.0.kernel`. The file is replaced as a whole or
  not at all.

  Args:
    path: the file.
    params: the params of the run.
    opt_state: the state of a `compensated` transformation for them, which has the bits.
    metadata: strings to store in the file, by name.

  Raises:
    ValueError: if two weights get the same name, if `opt_state` has no compensation, or if a weight is on devices of
      other processes.

  Memory: 4 bytes per parameter on the host, twice that while the file is written.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo, pathlib, tempfile
    >>> from optax_mpo.export import load_safetensors, save_safetensors
    >>> tx = mpo.compensated(optax.adamw(1e-3))
    >>> params, opt_state = mpo.init(tx, {"layer": {"w": jnp.full(4, 0.1)}})
    >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
    >>> save_safetensors(file, params, opt_state)
    >>> masters = load_safetensors(file, params)
    >>> print(masters["layer"]["w"].dtype, masters["layer"]["w"][0])
    float32 0.1

  References:
    `safetensors <https://huggingface.co/docs/safetensors>`_
  """
  tensors: dict[str, np.ndarray] = {}
  for key, leaf in _named(masters.master_params(modules.pure(params), opt_state), "save_safetensors").items():
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(
        f"save_safetensors: {key} lies on devices of other processes. Save a checkpoint with Checkpointer and export "
        "from that in one process, or gather the masters: jax.experimental.multihost_utils.process_allgather."
      )
    tensors[key] = np.asarray(leaf)
  data = safetensors.numpy.save(tensors, dict(metadata or {}))
  target = Path(path)
  beside = target.with_name(f"{target.name}.{os.getpid()}.new")
  try:
    with beside.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(beside, target)
  finally:
    beside.unlink(missing_ok=True)


def load_safetensors(path: str | os.PathLike[str], like: PyTree) -> PyTree:
  """Reads weights from a file into a tree, in the dtypes of the file.

  `mpo.init(tx, load_safetensors(file, like))` starts a run from them. f32 weights stay exact with 16 bits, bf16 weights
  with any number of bits.

  Args:
    path: the file; its tensors are named as in `save_safetensors`.
    like: a tree of arrays or `jax.ShapeDtypeStruct`, for the structure and shapes. If its leaves have a sharding, the
      weights get it.

  Returns:
    A tree like `like`.

  Raises:
    ValueError: if the file cannot be read, or has other tensors or shapes than `like`, with their names.

  Memory: one weight at a time on the host, and all of them on the devices.
  """
  want = _named(modules.pure(like), "load_safetensors")
  try:
    with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
      names = set(file.keys())
      for what, some in (("has no", sorted(set(want) - names)), ("also has", sorted(names - set(want)))):
        if some:
          raise ValueError(f"load_safetensors: {path} {what} {trees.listed(some)}. Is it of this model?")
      read = [_placed(file.get_tensor(name), leaf, name, path) for name, leaf in want.items()]
  except safetensors.SafetensorError as error:
    raise ValueError(f"load_safetensors: {path} cannot be read ({error}): is it whole?") from error
  return jax.tree.structure(like).unflatten(read)


def _placed(value: np.ndarray, like: Shaped, name: str, path: str | os.PathLike[str]) -> jax.Array:
  if value.shape != tuple(like.shape):
    raise ValueError(
      f"load_safetensors: in {path}, {name} has shape {list(value.shape)}, and it is to be {list(like.shape)}."
    )
  return jax.device_put(value, getattr(like, "sharding", None))


def _named(tree: PyTree, who: str) -> dict[str, PyTree]:
  """The leaves by name, such as `blocks.0.kernel`."""
  found: dict[str, PyTree] = {}
  for path, leaf in tree_flatten_with_path(tree)[0]:
    key = keystr(path, simple=True, separator=".")
    if key in found:
      raise ValueError(f"{who}: two leaves would be named {key}. Rename one of the keys that have dots in them.")
    found[key] = leaf
  return found
