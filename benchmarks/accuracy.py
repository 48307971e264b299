"""Final validation losses by how weights and optimizer state are kept: same seeds, same data, long and slow training.

    pip install -e '.[benchmarks]'
    python benchmarks/accuracy.py                                  # both tasks, three seeds; a quarter of an hour
    python benchmarks/accuracy.py --tasks digits --seeds 5

The learning rates are small and constant, since that is where low precision fails: an update of less than half an ulp
of its weight is dropped. Two tasks: the byte-level language model of examples/, on the source of Python's standard
library, and a small network on scikit-learn's digits. Prints a table per task and writes accuracy.json and accuracy.png
to --output-dir.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import optax_mpo as mpo

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(ROOT))

from examples import lm_data  # noqa: E402
from examples.lm_model import Transformer, init_params, next_byte_loss  # noqa: E402

PyTree = Any
Loss = Callable[[PyTree, Any], jax.Array]
Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]

# What wraps the optimizer in each mode. None: plain Optax.
MODES: dict[str, Wrap | None] = {
  "fp32": None,
  "bf16": None,
  "mpo16": lambda tx: mpo.compensated(tx, extra_bits=16),
  "mpo8": lambda tx: mpo.compensated(tx, extra_bits=8),
  "mpo4": lambda tx: mpo.compensated(tx, extra_bits=4),
  "compact": lambda tx: mpo.compensated(mpo.quantized_state(tx), extra_bits=8),
  "compact4": lambda tx: mpo.compensated(mpo.quantized_state(tx, state_bits=4), extra_bits=8),
  "mpo4-sr": lambda tx: mpo.compensated(tx, extra_bits=4, rounding="stochastic"),
  "mpo0": lambda tx: mpo.compensated(tx, extra_bits=0),
  "mpo0-sr": lambda tx: mpo.compensated(tx, extra_bits=0, rounding="stochastic"),
}
LABELS = {
  "fp32": "f32 master weights",
  "bf16": "plain bf16, moments too",
  "mpo16": "16 bits",
  "mpo8": "8 bits",
  "mpo4": "4 bits",
  "compact": "8 bits, 8-bit moments",
  "compact4": "8 bits, 4-bit moments",
  "mpo4-sr": "4 bits, stochastic rounding",
  "mpo0": "no bits, f32 moments",
  "mpo0-sr": "no bits, stochastic rounding",
}


@dataclasses.dataclass(frozen=True)
class Task:
  """Something to train.

  Attributes:
    init: `init(seed)` returns f32 params.
    loss: `loss(bf16 params, batch) -> f32[]`.
    batches: `batches(seed, first step, steps)` returns a tree of arrays `[steps, ...]`.
    validation: batches to evaluate on.
    steps: the number of steps, a multiple of 10.
    chunk: the number of steps between evaluations.
    learning_rate: AdamW's, constant.
  """

  init: Callable[[int], PyTree]
  loss: Loss
  batches: Callable[[int, int, int], Any]
  validation: Sequence[Any]
  steps: int
  chunk: int
  learning_rate: float


def language_model(steps: int) -> Task:
  corpus = lm_data.load_corpus()
  model = Transformer(layers=2, width=64, heads=2)

  def batches(seed: int, first: int, count: int) -> np.ndarray:
    return np.stack([lm_data.training_batch(corpus.train, 8, 64, seed, first + i) for i in range(count)])

  return Task(
    init=lambda seed: init_params(model, jax.random.key(seed)),
    loss=functools.partial(next_byte_loss, model),
    batches=batches,
    validation=lm_data.validation_batches(corpus.validation, 16, 32, 64),
    steps=steps,
    chunk=steps // 10,
    learning_rate=2e-4,
  )


def digits(steps: int) -> Task:
  from sklearn.datasets import load_digits

  data: Any = load_digits()
  order = np.random.default_rng(0).permutation(len(data.target))
  images = (data.data[order] / 16).astype(np.float32)
  labels = data.target[order].astype(np.int32)
  held_out = 400

  def init(seed: int) -> PyTree:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"first": (64, 128), "second": (128, 128), "last": (128, 10)}
    return {
      name: {"w": jax.random.normal(key, shape) * shape[0] ** -0.5, "b": jnp.zeros(shape[1])}
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def loss(params: PyTree, batch: Any) -> jax.Array:
    x, y = batch
    x = x.astype(params["first"]["w"].dtype)
    for name in ("first", "second"):
      x = jax.nn.gelu(x @ params[name]["w"] + params[name]["b"])
    logits = x @ params["last"]["w"] + params["last"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y).mean()

  def batches(seed: int, first: int, count: int) -> Any:
    picks = np.random.default_rng((seed, first)).integers(held_out, len(labels), (count, 64))
    return images[picks], labels[picks]

  return Task(
    init=init,
    loss=loss,
    batches=batches,
    validation=[(images[:held_out], labels[:held_out])],
    steps=steps,
    chunk=steps // 10,
    learning_rate=2e-5,
  )


TASKS: dict[str, tuple[Callable[[int], Task], int]] = {"lm": (language_model, 1000), "digits": (digits, 20_000)}


def train(task: Task, mode: str, seeds: Sequence[int]) -> list[list[float]]:
  """Trains once per seed. Returns the validation losses after each chunk, the final one last."""
  tx = optax.adamw(task.learning_rate, weight_decay=0.01)
  wrap = MODES[mode]
  if wrap:
    tx = wrap(tx)
  low = mpo.cast if mode == "fp32" else lambda params: params

  def init(params: PyTree) -> tuple[PyTree, Any]:
    if wrap:
      return mpo.init(tx, params)
    params = params if mode == "fp32" else mpo.cast(params)
    return params, tx.init(params)

  def step(carry: tuple[PyTree, Any], batch: Any) -> tuple[tuple[PyTree, Any], None]:
    params, state = carry
    grads = jax.grad(task.loss)(low(params), batch)
    if mode == "fp32":
      grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, state = tx.update(grads, state, params)
    return ((mpo if wrap else optax).apply_updates(params, updates), state), None

  # Otherwise XLA may skip roundings to bf16, and different ones in each program.
  options = {"xla_allow_excess_precision": False}
  run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0], compiler_options=options)
  evaluate = jax.jit(lambda params, batch: task.loss(low(params), batch), compiler_options=options)
  start = jax.jit(init)
  runs = []
  for seed in seeds:
    carry, losses = start(task.init(seed)), []
    for first in range(0, task.steps, task.chunk):
      carry = run(carry, task.batches(seed, first, task.chunk))
      losses.append(float(np.mean([evaluate(carry[0], batch) for batch in task.validation])))
    runs.append(losses)
  return runs


def summary(losses: dict[str, list[list[float]]]) -> list[tuple[str, float, float, float]]:
  """Returns for each mode: mean final loss, its standard deviation over seeds, and the mean difference from fp32 in %.

  Differences are computed per seed: all modes see the same data.
  """
  final = {mode: np.array([run[-1] for run in runs]) for mode, runs in losses.items()}
  rows = []
  for mode, values in final.items():
    relative = 100 * float(np.mean(values / final["fp32"] - 1)) if "fp32" in final else float("nan")
    rows.append((mode, float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0, relative))
  return rows


def table(losses: dict[str, list[list[float]]]) -> str:
  lines = ["| weights and state kept as | final validation loss | against f32 masters |", "|---|---|---|"]
  for mode, mean, spread, relative in summary(losses):
    lines.append(f"| {LABELS[mode]} | {mean:.4f} ± {spread:.4f} | {relative:+.2f}% |")
  return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
  figure = Figure(figsize=(6.2 * len(results), 4.4), layout="constrained")
  for axes, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
    steps = np.arange(1, 11) * result["steps"] // 10
    for mode, runs in result["losses"].items():
      mean = np.mean(runs, 0)
      axes.plot(steps, mean, label=LABELS[mode], linestyle="-" if mode in ("fp32", "compact") else "--")
    axes.set_title(f"{name}: AdamW, learning rate {result['learning_rate']:g}, mean of {result['seeds']} seeds")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
  parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, help="instead of the task's own number")
  parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
  args = parser.parse_args(argv)
  if args.seeds < 1 or (args.steps is not None and (args.steps < 10 or args.steps % 10)):
    parser.error("--seeds has to be 1 or more, and --steps a multiple of 10")
  args.output_dir.mkdir(parents=True, exist_ok=True)
  results = {}
  for name in args.tasks:
    make, steps = TASKS[name]
    task = make(args.steps or steps)
    losses: dict[str, list[list[float]]] = {}
    for mode in args.modes:
      started = time.perf_counter()
      losses[mode] = train(task, mode, range(args.seeds))
      print(f"{name} {mode}: {losses[mode][0][-1]:.4f} ({time.perf_counter() - started:.0f} s)", flush=True)
    results[name] = {
      "steps": task.steps,
      "learning_rate": task.learning_rate,
      "seeds": args.seeds,
      "losses": losses,
    }
    print(f"\n{name}, {task.steps} steps, {args.seeds} seeds\n{table(losses)}\n", flush=True)
    (args.output_dir / "accuracy.json").write_text(json.dumps({"jax": jax.__version__, "tasks": results}, indent=1))
    draw(results, args.output_dir / "accuracy.png")
  return 0


if __name__ == "__main__":
  sys.exit(main())
