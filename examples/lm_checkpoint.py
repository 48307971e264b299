"""Checkpoints of train_lm.py: one folder per storage mode, with the settings of the run."""

import dataclasses
import json
import math
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from optax_mpo.checkpoint import Checkpointer

PyTree = Any


class SettingsError(Exception):
  """The checkpoints in a folder do not belong to this run. The message says why."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """The progress of a run: the arguments of its next step, and the losses so far."""

  params: PyTree
  opt_state: PyTree
  losses: list[Any]


class RunCheckpoints:
  """The checkpoints of one run. Without a folder, nothing is saved.

  Args:
    folder: the folder of the checkpoints, or None.
    settings: all settings that affect the results. A run with other settings cannot continue from these checkpoints.
    every: the number of steps between checkpoints.
    keep: how many checkpoints to keep.
    resume: whether to continue from the last checkpoint. If False, there must be none.
    console: where to print messages.

  Raises:
    SettingsError: if there are checkpoints with other settings, or any checkpoints without `resume`.
  """

  def __init__(
    self, folder: Path | None, settings: Mapping[str, Any], every: int, keep: int, resume: bool, console: Console
  ):
    self._every, self._steps, self._console = every, settings["steps"], console
    self._checkpointer = None
    if folder is None:
      return
    self._checkpointer = Checkpointer(folder / "steps", keep)
    saved, file = self._checkpointer.steps(), folder / "settings.json"
    if resume and not saved:
      console.print(f"[bold yellow]--resume: {_without_checkpoint(folder)}[/bold yellow]")
    if saved and not resume:
      raise SettingsError(f"{folder} has checkpoints of steps {saved}: add --resume, or name another --checkpoint-dir")
    if saved and file.exists():
      before = json.loads(file.read_text())
      changed = [f"--{k.replace('_', '-')} was {before.get(k)}" for k in settings if before.get(k) != settings[k]]
      if changed:
        raise SettingsError(f"the checkpoints in {folder} are of another run: {', '.join(changed)}")
    if jax.process_index() == 0:  # replaced at once, since other processes may be reading it
      file.with_suffix(".new").write_text(json.dumps(dict(settings), indent=1))
      file.with_suffix(".new").replace(file)

  def __enter__(self) -> "RunCheckpoints":
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
    if self._checkpointer is not None:
      self._checkpointer.close()

  def restore(self, start: Progress) -> Progress:
    """Returns the last saved progress, or `start`."""
    if self._checkpointer is None or not self._checkpointer.steps():
      return start
    like = (start.params, start.opt_state, self._padded(start.losses))
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      step, (params, opt_state, losses) = self._checkpointer.restore(like)
    for warning in caught:
      self._console.print(f"[yellow]{warning.message}[/yellow]")
    self._console.print(f"Going on after step {step}.")
    return Progress(params, opt_state, list(np.asarray(losses)[:step]))

  def save(self, progress: Progress, last: bool = False) -> None:
    """Saves the progress every `every` steps, and after the `last` one."""
    step = len(progress.losses)
    if self._checkpointer is None or not step or (step % self._every and not last):
      return
    if step not in self._checkpointer.steps():
      self._checkpointer.save(step, (progress.params, progress.opt_state, self._padded(progress.losses)))

  def _padded(self, losses: Sequence[Any]) -> jax.Array:
    """The losses of all steps, f32[steps]; NaN for steps not made yet."""
    padded = np.full(self._steps, math.nan, np.float32)
    padded[: len(losses)] = [float(loss) for loss in losses]
    return jnp.asarray(padded)


def _without_checkpoint(folder: Path) -> str:
  """Returns a message: the run's folder has no checkpoint, and which folders beside it have some."""
  others = sorted(f.parent.name for f in folder.parent.glob("*/steps") if f.parent != folder and any(f.glob("[0-9]*")))
  hint = "If there should be one, look at --checkpoint-dir."
  if others:
    hint = (
      f"There are checkpoints of other storages beside it: to go on with one, pass --storage {' or '.join(others)}."
    )
  return f"there is no checkpoint in {folder}, so that training starts with step 1. {hint}"
