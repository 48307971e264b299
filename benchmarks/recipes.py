"""Bytes per parameter of the steps in examples/recipes, compiled for a GPU: before, exact, and compact.

    pip install -e '.[dev]'
    python benchmarks/recipes.py                                   # half an hour on two CPU cores
    python benchmarks/recipes.py --recipes haiku_mlp keras_fit

Each recipe's own model, with 100 to 200 million parameters and a small batch. *Before* is the file in
examples/recipes/plain, *exact* the recipe, and *compact* the recipe with `mpo.compact` in place of `mpo.exact`. Writes
recipes.json to --output-dir and prints the table of docs/recipes.md.
"""

import argparse
import dataclasses
import difflib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import jax
import optax
from flax import nnx

import optax_mpo as mpo

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(ROOT))

PyTree = Any
WAYS = ("before", "exact", "compact")


@dataclasses.dataclass(frozen=True)
class Program:
  """A step to compile.

  Attributes:
    step: a function of `args`, jitted or not.
    args: trees of arrays or shapes.
    donated: which of them are donated; None if the step says so itself.
    parameters: the number of the model's parameters.
  """

  step: Callable[..., Any]
  args: tuple[Any, ...]
  donated: tuple[int, ...] | None
  parameters: int


def size(tree: PyTree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))


def functional(params_of: Callable[[Any], PyTree]) -> Callable[[ModuleType, Any], Program]:
  """For `step(state, batch)`; `params_of(state)` are the parameters."""

  def program(module: ModuleType, config: Any) -> Program:
    steps = []

    def init() -> Any:
      step, state = module.make(config)
      steps.append(step)
      return state

    state = jax.eval_shape(init)
    batch = jax.eval_shape(lambda: module.make_batch(config, 0))
    return Program(steps[0], (state, batch), None, size(params_of(state)))

  return program


def in_nnx(module: ModuleType, config: Any) -> Program:
  """For `step(model, optimizer, batch)` in `nnx.jit`, which changes its arguments."""
  step, state = module.make(config)
  batch = jax.eval_shape(lambda: module.make_batch(config, 0))
  return Program(step, (*state, batch), None, size(nnx.state(state[0], nnx.Param)))


def in_equinox(module: ModuleType, config: Any) -> Program:
  """For `step(batch, params, opt_state)` in `eqx.filter_jit`, whose donation `gpu_memory` does not know."""
  step, state = module.make(config)
  arrays, static = eqx.partition(state, eqx.is_array)

  def pure(arrays: PyTree, batch: PyTree) -> PyTree:
    return eqx.filter(step.__wrapped__(batch, *eqx.combine(arrays, static)), eqx.is_array)

  batch = jax.eval_shape(lambda: module.make_batch(config, 0))
  return Program(pure, (arrays, batch), (0,), size(arrays[0]))


def in_keras(module: ModuleType, config: Any) -> Program:
  model = module.make(config)
  model.optimizer.build(model.trainable_variables)
  variables = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
  state = tuple([v.value for v in group] for group in (*variables, model.metrics_variables))
  return Program(model.train_step, (state, module.make_data(config, 1)), (0,), size(state[0]))


@dataclasses.dataclass(frozen=True)
class Case:
  """A recipe with a size: `label` in the table, `make(module, config)` the step, `sizes` of the config."""

  label: str
  make: Callable[[ModuleType, Any], Program]
  sizes: dict[str, int]
  recipe: str = ""


TEXT = {"width": 1024, "vocab": 32_000, "length": 512, "batch": 2}
CASES = {
  "openpi_nnx": Case(
    "openpi-like, half of it frozen", functional(lambda s: s.params), {"width": 1024, "layers": 12, "batch": 64}
  ),
  "big_vision_vit": Case(
    "big_vision-like ViT",
    functional(lambda s: s["params"]),
    {"width": 1024, "depth": 8, "size": 56, "classes": 1000, "batch": 8},
  ),
  "maxtext_linen": Case(
    "MaxText-like, 4 microbatches",
    functional(lambda s: s.params),
    {"emb_dim": 1024, "layers": 12, "vocab": 32_000, "length": 512, "batch": 8},
  ),
  "tunix_nnx": Case("Tunix-like, all params", in_nnx, {**TEXT, "layers": 12, "heads": 16, "rank": 0}),
  "tunix_nnx_lora": Case("Tunix-like, LoRA", in_nnx, {**TEXT, "layers": 6, "heads": 16, "rank": 16}, "tunix_nnx"),
  "equinox_mlp": Case("Equinox", in_equinox, {"width": 1024, "layers": 24, "batch": 64}),
  "haiku_mlp": Case("Haiku", functional(lambda s: s.params), {"width": 1024, "layers": 24, "batch": 64}),
  "easydel_state": Case("EasyDeL-like", functional(lambda s: s.graphstate), {**TEXT, "layers": 20}),
  "keras_fit": Case("Keras", in_keras, {"width": 1024, "layers": 12, "batch": 64}),
}


def load(name: str, plain: bool = False) -> ModuleType:
  """The module of a recipe, or of what it was before."""
  return importlib.import_module(f"examples.recipes.{'plain.' if plain else ''}{name}")


def measure(name: str, way: str, target: str) -> dict[str, Any]:
  case = CASES[name]
  module = load(case.recipe or name, plain=way == "before")
  with mock.patch.object(mpo, "exact", mpo.compact if way == "compact" else mpo.exact):
    program = case.make(module, module.Config(**case.sizes))
    donated = {} if program.donated is None else {"donate_argnums": program.donated}
    report = mpo.gpu_memory(program.step, *program.args, target=target, **donated)
  return {
    "recipe": name,
    "way": way,
    "parameters": program.parameters,
    "total_bytes": report.total_bytes,
    "argument_bytes": report.argument_bytes,
    "aliased_bytes": report.aliased_bytes,
  }


def changes(recipe: str) -> list[str]:
  """The lines that a recipe takes away ("-...") and adds ("+..."), without imports and docstrings."""
  folder = ROOT / "examples" / "recipes"
  plain, new = ((folder / part / f"{recipe}.py").read_text().splitlines() for part in ("plain", ""))
  lines = difflib.unified_diff(plain, new, n=0, lineterm="")
  return [line for line in lines if re.match(r"[+-]", line) and not re.match(r'[+-]{3} |[+-]("""|$|import|from)', line)]


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Returns lines changed, peaks and, in brackets, what persists, in bytes per parameter, as Markdown."""
  found = {(row["recipe"], row["way"]): row for row in rows}
  lines = ["| recipe | lines | params | before | exact | compact |", "|---|---|---|---|---|---|"]
  for name, case in CASES.items():
    changed = "".join(line[0] for line in changes(case.recipe or name))
    of = [found.get((name, way)) for way in WAYS]
    peaks = [r and [r[key] / r["parameters"] for key in ("total_bytes", "argument_bytes")] for r in of]
    cells = [f"{peak[0]:.2f} ({peak[1]:.2f})" if peak else "not compiled" for peak in peaks]
    count = f"{of[0]['parameters'] / 1e6:.0f}M" if of[0] else ""
    lines.append(
      f"| {case.label} | -{changed.count('-')} +{changed.count('+')} | {count} | " + " | ".join(cells) + " |"
    )
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument(
    "--recipes", nargs="+", choices=CASES, default=list(CASES), help="the others are kept as they are"
  )
  parser.add_argument("--target", default="h100")
  parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
  args = parser.parse_args(argv)
  args.output_dir.mkdir(parents=True, exist_ok=True)
  path = args.output_dir / "recipes.json"
  kept = json.loads(path.read_text())["rows"] if path.exists() else []
  rows = {(row["recipe"], row["way"]): row for row in kept}
  about = {
    "target": args.target,
    "jax": jax.__version__,
    "optax": optax.__version__,
    "optax_mpo": mpo.__version__,
    "command": "python benchmarks/recipes.py",
    "sizes": {name: case.sizes for name, case in CASES.items()},
  }
  for name in args.recipes:
    for way in WAYS:
      started = time.perf_counter()
      rows[name, way] = row = measure(name, way, args.target)
      each = row["total_bytes"] / row["parameters"]
      print(f"{name} {way}: {each:.2f} ({time.perf_counter() - started:.0f} s)", flush=True)
      ordered = [rows[key] for key in ((n, w) for n in CASES for w in WAYS) if key in rows]
      path.write_text(json.dumps(about | {"rows": ordered}, indent=1) + "\n")
  print(f"\n{table(list(rows.values()))}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
