"""The text that `train_lm.py` learns: the source of the Python standard library, as bytes.

Every machine that runs Python has it, some ten megabytes, so nothing is downloaded. Installed packages, tests and two
folders of generated tables are left out. Files are sorted, and every 20th is for validation. So the two texts have no
file in common, and depend only on the Python version.
"""

import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

LEFT_OUT = frozenset({
  "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__",
})  # fmt: skip
VALIDATION_EVERY = 20
END_OF_FILE = b"\0"


class Corpus(NamedTuple):
  """The two texts, uint8[length] each, and how many files each was made of."""

  train: np.ndarray
  validation: np.ndarray
  train_files: int
  validation_files: int


def source_files(root: pathlib.Path) -> list[pathlib.Path]:
  """Returns the `.py` files below `root` in a fixed order, without the folders in LEFT_OUT."""
  found = (path for path in root.rglob("*.py") if path.is_file())
  found = (path for path in found if LEFT_OUT.isdisjoint(path.relative_to(root).parts))
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def load_corpus(root: pathlib.Path | None = None) -> Corpus:
  """Reads the files below `root` (default: the standard library of the running Python) into two texts."""
  files = source_files(root or pathlib.Path(sysconfig.get_path("stdlib")))
  held_out = files[::VALIDATION_EVERY]
  kept = [path for i, path in enumerate(files) if i % VALIDATION_EVERY]
  return Corpus(_read(kept), _read(held_out), len(kept), len(held_out))


def _read(files: list[pathlib.Path]) -> np.ndarray:
  return np.frombuffer(b"".join(path.read_bytes() + END_OF_FILE for path in files), np.uint8)


def training_batch(text: np.ndarray, batch: int, context: int, seed: int, step: int) -> np.ndarray:
  """Returns `uint8[batch, context + 1]` windows at random places, which depend only on the seed and the step."""
  starts = np.random.default_rng((seed, step)).integers(0, len(text) - context, size=batch)
  return _windows(text, starts, context)


def validation_batches(text: np.ndarray, batches: int, batch: int, context: int) -> list[np.ndarray]:
  """Returns batches like those of `training_batch`, at fixed places spread evenly over the text."""
  starts = np.linspace(0, len(text) - context - 1, batches * batch).astype(np.int64)
  return list(_windows(text, starts, context).reshape(batches, batch, context + 1))


def _windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
  return text[starts[:, None] + np.arange(context + 1)]


def unigram_bits(corpus: Corpus) -> float:
  """Bits per validation byte of a model that knows only how frequent each byte is in the training text."""
  counts = np.bincount(corpus.train, minlength=256) + 1.0
  bits = -np.log2(counts / counts.sum())
  return float(bits[corpus.validation].mean())
