"""The settings of train_lm.py: their values, their checks, and the flags."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lm_data

MODES = ("fp32", "bf16", "mpo16", "mpo8", "mpo4", "compact")
FUSED = ("auto", "layer", "off")
CLIPS = ("global", "element", "none")
SHARDS = ("none", "data", "fsdp")


class UsageError(Exception):
  """A setting that cannot work. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of a training run. The flags of the same names describe them.

  `warmup=None` is a tenth of the steps. `clip=None` clips by element, or by global norm with `fused="off"`.
  """

  storage: str = "mpo16"
  fused: str = "auto"
  clip: str | None = None
  layers: int = 3
  width: int = 128
  heads: int = 4
  context: int = 128
  batch: int = 16
  steps: int = 1000
  learning_rate: float = 3e-3
  weight_decay: float = 0.1
  warmup: int | None = None
  seed: int = 0
  eval_batches: int = 20
  scan: bool = False
  remat: bool = False
  output_dir: str = "runs/train_lm"
  checkpoint_dir: str | None = None
  checkpoint_every: int = 100
  keep: int = 3
  resume: bool = False
  state_memory: str = "device"
  weights_memory: str = "device"
  shard: str = "none"
  cpu_devices: int = 0
  coordinator_address: str | None = None
  num_processes: int = 1
  process_id: int = 0

  @property
  def warmup_steps(self) -> int:
    return self.steps // 10 if self.warmup is None else self.warmup

  @property
  def clipping(self) -> str:
    return self.clip or ("global" if self.fused == "off" else "element")

  @property
  def uses_host(self) -> bool:
    """Whether anything is kept in the memory of the host."""
    return "pinned_host" in (self.state_memory, self.weights_memory)

  def check(self) -> None:
    """Raises `UsageError` for settings that are invalid for any text."""
    if self.resume and self.checkpoint_dir is None:
      raise UsageError("--resume needs the --checkpoint-dir to go on from")
    if self.num_processes > 1 and (self.coordinator_address is None or self.shard == "none"):
      raise UsageError("--num-processes needs --coordinator-address HOST:PORT, and --shard data or fsdp")
    if not 0 <= self.process_id < self.num_processes:
      raise UsageError(f"--process-id is {self.process_id}: make it 0 or more and less than --num-processes")
    if self.cpu_devices < 0:
      raise UsageError(f"--cpu-devices is {self.cpu_devices}: make it 1 or more")
    if self.fused == "layer" and self.storage == "fp32":
      raise UsageError(
        "--fused layer steps weights where they are used, and fp32 uses a cast of them: take another --storage"
      )
    if self.fused == "layer" and self.clipping == "global":
      raise UsageError(
        "--clip global needs the norm of all gradients, and with --fused layer they are never there at one time: "
        "use --clip element or --clip none, or --fused auto"
      )
    if self.uses_host and (self.fused != "auto" or self.storage == "fp32"):
      raise UsageError(
        "--state-memory and --weights-memory pinned_host stream layers through the backward pass: use --fused auto, "
        "and another --storage than fp32"
      )
    for name in ("layers", "width", "heads", "context", "batch", "steps", "eval_batches", "checkpoint_every", "keep"):
      if getattr(self, name) < 1:
        raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}: make it 1 or more")
    if self.width % (2 * self.heads):
      raise UsageError(
        f"--width {self.width} does not split into {self.heads} heads of an even size: make it a multiple of "
        f"{2 * self.heads}, such as {-(-self.width // (2 * self.heads)) * 2 * self.heads}, or change --heads"
      )
    if not 0 < self.learning_rate < float("inf"):
      raise UsageError(f"--learning-rate is {self.learning_rate}: make it greater than 0, such as 3e-3")
    if not 0 <= self.weight_decay < float("inf"):
      raise UsageError(f"--weight-decay is {self.weight_decay}: make it 0 or greater")
    if not 0 <= self.warmup_steps < self.steps:
      raise UsageError(f"--warmup is {self.warmup}: make it 0 or more and less than --steps, {self.steps}")
    if not 0 <= self.seed < 2**32:
      raise UsageError(f"--seed is {self.seed}: make it 0 or more and less than 2^32")

  def check_text(self, corpus: lm_data.Corpus) -> None:
    """Raises `UsageError` if a window does not fit into the text."""
    shortest = min(len(corpus.train), len(corpus.validation))
    if not shortest:
      raise UsageError("this Python has no standard library sources to train on: run one that was installed with them")
    if self.context >= shortest:
      raise UsageError(
        f"--context {self.context} does not fit: the shorter of the two texts has {shortest} bytes, so make it "
        f"{shortest - 1} or less (the text is the source of Python's standard library)"
      )


class OneLineParser(argparse.ArgumentParser):
  """A parser whose errors are one line, without the long usage text."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags. Defaults come from `Config`."""
  parser = OneLineParser(
    prog="train_lm.py",
    description="Train a byte-level Transformer on the Python standard library, keeping its weights in a chosen way.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )

  def add(flag: str, kind: Callable[[str], Any], help_text: str) -> None:
    default = getattr(Config, flag.removeprefix("--").replace("-", "_"))
    parser.add_argument(flag, type=kind, default=default, help=help_text)

  which = parser.add_mutually_exclusive_group()
  which.add_argument("--storage", choices=MODES, default=Config.storage, help="how the weights are kept")
  which.add_argument(
    "--compare",
    nargs="*",
    choices=MODES,
    metavar="MODE",
    default=argparse.SUPPRESS,
    help="train several from the same seed and data, into one table and plot; without a list, all: " + ", ".join(MODES),
  )
  parser.add_argument(
    "--fused",
    choices=FUSED,
    default=Config.fused,
    help="auto: weights are stepped inside the backward pass of the loss (but for fp32); layer: the same, by a loss "
    "that is written with fused layers; off: after it",
  )
  parser.add_argument(
    "--clip",
    choices=CLIPS,
    default=argparse.SUPPRESS,
    help="clip gradients to 1: their global norm, or each element (default: element, or with --fused off global); "
    "global with --fused auto makes two backward passes",
  )
  add("--layers", int, "blocks of the Transformer")
  add("--width", int, "features per position")
  add("--heads", int, "attention heads")
  add("--context", int, "bytes that the model sees at once")
  add("--batch", int, "windows per step")
  add("--steps", int, "training steps")
  add("--learning-rate", float, "the peak, after the warmup")
  add("--weight-decay", float, "AdamW's decay of all matrices")
  parser.add_argument(
    "--warmup",
    type=int,
    default=argparse.SUPPRESS,
    help="steps until the peak learning rate (default: a tenth of the steps)",
  )
  add("--seed", int, "for the weights and the order of the data")
  add("--eval-batches", int, "batches of held-out files to validate on")
  boolean = argparse.BooleanOptionalAction
  parser.add_argument("--scan", action=boolean, default=Config.scan, help="one lax.scan over the layers")
  parser.add_argument("--remat", action=boolean, default=Config.remat, help="recompute activations per layer")
  for what in ("state", "weights"):
    parser.add_argument(
      f"--{what}-memory",
      choices=("device", "pinned_host"),
      default=getattr(Config, f"{what}_memory"),
      help=f"where the {'optimizer state is' if what == 'state' else 'weights are'}, but for small leaves; from the "
      "memory of the host a step fetches a layer at a time",
    )
  add("--output-dir", str, "folder for loss.png and results.json")
  parser.add_argument(
    "--checkpoint-dir", default=argparse.SUPPRESS, help="folder for checkpoints (default: none are made)"
  )
  add("--checkpoint-every", int, "steps from one checkpoint to the next")
  add("--keep", int, "how many checkpoints are kept, the last ones")
  parser.add_argument("--resume", action="store_true", default=Config.resume, help="go on from the last checkpoint")
  parser.add_argument(
    "--shard",
    choices=SHARDS,
    default=Config.shard,
    help="over all devices: data: the batch; fsdp: the batch, the weights and the optimizer state",
  )
  add("--cpu-devices", int, "so many devices on the CPU, to try --shard (0: as there are)")
  parser.add_argument(
    "--coordinator-address", metavar="HOST:PORT", default=argparse.SUPPRESS, help="where process 0 listens"
  )
  add("--num-processes", int, "how many processes train together; all get the same flags but for --process-id")
  add("--process-id", int, "which of them this is, from 0; this one prints and writes")
  return parser


def make_folder(flag: str, name: str, *inside: str) -> Path:
  """Creates a folder, or raises `UsageError` before training starts."""
  path = Path(name, *inside)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"{flag} {name} cannot be made ({error.strerror}): name another folder") from error
  if not os.access(path, os.W_OK):
    raise UsageError(f"{flag} {name} is not writable: name another folder")
  return path
