"""The report of train_lm.py: bytes per parameter, the table, the JSON and the plot of the losses."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

import optax_mpo as mpo

PyTree = Any


class Held(NamedTuple):
  """What persists between steps, in bytes per parameter.

  Attributes:
    weights: bf16 weights.
    master: f32 weights.
    compensation: compensation bits.
    optimizer: the rest of the optimizer state: AdamW's two moments, and a few scalars.
  """

  weights: float
  master: float
  compensation: float
  optimizer: float

  @property
  def total(self) -> float:
    return self.weights + self.master + self.compensation + self.optimizer


def count_bytes(tree: PyTree) -> float:
  """Returns the bytes of a tree's arrays by the width of their dtypes: a uint4 counts half a byte."""

  def bits(dtype: jnp.dtype) -> int:
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits

  return sum(leaf.size * bits(leaf.dtype) for leaf in jax.tree.leaves(tree)) / 8


def count_parameters(params: PyTree) -> int:
  """Returns the number of elements in a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_held(params: PyTree, opt_state: optax.OptState) -> Held:
  """Counts the bytes of `params` and of all of `opt_state`."""
  leaves = jax.tree.leaves(params)
  parameters = count_parameters(params)

  def is_compensated(node: Any) -> bool:
    return isinstance(node, mpo.CompensatedState)

  states = filter(is_compensated, jax.tree.leaves(opt_state, is_leaf=is_compensated))
  compensation = sum(count_bytes(state.compensation) for state in states)
  return Held(
    weights=count_bytes([leaf for leaf in leaves if leaf.dtype != jnp.float32]) / parameters,
    master=count_bytes([leaf for leaf in leaves if leaf.dtype == jnp.float32]) / parameters,
    compensation=compensation / parameters,
    optimizer=(count_bytes(opt_state) - compensation) / parameters,
  )


class Run(NamedTuple):
  """The results of one training run.

  Attributes:
    mode: the storage mode.
    parameters: the number of parameters of the model.
    held: bytes per parameter that persist between steps.
    losses: f32[steps], the training loss of every step made, in nats per byte.
    planned: the number of steps asked for.
    tokens_per_second: bytes trained on per second, without compile time.
    gradients: the size of the gradients that exist at one time, in bytes per parameter of the model.
    validation_loss: nats per byte; NaN if there was no evaluation.
  """

  mode: str
  parameters: int
  held: Held
  losses: np.ndarray
  planned: int
  tokens_per_second: float
  gradients: float = 2.0
  validation_loss: float = math.nan

  @property
  def train_loss(self) -> float:
    """The mean loss of the last 20 steps."""
    return float(np.mean(self.losses[-20:], dtype=np.float64))


def reference_of(runs: Sequence[Run]) -> Run:
  """Returns the run to compare the others with: fp32, or the first run if there is no fp32."""
  return next((run for run in runs if run.mode == "fp32"), runs[0])


def compared(run: Run, reference: Run) -> str:
  """Returns the difference of a run's training loss from the reference's, as text for the table."""
  if run is reference:
    return "-"
  if np.array_equal(run.losses, reference.losses):
    return "equal"
  return f"{run.train_loss - reference.train_loss:+.4f}" if len(run.losses) == len(reference.losses) else "?"


NOTES = (
  "Bytes are those held from step to step: fp32 makes a bf16 cast in every step, 2 more. Master: f32 weights. Bits: "
  "compensation bits. Moments: AdamW's two and a few scalars. Train loss: mean of the last 20 steps; equal: in every "
  "step, bit for bit. Gradients at once: bytes per parameter of the bf16 gradients that exist at one time, beside what "
  "is held: all of them, those of the largest layer (--fused layer), or the largest one (--fused auto). val: held-out "
  "files, on which byte frequencies alone give {unigram_bits:.3f} bits per byte."
)


def make_table(runs: Sequence[Run]) -> Table:
  """The final table, with one row per run."""
  reference = reference_of(runs)
  several = len(runs) > 1
  table = Table(
    box=box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
    title="Bytes per parameter, losses in nats per byte",
  )
  headers = ["bf16\nweights", "master\nor bits", "\nmoments", "\ntotal", "train\nloss"]
  headers += [f"vs\n{reference.mode}"] if several else []
  table.add_column("\nstorage", no_wrap=True)
  for header in (*headers, "val\nloss", "bits/\nbyte", "tokens\nper s", "gradients\nat once"):
    table.add_column(header, justify="right", no_wrap=True)
  for run in runs:
    unfinished = "" if len(run.losses) == run.planned else f" ({len(run.losses)} of {run.planned} steps)"
    parts = (run.held.weights, run.held.master + run.held.compensation, run.held.optimizer)
    table.add_row(
      run.mode + unfinished,
      *(f"{part:.2f}" if part else "-" for part in parts),
      f"[bold]{run.held.total:.2f}[/bold]",
      f"{run.train_loss:.4f}",
      *([compared(run, reference)] if several else []),
      f"{run.validation_loss:.4f}",
      f"{run.validation_loss / math.log(2):.3f}",
      f"{run.tokens_per_second:,.0f}",
      f"{run.gradients:.2f}",
    )
  return table


def write_json(path: Path, config: dict[str, Any], runs: Sequence[Run]) -> None:
  """Writes the settings and the figures of all runs. Figures that are not finite become null."""

  def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

  report = {
    "config": {**config, "storage": [run.mode for run in runs]},
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "runs": {
      run.mode: {
        "parameters": run.parameters,
        "bytes_per_parameter": {**run.held._asdict(), "total": run.held.total},
        "gradient_bytes_per_parameter": run.gradients,
        "train_loss": finite(run.train_loss),
        "validation_loss": finite(run.validation_loss),
        "validation_bits_per_byte": finite(run.validation_loss / math.log(2)),
        "tokens_per_second": run.tokens_per_second,
        "steps": len(run.losses),
        "losses": [finite(loss) for loss in run.losses],
      }
      for run in runs
    },
  }
  path.write_text(json.dumps(report, indent=2) + "\n")


COLORS = {
  "fp32": "#222222",
  "bf16": "#d55e00",
  "mpo16": "#0072b2",
  "mpo8": "#009e73",
  "mpo4": "#cc79a7",
  "compact": "#e69f00",
}


def draw_losses(path: Path, runs: Sequence[Run]) -> None:
  """Draws the training losses and, for several runs, their differences from the reference."""
  reference, several = reference_of(runs), len(runs) > 1
  window = max(1, max(run.planned for run in runs) // 25)

  def smooth(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = min(window, len(losses))
    means = np.convolve(losses, np.full(size, 1 / size), "valid")
    return np.arange(len(means)) + (size + 1) / 2, means  # each mean at the middle of its steps

  figure = Figure(figsize=(12, 4.8) if several else (7.5, 4.8), layout="constrained")
  axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
  for run in runs:
    # The reference is drawn below, wide and pale, so that a curve that equals it stays visible.
    below = several and run is reference
    style = {"color": COLORS[run.mode], "linewidth": 5 if below else 1.5, "alpha": 0.3 if below else 1}
    label = f"{run.mode}: {run.held.total:.3g} bytes per parameter"
    if math.isfinite(run.validation_loss):
      label += f", held-out files {run.validation_loss / math.log(2):.3f} bits per byte"
    if not several:
      axes[0].plot(np.arange(1, len(run.losses) + 1), run.losses, color=COLORS[run.mode], alpha=0.25, linewidth=0.8)
    axes[0].plot(*smooth(run.losses), label=label, zorder=1 if below else 2, **style)
    if several:
      common = min(len(run.losses), len(reference.losses))
      x, difference = smooth(run.losses[:common].astype(np.float64) - reference.losses[:common])
      axes[1].plot(x, difference, label=run.mode, zorder=1 if below else 2, **style)
  axes[0].set(xlabel="step", ylabel="nats per byte", title=f"Training loss, mean of {window} steps")
  axes[0].legend(frameon=False, fontsize="small")
  if several:
    axes[1].set(
      xlabel="step", ylabel="nats per byte", title=f"Difference from {reference.mode}, mean of {window} steps"
    )
    axes[1].legend(frameon=False, fontsize="small")
  for ax in axes:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)
