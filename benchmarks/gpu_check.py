"""Measures what needs a GPU, in the order of what it is worth: peaks, bits, times, rivals, host streaming, training.

    benchmarks/run_gpu.sh                                             # everything that fits ten minutes on one card
    benchmarks/run_gpu.sh results --resume                            # a second call: what the first did not finish
    python benchmarks/gpu_check.py --models lm-350m --modes mpo-16-auto

Needs jax for CUDA, flatbuffers, optax and rich, and no network. flashoptim-jax and PyTorch are measured too if they are
installed. Each part of gpu_parts.py runs in a process of its own, since a process cannot reset the peak that
`memory_stats` counts, and one that dies takes nothing with it. This script does not import JAX.

gpu_check.json in --output-dir has a row for each part, model and mode, and is written whenever a figure is known. What
failed, or had no time left (--seconds), is a row with an `error`; --resume runs those again. A run that measured
nothing does not replace the file of one that did. It also runs on a CPU, with small models. That tests the script and
nothing else.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
COMMAND = (sys.executable, str(Path(__file__).parent / "gpu_parts.py"))
_DEVICE = "import jax; d = jax.devices()[0]; print('DEVICE', d.platform, d.device_kind, sep='|')"
PROBE = (sys.executable, "-c", _DEVICE)
FIXED = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0 --xla_disable_hlo_passes=dot-merger"
"""XLA's flags where bits are compared."""
LEAST_SECONDS = 15
MOST_SECONDS = 150
"""No part takes longer, so that one that hangs leaves time for others; training takes what is left."""

BASELINE = "optax-f32"
MAIN = ("mpo-16-auto-kernels", "mpo-compact-auto-kernels", "mpo-16-auto", "mpo-compact-auto")
OTHERS = ("mpo-16", "mpo-16-layer-kernels")
HOST = ("mpo-16-host", "mpo-compact-host", "optax-f32-host", "mpo-16-host-weights")
EXACTNESS = ("exactness", "exactness-compact")
CODEC = ("codec-16", "codec-8", "codec-4")
TORCH = ("torch-f32", "torch-bf16-stochastic")
TRAINED = ("train optax-f32", "train mpo-16-auto", "train mpo-compact-auto")


class Part(NamedTuple):
  """A process: a function of gpu_parts.py, one of its models, and the modes of which it makes rows."""

  kind: str
  model: str
  modes: tuple[str, ...]


class Sizes(NamedTuple):
  """The models for a kind of device: a language model by batch size, the optimizer alone, text, host streaming."""

  batches: tuple[str, ...]
  leaves: str
  text: str
  host: tuple[str, ...]


SIZES = {
  "gpu": Sizes(
    batches=("lm-1.3b", "lm-1.3b-8x1024", "lm-1.3b-32x1024"),
    leaves="leaves-8x64m",
    text="text-350m",
    host=("lm-1.3b", "lm-1.3b-8x1024", "lm-1.3b-32x1024"),
  ),
  "cpu": Sizes(batches=("lm-tiny",), leaves="leaves-8x64k", text="text-tiny", host=("lm-small",)),
}


def parts_of(platform: str, models: Sequence[str] | None = None, modes: Sequence[str] | None = None) -> list[Part]:
  """The parts for a device, the most important first; or only those of given models and modes."""
  sizes = SIZES[platform]
  if models or modes:
    chosen = [(model, tuple(modes or MAIN)) for model in models or sizes.batches[:1]]
    alone = [Part("peak", model, (mode,)) for model, some in chosen for mode in some if "leaves" not in model]
    return [*alone, *(Part("times", model, some) for model, some in chosen)]
  first, *larger = sizes.batches
  flash = ("flash-24",) if importlib.util.find_spec("flashoptim_jax") and platform == "gpu" else ()
  torch = TORCH if importlib.util.find_spec("torch") and platform == "gpu" else ()
  exact, compact, *rest = MAIN
  rivals = [*(Part("peak", first, (mode,)) for mode in flash), *(Part("times", first, (mode,)) for mode in flash)]
  rivals += [Part("torch", first, (mode,)) for mode in torch]
  rivals += [Part("times", model, (mode,)) for model in larger for mode in flash]
  rivals += [Part("torch", model, (mode,)) for model in larger for mode in torch]
  return [
    *(Part("peak", first, (mode,)) for mode in (exact, BASELINE, compact, *rest)),
    *(Part("exactness", "lm-tiny", (mode,)) for mode in EXACTNESS),
    Part("sweep", "codec", CODEC),
    Part("times", first, MAIN),
    Part("times", sizes.leaves, MAIN),
    *(Part("times", model, MAIN) for model in larger),
    *rivals,
    *(Part("peak", model, (mode,)) for model in sizes.host[:1] for mode in HOST[:2]),
    *(Part("host", model, HOST) for model in sizes.host),
    Part("train", sizes.text, TRAINED),
    # What is left out of the first ten minutes: --resume goes on with it.
    *(Part("peak", model, (mode,)) for model in larger for mode in MAIN),
    *(Part("peak", first, (mode,)) for mode in OTHERS),
    Part("times", first, OTHERS),
  ]


# --- A part as a process ----------------------------------------------------------------------------------------------


def run_part(part: Part, seconds: float) -> Iterator[Row]:
  """Runs a part in a separate process. Yields its rows as they come, then an error for each mode that has none."""
  missing, reason = dict.fromkeys(part.modes), "no time left"
  if seconds >= LEAST_SECONDS:
    limit = seconds if part.kind == "train" else min(seconds, MOST_SECONDS)
    arguments = [part.kind, part.model, *part.modes, f"--seconds={limit:.0f}"]
    with tempfile.TemporaryFile("w+") as errors:
      with contextlib.closing(_printed([*COMMAND, *arguments], part.kind, limit, errors)) as printed:
        for line in printed:
          if isinstance(line, str):
            reason = line
          else:
            missing.pop(line["mode"], None)
            yield {"part": part.kind} | line
      errors.seek(0)
      text = errors.read()
    if reason.startswith("exit code"):
      print(text[-4000:], file=sys.stderr)
      named = [line.strip() for line in text.splitlines() if "Error" in line or "RESOURCE_EXHAUSTED" in line]
      reason = named[-1][:300] if named else f"died: {reason}"
  for mode in missing:
    yield {"part": part.kind, "model": part.model, "mode": mode, "error": reason}


def _printed(command: Sequence[str], kind: str, seconds: float, errors: Any) -> Generator[Row | str, None, None]:
  """Yields the rows that a process prints, and at last how it ended."""
  env = dict(os.environ)
  if kind == "exactness":
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {FIXED}"
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
  assert process.stdout is not None
  output, lines = process.stdout, queue.Queue[str | None]()

  def read() -> None:
    for line in output:
      lines.put(line)
    lines.put(None)

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  until = time.perf_counter() + seconds
  try:
    while (line := lines.get(timeout=max(until - time.perf_counter(), 0.01))) is not None:
      if line.startswith("ROW "):
        yield json.loads(line[4:])
    code = process.wait(timeout=max(until - time.perf_counter(), 1))
    yield f"exit code {code}" if code else "it printed no figure"
  except (queue.Empty, subprocess.TimeoutExpired):
    yield "no time left"
  finally:
    process.kill()
    process.wait()
    reader.join(timeout=5)
    if not reader.is_alive():  # a process that it started may still hold its output
      output.close()


def probe() -> tuple[str, str]:
  """Returns the platform and the kind of the device that JAX finds; ("", why not) if it finds none."""
  try:
    done = subprocess.run(PROBE, capture_output=True, text=True, timeout=120)
  except (OSError, subprocess.TimeoutExpired) as error:
    return "", f"{type(error).__name__}: {error}"[:300]
  for line in done.stdout.splitlines():
    if line.startswith("DEVICE|"):
      _, platform, kind = line.split("|")
      return platform, kind
  return "", ([line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"])[-1][:300]


def driver() -> str | None:
  """The card's driver, memory and power limit in the words of nvidia-smi; None without it."""
  query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv,noheader"]
  try:
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() or None


# --- The report -------------------------------------------------------------------------------------------------------


def key_of(row: Row) -> tuple[str, str, str]:
  return row["part"], row["model"], row["mode"]


def measured(report: Row) -> int:
  """How many rows of a report have figures."""
  return sum("error" not in row for row in report["rows"])


def read(path: Path) -> Row | None:
  """Returns the report in a file; None if there is none."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def save(report: Row, path: Path) -> None:
  """Writes a report in one step, so that the file is whole at any time, unless it would replace figures by none."""
  if not measured(report) and measured(read(path) or {"rows": []}):
    return
  new = path.with_suffix(".new")
  new.write_text(json.dumps(report, indent=1) + "\n")
  new.replace(path)


def figures(row: Row) -> str:
  """The figures of a row in words."""

  def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"

  def of(name: str, text: str) -> list[str]:
    return [text.format(row[name])] if row.get(name) is not None else []

  found: list[str] = []
  if row.get("peak_bytes"):
    found.append(f"peak {row['peak_bytes'] / 2**30:.2f} GiB")
  if row.get("predicted_bytes"):
    apart = row["peak_bytes"] / row["predicted_bytes"] - 1 if row.get("peak_bytes") else 0.0
    found.append(f"predicted {row['predicted_bytes'] / 2**30:.2f} ({apart:+.1%})")
  found += [f"{ms(row['seconds_alone'])} alone"] if "seconds_alone" in row else []
  if "seconds" in row:
    low, high = row.get("quartiles", (row["seconds"],) * 2)
    found.append(f"{ms(row['seconds'])} ({low * 1e3:.2f} to {high * 1e3:.2f})")
  if "ratio" in row:
    low, high = row.get("ratio_quartiles", (row["ratio"],) * 2)
    found.append(f"{row['ratio']:.3f} of Optax ({low:.3f} to {high:.3f})")
  found += of("copy_share", "{:.2f} of a copy's bandwidth") + of("device_ratio", "{:.2f} of the step on the device")
  found += of("bus_share", "{:.2f} of the bus") + of("violations", "{} patterns break a law")
  found += [f"differing in {k}: {v:.2g}" for k, v in row.get("share_of_difference", {}).items()]
  found += of("steps", "{} steps") + of("last_losses_mean", "loss {:.4f}")
  return ", ".join(found + ([f"[{row['error']}]"] if "error" in row else []))


def make_table(report: Row) -> Table:
  title = f"{report['device']}, JAX {report['jax']}"
  table = Table("part", "model", "mode", "figures", title=title)
  for row in report["rows"]:
    table.add_row(row["part"], row["model"], row["mode"], Text(figures(row)))
  return table


def start(args: argparse.Namespace, path: Path) -> tuple[Row, list[Part]]:
  """Returns the report to begin with, and the parts to run. None are to run without a device."""
  platform, kind = probe()
  if platform != "gpu" and (args.gpu or not platform):
    kind = f"no GPU: {kind}" if not platform else f"no GPU: JAX finds only {kind}"
    platform = ""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "optax")}
  report: Row = {"device": kind, **versions, "driver": driver(), "rows": []}
  kept = read(path) if args.resume else None
  if kept and measured(kept):
    if platform and (kept["device"], kept["jax"]) != (kind, versions["jax"]):
      kind = f"{path} is of {kept['device']} with JAX {kept['jax']}, not of {kind}: give another folder"
      platform = ""
    report["rows"] = [row for row in kept["rows"] if "part" in row]  # an error stays until its part runs again
    if not platform:
      report |= {"device": kept["device"], "jax": kept["jax"]}
  parts = parts_of(platform or "gpu", args.models, args.modes)
  done = {key_of(row) for row in report["rows"] if "error" not in row}
  left = [p._replace(modes=tuple(m for m in p.modes if (p.kind, p.model, m) not in done)) for p in parts]
  if not platform:
    missing = [{"part": p.kind, "model": p.model, "mode": mode, "error": kind} for p in left for mode in p.modes]
    report["rows"] = list({key_of(row): row for row in [*report["rows"], *missing]}.values())
    return report, []
  return report, [p for p in left if p.modes]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Peak memory, exactness, times and training on a GPU.")
  parser.add_argument("--models", nargs="+", metavar="MODEL", help="of gpu_parts.py (default: those for this device)")
  parser.add_argument("--modes", nargs="+", metavar="MODE", help="of modes.py (default: those for this device)")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--resume", action="store_true", help="keep the rows that are there, and run what is missing")
  parser.add_argument("--seconds", type=float, default=560, help="no part goes on for longer than this after the start")
  parser.add_argument("--gpu", action="store_true", help="stop if JAX finds no GPU")
  args = parser.parse_args(argv)
  started = time.perf_counter()
  console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
  args.output_dir.mkdir(parents=True, exist_ok=True)
  path = args.output_dir / "gpu_check.json"
  report, parts = start(args, path)
  rows = {key_of(row): row for row in report["rows"]}
  save(report, path)
  for part in parts:
    for row in run_part(part, args.seconds - (time.perf_counter() - started)):
      rows[key_of(row)] = row
      report["rows"] = list(rows.values())
      save(report, path)
      console.print(
        f"{time.perf_counter() - started:5.0f} s  {' '.join(key_of(row))}: {figures(row)}", soft_wrap=True, markup=False
      )
  console.print(make_table(report))
  if not parts:
    for reason in {row["error"]: None for row in report["rows"] if "error" in row}:
      console.print(reason, soft_wrap=True, markup=False)  # whole: in the table it is broken into lines
  return 1 if not rows or any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
  sys.exit(main())
