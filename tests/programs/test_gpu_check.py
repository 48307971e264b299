"""benchmarks/gpu_check.py survives what can go wrong on a card, and gpu_claims.py judges its figures.

A script without JAX plays the card. The `full` test runs all parts on a CPU, where no figure means anything, with some
modes of each; the `slow` one with all.
"""

import importlib.util
import json
import sys

import numpy as np
import pytest

from benchmarks import gpu_check, gpu_claims, gpu_host, gpu_parts, modes
from tests.helpers import ROOT

DOCS = ROOT / "docs"
CARD = """
import json, sys, time
kind, model, *modes, seconds = sys.argv[1:]
with open({log!r}, "a") as log:
  log.write(" ".join([kind, model, *modes]) + "\\n")
fails = {fails!r}.get(kind + " " + model)
for index, mode in enumerate(modes):
  if fails == "memory" and index == 1:
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")
  if fails == "hangs" and index == 1:
    time.sleep(60)
  if fails == "raises" and index == 1:
    print("ROW", json.dumps(dict(model=model, mode=mode, error="ValueError: no")), flush=True)
  elif fails == "dies":
    sys.exit(3)
  else:
    print("noise", flush=True)
    print("ROW", json.dumps(dict(model=model, mode=mode, seconds=1.0, ratio=0.5)), flush=True)
"""
FAILS = {
  "times lm-1.3b": "memory",
  "sweep codec": "hangs",
  "times leaves-8x64m": "raises",
  "exactness lm-tiny": "dies",
}


@pytest.fixture
def card(tmp_path, monkeypatch):
  """Plays a card: `card(fails)` sets what goes wrong in which part. Returns the path of the log of parts."""

  def play(fails, device="DEVICE|gpu|a card"):
    log, script = tmp_path / "log", tmp_path / "card.py"
    log.write_text("")
    script.write_text(CARD.format(log=str(log), fails=fails))
    monkeypatch.setattr(gpu_check, "COMMAND", (sys.executable, "-I", "-S", str(script)))
    monkeypatch.setattr(gpu_check, "PROBE", (sys.executable, "-I", "-S", "-c", f"print({device!r})"))
    monkeypatch.setattr(gpu_check, "driver", lambda: "570")
    return log

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # neither flashoptim-jax nor PyTorch
  return play


def check(path, *arguments):
  """Runs the script. Returns its exit status and the report."""
  status = gpu_check.main(["--gpu", "--output-dir", str(path), *arguments])
  return status, json.loads((path / "gpu_check.json").read_text())


def errors_of(report):
  return {gpu_check.key_of(row): row["error"] for row in report["rows"] if "error" in row}


def test_what_fails_on_a_card_leaves_the_rest_and_resume_goes_on(card, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(gpu_check, "MOST_SECONDS", 2)
  card(FAILS)
  status, report = check(tmp_path)
  parts = gpu_check.parts_of("gpu")
  everything = {(part.kind, part.model, mode) for part in parts for mode in part.modes}
  assert {gpu_check.key_of(row) for row in report["rows"]} == everything
  errors = errors_of(report)
  memory = [errors.pop(("times", "lm-1.3b", mode)) for mode in (*gpu_check.MAIN[1:], gpu_check.OTHERS[1])]
  assert all("RESOURCE_EXHAUSTED" in error for error in memory)
  assert errors == {
    **{("exactness", "lm-tiny", mode): "died: exit code 3" for mode in gpu_check.EXACTNESS},
    **{("sweep", "codec", mode): "no time left" for mode in gpu_check.CODEC[1:]},
    ("times", "leaves-8x64m", gpu_check.MAIN[1]): "ValueError: no",
  }
  shown = capsys.readouterr().out
  assert status == 1
  assert shown.count("RESOURCE_EXHAUSTED") >= 4
  assert "a card, JAX" in shown
  log = card({})
  status, again = check(tmp_path, "--resume")
  assert status == 0
  assert {gpu_check.key_of(row) for row in again["rows"]} == everything
  assert sorted(log.read_text().splitlines()) == sorted(
    [
      "exactness lm-tiny exactness",
      "exactness lm-tiny exactness-compact",
      "sweep codec codec-8 codec-4",
      " ".join(["times lm-1.3b", *gpu_check.MAIN[1:]]),
      f"times lm-1.3b {gpu_check.OTHERS[1]}",
      f"times leaves-8x64m {gpu_check.MAIN[1]}",
    ]
  )


def test_each_figure_is_in_the_file_before_the_next_part_starts(card, tmp_path, monkeypatch):
  card({})
  written, run_part = [], gpu_check.run_part

  def watched(part, seconds):
    report = gpu_check.read(tmp_path / "gpu_check.json")
    written.append(len(report["rows"]) if report else 0)
    yield from run_part(part, seconds)

  monkeypatch.setattr(gpu_check, "run_part", watched)
  check(tmp_path)
  counts = np.cumsum([0, *(len(part.modes) for part in gpu_check.parts_of("gpu"))])
  assert written == counts[:-1].tolist()


def test_without_time_every_part_is_a_row_that_says_so(card, tmp_path, capsys):
  log = card({})
  status, report = check(tmp_path, "--seconds", "1")
  assert status == 1
  assert set(errors_of(report).values()) == {"no time left"}
  assert not log.read_text()
  assert "no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("device", "reason"),
  [
    pytest.param("DEVICE|cpu|cpu", "no GPU: JAX finds only cpu", id="no card"),
    pytest.param("the driver is older than CUDA 13", "no GPU: exit code 0", id="other driver"),
  ],
)
def test_without_a_card_the_report_says_so_and_replaces_no_figures(card, tmp_path, capsys, device, reason):
  log = card({}, device)
  status, report = check(tmp_path)
  assert status == 1
  assert report["device"] == reason
  assert set(errors_of(report).values()) == {reason}
  assert len(report["rows"]) > 20
  assert not log.read_text()
  assert reason in capsys.readouterr().out
  card({})
  _, measured = check(tmp_path)
  card({}, device)
  assert check(tmp_path) == (1, measured)
  assert check(tmp_path, "--resume")[1] == measured


def test_another_card_does_not_continue_a_report(card, tmp_path, capsys):
  card({"sweep codec": "raises"})
  _, report = check(tmp_path)
  log = card({}, "DEVICE|gpu|another card")
  status, kept = check(tmp_path, "--resume")
  assert status == 1
  assert not log.read_text()
  assert "is of a card with JAX" in capsys.readouterr().out
  assert [row for row in kept["rows"] if "error" not in row] == [row for row in report["rows"] if "error" not in row]


def test_rivals_are_measured_where_they_are_installed(monkeypatch):
  def modes_with(*installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    return {mode for part in gpu_check.parts_of("gpu") for mode in part.modes}

  assert modes_with("flashoptim_jax") - modes_with() == {"flash-24"}
  assert modes_with("torch") - modes_with() == set(gpu_check.TORCH)


def test_every_part_names_a_function_a_model_and_modes_that_exist():
  parts, others = gpu_parts.parts(), {*gpu_check.EXACTNESS, *gpu_check.CODEC, *gpu_check.TORCH}
  for platform in gpu_check.SIZES:
    for kind, model, some in gpu_check.parts_of(platform):
      assert kind in parts
      assert model in gpu_parts.MODELS or model == "codec"
      assert all(mode.removeprefix("train ") in {*modes.MODES, *others} for mode in some)
      assert kind != "host" or set(some) <= set(gpu_host.ON_DEVICE)


class Card:
  """A step on a card with memory for two of them; `mpo-8` runs out of it in its second round."""

  live = 0

  def __init__(self, mode):
    if mode == "wrong":
      raise ValueError("no such thing")
    if Card.live == 2:
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    Card.live += 1
    self.mode, self.runs = mode, 0

  def __del__(self):
    Card.live -= hasattr(self, "mode")

  def run(self, count):
    self.runs += 1
    if self.mode == "mpo-8" and self.runs == 2:
      raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return 0.1, {"optax-f32": 1.0}.get(self.mode, 0.5)


def test_modes_for_which_memory_is_short_are_timed_after_the_others(monkeypatch, capsys):
  Card.live = 0
  monkeypatch.setattr(gpu_parts, "warm", lambda mode, model: (Card(mode), 0.1))
  modes_ = ["mpo-16", "mpo-4", "wrong", "mpo-16-auto", "mpo-8"]
  gpu_parts.times("lm-tiny", modes_, 60)
  rows = {row["mode"]: row for row in map(json.loads, capsys.readouterr().out.replace("ROW ", "").splitlines())}
  assert [mode for mode in rows if rows[mode].get("ratio") == 0.5] == ["mpo-16", "mpo-4", "mpo-16-auto"]
  assert "no such thing" in rows["wrong"]["error"]
  assert "RESOURCE_EXHAUSTED" in rows["mpo-8"]["error"]  # also without the others


def test_the_bus_moves_ten_bytes_per_parameter_each_way_and_weights_twice_there():
  model = gpu_parts.MODELS["lm-1.3b"]()
  state = np.array(gpu_host.moved(modes.MODES["mpo-16-host"].build(model, "adamw")))
  both = np.array(gpu_host.moved(modes.MODES["mpo-16-host-weights"].build(model, "adamw")))
  np.testing.assert_allclose(state / model.count, 10, rtol=1e-3)
  layers = sum(np.prod(leaf.shape) for leaf in model.params["blocks"].values())
  np.testing.assert_allclose(both - state, [4 * layers, 2 * layers], rtol=1e-3)
  rates = {"to_card": 50.0, "to_host": 40.0, "both": 60.0}
  assert [gpu_host.bus_seconds(*way, rates) for way in ((100, 0), (0, 100), (100, 80))] == [2.0, 2.5, 3.0]


SOME = {
  "MAIN": ("mpo-16-auto-kernels", "mpo-compact-auto"),
  "OTHERS": (),
  "HOST": ("mpo-compact-host", "mpo-16-host-weights"),
  "EXACTNESS": ("exactness",),
  "TRAINED": ("train optax-f32", "train mpo-16-auto"),
}


@pytest.mark.parametrize(
  "chosen",
  [
    pytest.param(SOME, id="some modes", marks=pytest.mark.full),
    pytest.param({}, id="all modes", marks=pytest.mark.slow),
  ],
)
def test_all_parts_run_on_a_cpu_and_print_and_write(chosen, tmp_path, monkeypatch, capsys):
  for name, modes_ in chosen.items():
    monkeypatch.setattr(gpu_check, name, modes_)
  monkeypatch.setattr(gpu_check, "MOST_SECONDS", 3000)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))  # as run_gpu.sh does
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  assert gpu_check.main(["--output-dir", str(tmp_path), "--seconds", "3000"]) == 0
  report = json.loads((tmp_path / "gpu_check.json").read_text())
  rows = {gpu_check.key_of(row): row for row in report["rows"]}
  parts = gpu_check.parts_of("cpu")
  rivals = {(part.kind, part.model, "optax-f32") for part in parts if part.kind == "times"}  # timed with each mode
  assert set(rows) == {(part.kind, part.model, mode) for part in parts for mode in part.modes} | rivals
  assert set(rows["exactness", "lm-tiny", "exactness"]["share_of_difference"].values()) == {0.0}
  assert all(row["violations"] == 0 for row in report["rows"] if row["part"] == "sweep")
  timed = [row for row in report["rows"] if row["part"] == "times"]
  assert all(row["quartiles"] for row in timed)
  assert all(row["ratio"] > 0 for row in timed if gpu_check.key_of(row) not in rivals)
  assert all(row["copy_share"] > 0 for row in report["rows"] if row["model"].startswith("leaves"))
  assert all(row["bus_share"] > 0 and row["to_card_bytes"] > 0 for row in report["rows"] if row["part"] == "host")
  assert all(row["steps"] == 20 and row["last_losses_mean"] < 6 for row in report["rows"] if row["part"] == "train")
  assert "leaves-8x64k" in capsys.readouterr().out


def test_the_tables_of_claims_are_what_the_committed_json_says():
  """The README has the claims that a card has measured, also those that failed, and docs/gpu.md has all."""
  claims = gpu_claims.judged(json.loads(gpu_claims.COMMITTED.read_text()))
  measured = [claim for claim in claims if claim[-1] != "not measured"]
  for page, expected in ((DOCS / "gpu.md", claims), (ROOT / "README.md", measured)):
    lines = page.read_text().split("<!-- benchmarks/gpu_claims.py -->\n")[1].split("\n\n")[0].splitlines()[2:]
    assert [tuple(c.strip() for c in line.split("|")[1:-1]) for line in lines] == expected


def row(model, mode, **figures):
  return {"model": model, "mode": mode} | figures


def test_a_claim_without_its_rows_is_no_success(tmp_path, capsys):
  path = tmp_path / "gpu_check.json"
  path.write_text(
    json.dumps({"device": "a card", "jax": "0", "rows": [row("lm-1.3b", gpu_claims.EXACT, error="died")]})
  )
  assert gpu_claims.main([str(path)]) == 1
  assert capsys.readouterr().out.count("not measured") == len(gpu_claims.CLAIMS)


def test_all_claims_can_hold_and_each_can_fail():
  def verdicts(ratio, share, peak, differing, loss):
    models = ("lm-1.3b", "lm-1.3b-8x1024", "lm-1.3b-32x1024")
    rows = [
      row(model, mode, ratio=ratio, peak_bytes=peak, predicted_bytes=1000)
      for model in models
      for mode in (gpu_claims.EXACT, gpu_claims.COMPACT)
    ]
    rows += [row("leaves-8x64m", mode, copy_share=share) for mode in (gpu_claims.EXACT, gpu_claims.COMPACT)]
    names = ["optax-f32", *gpu_claims.BIT_STEPS, gpu_claims.MOSAIC, *gpu_claims.HOST_STEPS]
    for mode in gpu_check.EXACTNESS:
      rows.append(row("lm-tiny", mode, share_of_difference=dict.fromkeys(names, differing)))
    rows += [row("codec", mode, violations=int(differing > 0)) for mode in gpu_check.CODEC]
    figures = {"bus_share": share, "device_ratio": ratio + 0.1, "peak_bytes": peak, "predicted_bytes": 1000}
    rows += [row(model, mode, seconds=ratio, **figures) for model in models for mode in gpu_check.HOST]
    rows += [row(model, "optax-f32-host", seconds=1.0) for model in models]
    rows += [row("text-350m", mode, last_losses_mean=loss) for mode in gpu_check.TRAINED]
    rows.append(row("text-350m", "train optax-f32", last_losses_mean=2.0))
    return {text: holds for text, _, holds in gpu_claims.judged({"device": "a card", "jax": "0", "rows": rows})}

  good = verdicts(0.9, 0.85, 1029, 0.0, 2.01)
  assert len(good) == len(gpu_claims.CLAIMS)
  assert set(good.values()) == {"yes"}
  assert set(verdicts(1.1, 0.65, 1031, 1e-6, 2.1).values()) == {"no"}


def test_figures_of_all_parts_of_a_mode_count_unless_they_failed():
  rows = [
    row("lm-1.3b", gpu_claims.EXACT, peak_bytes=2**30, predicted_bytes=2**30),
    row("lm-1.3b", gpu_claims.EXACT, ratio=0.5),
    row("lm-1.3b", gpu_claims.COMPACT, ratio=0.5, error="only one round"),
  ]
  report = {"device": "a card", "jax": "0", "rows": rows}
  (line,) = gpu_claims.by_mode(report)
  assert line == (modes.MODES[gpu_claims.EXACT].label, "1.00 (1.00)", "0.50", "", "")
  found = {text: figure for text, figure, _ in gpu_claims.judged(report) if figure}
  assert list(found.values()) == ["0.50", "0.0%"]
