"""The code in the README and the docs runs as written, and the README's numbers match the committed JSON."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accuracy, clipping, cpu_tricks, packed_state, peak_memory, what_fits
from benchmarks.modes import MODES
from tests.helpers import ROOT, relaxed

README = (ROOT / "README.md").read_text()


run = relaxed(exec)  # under JAX's defaults, as for readers


def blocks(language: str, text: str = README) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_code_runs_in_order():
  start, *others, memory = blocks("python")
  assert len([line for line in start.splitlines() if line.strip()]) <= 15
  names: dict = {}
  run(compile(start, "README.md", "exec"), names)
  assert names["params"]["w"].dtype == jnp.bfloat16
  # AdamW's first step moves each weight by the learning rate (and by weight decay, 1e-4 of that).
  moved = jax.tree.leaves(names["masters"])[1] - 0.1
  np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)
  for code in [*others, memory]:
    run(compile(code, "README.md", "exec"), names)
  assert names["report"].parameter_count == 5


TABLES = {
  "README.md": ("## Which mode?", "masters takes {}."),
  "docs/which_mode.md": ("<!-- benchmarks/results/peak_memory.json, modes -->", "f32 masters takes {}."),
}


@pytest.mark.parametrize("page", TABLES)
def test_the_table_of_modes_is_that_of_the_committed_json(page):
  rows = json.loads((ROOT / "benchmarks/results/peak_memory.json").read_text())["rows"]
  found = {r["mode"]: r for r in rows if (r["model"], r["optimizer"], r["target"]) == ("lm-8.8b", "adamw", "h200")}

  def per_parameter(mode: str) -> str:
    return f"{found[mode]['total_bytes'] / found[mode]['parameters']:.2f}"

  start, baseline = TABLES[page]
  text = (ROOT / page).read_text()
  table = text.split(start)[1].split("## ")[0]
  cells = [line.split("|")[-2].strip() for line in table.splitlines() if line.startswith("|")][2:]
  modes = ("mpo-16-auto", "mpo-compact-auto", "mpo-16-host", "mpo-16-host-weights", "mpo-16")
  assert cells == [per_parameter(mode) for mode in modes]
  assert baseline.format(per_parameter("optax-f32")) in text


def test_two_commands_stand_alone_and_name_files_that_exist():
  commands = [block.strip() for block in blocks("bash")]
  assert len(commands) == 2
  for command in commands:
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
  assert commands[0].endswith(".venv/bin/python examples/train_lm.py")
  assert commands[1].endswith(".venv/bin/python -m pytest")
  assert (ROOT / "examples/train_lm.py").exists()


def test_ci_takes_its_test_command_from_the_readme():
  assert "README.md" in (ROOT / ".ci/run").read_text()


MARK = "<!-- benchmarks/results/peak_memory.json -->\n"
COLUMNS = ("lm-350m-unrolled", "lm-350m", "lm-1.3b", "lm-8.8b")
PAGES = {"README.md": 10, "docs/fused_layers.md": 4, "docs/automatic.md": 3, "docs/compact.md": 3}  # page: rows


@pytest.mark.parametrize("page", PAGES)
def test_the_memory_tables_are_those_of_the_committed_json(page):
  """A row is named after its mode in benchmarks/modes.py. A cell has the peak and, in brackets, the held state."""
  rows = json.loads((ROOT / "benchmarks/results/peak_memory.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): r for r in rows if r["optimizer"] == "adamw" and r["target"] == "h200"}
  modes = {mode.label: name for name, mode in MODES.items()}
  lines = (ROOT / page).read_text().split(MARK)[1].split("\n\n")[0].splitlines()[2:]
  table = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines)}
  assert len(table) == PAGES[page]
  for label, cells in table.items():
    of = [found[modes[label], model] for model in COLUMNS]
    want = [f"{r['total_bytes'] / r['parameters']:.2f} ({r['argument_bytes'] / r['parameters']:.2f})" for r in of]
    assert cells == want, label


def test_the_table_of_sharded_steps_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/peak_memory.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): r for r in rows if r.get("devices", 1) == 8}
  page = (ROOT / "docs/sharding.md").read_text()
  lines = (
    page.split("<!-- benchmarks/results/peak_memory.json, eight devices -->\n")[1].split("\n\n")[0].splitlines()[2:]
  )
  assert len(lines) == 6
  modes = {mode.label: name for name, mode in MODES.items()}
  for line in lines:
    label, *cells = [c.strip() for c in line.split("|")[1:-1]]
    want = []
    for model in ("lm-1.3b-fsdp8", "lm-70b-fsdp8"):
      r = found[modes[label], model]
      total, held = (8 * r[key] / r["parameters"] for key in ("total_bytes", "argument_bytes"))
      each = f"{r['total_bytes'] / 2**30:.1f} GiB{'' if r['fits'] else ', does not fit'}"
      want += [f"{total:.2f} ({held:.2f})", each]
    assert cells == want, label


def test_the_table_of_splits_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/peak_memory.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): 8 * r["total_bytes"] / r["parameters"] for r in rows if r.get("devices", 1) == 8}
  page = (ROOT / "docs/sharding.md").read_text()
  lines = page.split("<!-- benchmarks/results/peak_memory.json, splits -->\n")[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == 5
  modes = {mode.label: name for name, mode in MODES.items()}
  for line in lines:
    what, *cells = [c.strip() for c in line.split("|")[1:-1]]
    label, activations = what.rsplit(", activations ", 1)
    models = peak_memory.BY_BATCH if activations == "by batch" else peak_memory.SPLITS
    assert cells == [f"{found[modes[label], model]:.2f}" for model in models], what


def test_the_table_of_70b_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/peak_memory.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): r for r in rows if r["target"] == "h100"}
  page = (ROOT / "docs/offload.md").read_text()
  lines = page.split("<!-- benchmarks/results/peak_memory.json, 70B -->\n")[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == 4
  modes = {mode.label: name for name, mode in MODES.items()}
  for line in lines:
    label, *cells = [c.strip() for c in line.split("|")[1:-1]]
    want = []
    for model in ("lm-70b-h100", "lm-70b-fsdp8"):
      r = {key: size / 2**30 for key, size in found[modes[label], model].items() if key.endswith("bytes")}
      fits = "" if found[modes[label], model]["fits"] else ", does not fit"
      want += [f"{r['total_bytes']:.1f} + {r['host_bytes']:.0f} GiB{fits}"]
      want += [f"{r['to_device_bytes']:.0f}, {r['to_host_bytes']:.0f} GiB"]
    assert cells == want, label


def test_the_table_of_what_fits_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/what_fits.json").read_text())["rows"]
  assert len(rows) == 4 * len(what_fits.MODELS)
  page = (ROOT / "docs/offload.md").read_text()
  assert page.split("<!-- benchmarks/results/what_fits.json -->\n")[1].split("\n\n")[0] == what_fits.table(rows)


def test_the_table_of_host_memory_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/peak_memory.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): r for r in rows if r["optimizer"] == "adamw" and r["target"] == "h200"}
  page = (ROOT / "docs/offload.md").read_text()
  lines = page.split("<!-- benchmarks/results/peak_memory.json, host -->\n")[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == 8
  modes = {mode.label: name for name, mode in MODES.items()}
  for line in lines:
    label, *cells = [c.strip() for c in line.split("|")[1:-1]]
    for model, cell in zip(("lm-1.3b", "lm-8.8b", "lm-70b"), cells, strict=True):
      r = found.get((modes[label], model))
      if r is None:
        assert cell == "not compiled"
        continue
      total, host = (r.get(key, 0) / r["parameters"] for key in ("total_bytes", "host_bytes"))
      on_host = f" + {host:.2f}" if host else ""
      assert cell == f"{total:.2f}{on_host} = {r['total_bytes'] / 2**30:.1f} GiB", label
  exact, both = found["mpo-16-host", "lm-8.8b"], found["mpo-16-host-weights", "lm-8.8b"]
  assert f"takes {exact['total_bytes'] / exact['parameters']:.2f} bytes on the card" in README
  assert f"and {both['total_bytes'] / both['parameters']:.2f} with the weights of its layers" in README


def test_the_table_of_the_card_is_that_of_the_committed_json():
  report = json.loads((ROOT / "benchmarks/results/gpu_check.json").read_text())
  found = {(r["mode"], r["model"]): r for r in report["rows"] if "ratio" in r}
  page = (ROOT / "docs/performance.md").read_text()
  assert report["device"] == "NVIDIA H200"
  lines = page.split("<!-- benchmarks/results/gpu_check.json -->\n")[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == 7
  modes = {mode.label: name for name, mode in MODES.items()}
  for line in lines:
    label, *cells = [c.strip() for c in line.split("|")[1:-1]]
    want = []
    for model in ("lm-1.3b", "lm-1.3b-8x1024"):
      r = found.get((modes[label], model))
      peaks = r and [r[key] / 2**30 for key in ("peak_bytes", "predicted_bytes")]
      want += [f"{peaks[0]:.2f} ({peaks[1]:.2f})", f"{r['ratio']:.2f}"] if peaks else ["", ""]
    assert cells == want, label


def test_the_table_of_what_an_update_moves_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/update_traffic.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): r for r in rows}
  page = (ROOT / "docs/performance.md").read_text()
  lines = page.split("<!-- benchmarks/results/update_traffic.json -->\n")[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == 14
  modes = {mode.label: name for name, mode in MODES.items()}
  for line in lines:
    label, *cells = [c.strip() for c in line.split("|")[1:-1]]
    of = [found.get((modes[label], model)) for model in ("leaves", "lm-unrolled", "lm-125m", "lm-1.3b", "lm-8.8b")]
    want = ["" if of[0] is None else f"{of[0]['moved']:.1f}"]
    want += [f"{r['moved']:.1f} ({r['step_moved']:.1f})" for r in of[1:]]
    assert cells == [f"{of[1]['floor']:.2f}", *want], label


def test_the_table_of_cpu_times_is_that_of_the_committed_json():
  rows = json.loads((ROOT / "benchmarks/results/step_time.json").read_text())["rows"]
  found = {(r["mode"], r["model"]): r for r in rows if r["optimizer"] == "adamw" and not r["error"]}
  page = (ROOT / "docs/performance.md").read_text()
  lines = page.split("<!-- benchmarks/results/step_time.json -->\n")[1].split("\n\n")[0].splitlines()[2:]
  assert len(lines) == 9
  modes = {mode.label: name for name, mode in MODES.items()}
  models = "leaves-8x4m mlp lm-8m lm-8m-unrolled lm-24layers lm-125m-short lm-125m".split()
  for line in lines:
    label, *cells = [c.strip() for c in line.split("|")[1:-1]]
    of = [found.get((modes[label], m)) for m in models]
    assert cells == ["" if r is None else f"{r['ratio']:.2f}" for r in of], label


def test_every_trick_for_cpus_brings_three_percent_with_the_newest_jax():
  report = json.loads((ROOT / "benchmarks/results/cpu_tricks.json").read_text())
  text = (ROOT / "docs/performance.md").read_text().split("<!-- benchmarks/results/cpu_tricks.json -->\n")[1]
  assert text.split("\n\n")[0] == cpu_tricks.table(report["rows"])
  tricks = re.findall(r"^def ([a-z]\w*)", (ROOT / "optax_mpo/_core/xla_cpu.py").read_text(), re.M)
  assert set(cpu_tricks.TRICKS) == set(tricks)
  for trick in {*tricks} - {"kept_division"}:  # that one is there for bits
    assert max(row["ratio"] for row in report["rows"] if row["trick"] == trick) >= 1.03, trick


def test_the_accuracy_table_is_that_of_the_committed_json():
  tasks = json.loads((ROOT / "benchmarks/results/accuracy.json").read_text())["tasks"]
  assert all(len(runs) >= 3 for task in tasks.values() for runs in task["losses"].values())
  columns = [accuracy.table(tasks[name]["losses"]).splitlines()[2:] for name in ("lm", "digits")]
  text = (ROOT / "docs/compact.md").read_text().split("<!-- benchmarks/results/accuracy.json -->\n")[1]
  want = ["| ".join([lm[:-2].rstrip() + " ", *digits.split("| ")[2:]]) for lm, digits in zip(*columns, strict=True)]
  assert text.split("\n\n")[0].splitlines()[2:] == want


def test_the_table_of_packed_states_is_that_of_the_committed_json():
  report = json.loads((ROOT / "benchmarks/results/packed_state.json").read_text())
  assert [row["mode"] for row in report["rows"]] == list(packed_state.MODES)
  text = (ROOT / "docs/performance.md").read_text().split("<!-- benchmarks/results/packed_state.json -->\n")[1]
  assert text.split("\n\n")[0] == packed_state.table(report["rows"])


def test_the_table_of_clipping_is_that_of_the_committed_json():
  report = json.loads((ROOT / "benchmarks/results/clipping.json").read_text())
  assert len(report["rows"]) == len(clipping.CASES) * len(clipping.RULES)
  assert all(len(row["losses"]) >= 3 for row in report["rows"])
  text = (ROOT / "docs/accumulation.md").read_text().split("<!-- benchmarks/results/clipping.json -->\n")[1]
  assert text.split("\n\n")[0] == clipping.table(report["rows"])
