"""benchmarks/gpu_check.py also runs on a CPU, without figures that need a GPU, and gpu_claims.py checks its figures."""

import json
import sys

import pytest

from benchmarks import gpu_check, gpu_claims
from tests.helpers import ROOT

DOCS = ROOT / "docs"


@pytest.mark.full
def test_it_measures_prints_and_writes(tmp_path, capsys):
  arguments = ["--models", "leaves-8x64k", "--modes", "mpo-16-layer", "mpo-16-auto"]
  assert gpu_check.main([*arguments, "--output-dir", str(tmp_path)]) == 0
  report = json.loads((tmp_path / "gpu_check.json").read_text())
  assert [(row["model"], row["mode"]) for row in report["rows"]] == [
    ("leaves-8x64k", "mpo-16-auto")  # the optimizer alone has no layers
  ]
  assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["peak_bytes"] is None for row in report["rows"])
  assert report["rows"][0]["copy_share"] > 0
  assert "leaves-8x64k" in capsys.readouterr().out


def test_the_table_of_claims_is_what_the_committed_json_says():
  report = json.loads(gpu_claims.COMMITTED.read_text())
  lines = (
    (DOCS / "gpu.md").read_text().split("<!-- benchmarks/gpu_claims.py -->\n")[1].split("\n\n")[0].splitlines()[2:]
  )
  assert [tuple(c.strip() for c in line.split("|")[1:-1]) for line in lines] == gpu_claims.judged(report)


def row(model, mode, **figures):
  return {"model": model, "mode": mode} | figures


def test_a_claim_without_its_rows_is_no_success(tmp_path, capsys):
  path = tmp_path / "gpu_check.json"
  path.write_text(
    json.dumps({"device": "a card", "jax": "0", "rows": [row("lm-1.3b", gpu_claims.EXACT, error="died")]})
  )
  assert gpu_claims.main([str(path)]) == 1
  assert capsys.readouterr().out.count("not measured") == len(gpu_claims.CLAIMS)


def test_all_claims_can_hold_and_each_can_fail(tmp_path):
  def verdicts(ratio, share, peak, differing):
    rows = [
      row(model, mode, ratio=ratio, peak_bytes=peak, predicted_bytes=1000)
      for model in ("lm-1.3b", "lm-1.3b-8x1024")
      for mode in (gpu_claims.EXACT, gpu_claims.COMPACT)
    ]
    rows += [row("leaves-8x64m", mode, copy_share=share) for mode in (gpu_claims.EXACT, gpu_claims.COMPACT)]
    names = ["optax-f32", "layer", "layer with kernels", "auto", "auto with kernels"]
    rows.append(row("lm-tiny", "exactness", share_of_difference=dict.fromkeys(names, differing)))
    return {holds for _, _, holds in gpu_claims.judged({"device": "a card", "jax": "0", "rows": rows})}

  assert verdicts(0.9, 0.85, 1029, 0.0) == {"yes"}
  assert verdicts(1.1, 0.8, 1031, 1e-6) == {"no"}


def test_a_part_that_fails_or_has_no_time_is_a_row_with_an_error(monkeypatch):
  assert gpu_check.run_part("lm-tiny", "mpo-16-auto", seconds=1)["error"] == "no time left"
  monkeypatch.setattr(sys, "executable", "false")
  assert gpu_check.run_part("lm-tiny", "mpo-16-auto", seconds=60) == row("lm-tiny", "mpo-16-auto", error="died")
