"""Remembers the figures of steps that were compiled before, in a folder of the user's cache.

Why: XLA takes some seconds for a step, and tracing takes some too. Both are deterministic.

How: a file for each key. A key is a hash of all that decides the figures: of the lowered program (`Lowered.key`); or,
for the package's own decoder, of what was asked, the package's source and the versions of what compiles. Then nothing
has to be traced.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from typing import NamedTuple


class Figures(NamedTuple):
  """What a step needs, in bytes on one device.

  Attributes:
    held: what persists between steps: params and optimizer state.
    host: likewise, in host memory; with all else that the step needs there, once it is compiled.
    peak: the peak on the device. None if the step was not compiled, since what persists alone does not fit.
    to_device: what crosses the bus from the host in a step.
    to_host: likewise, to the host.
    parameters: how many parameters the model has; None if that is not known.
  """

  held: int
  host: int
  peak: int | None = None
  to_device: int = 0
  to_host: int = 0
  parameters: int | None = None


def folder() -> pathlib.Path:
  """The folder for results, in the user's cache folder."""
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(root, "optax_mpo", "plan")


class Remembered:
  """Figures by key, in a folder; nothing is remembered if it is None, or cannot be written."""

  def __init__(self, where: pathlib.Path | None):
    self._where = where

  def get(self, key: str) -> Figures | None:
    """Returns the figures of a key. A file that cannot be read counts as none."""
    if self._where is None:
      return None
    try:
      return Figures(**json.loads((self._where / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError):
      return None

  def put(self, key: str, figures: Figures) -> None:
    """Writes the figures of a key, in one move, so that another process reads all or nothing."""
    if self._where is None:
      return
    try:
      self._where.mkdir(parents=True, exist_ok=True)
      with tempfile.NamedTemporaryFile("w", dir=self._where, suffix=".new", delete=False) as file:
        file.write(json.dumps(figures._asdict()))
      pathlib.Path(file.name).replace(self._where / f"{key}.json")
    except OSError:  # a full disk or a folder without write access costs time, not the answer
      pass


def key_of(*asked: object) -> str:
  """A hash of what is asked, of the package's source, and of the versions and flags that a result depends on."""
  return hashlib.sha256(repr((asked, _source(), _versions(), os.environ.get("XLA_FLAGS", ""))).encode()).hexdigest()


@functools.cache
def _source() -> str:
  digest, package = hashlib.sha256(), pathlib.Path(__file__).parent.parent
  for path in sorted(package.rglob("*.py")):
    digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
  return digest.hexdigest()


@functools.cache
def _versions() -> list[str]:
  names = ("jax", "jaxlib", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin")
  found = []
  for name in names:
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
