"""benchmarks/gpu_check.py runs on a CPU too, without what only a GPU can tell."""

import json

import pytest

from benchmarks import gpu_check

pytestmark = pytest.mark.full


def test_it_measures_prints_and_writes(tmp_path, capsys):
  arguments = ["--models", "leaves-8x64k", "--modes", "mpo-16-layer", "mpo-16-auto"]
  assert gpu_check.main([*arguments, "--output-dir", str(tmp_path)]) == 0
  report = json.loads((tmp_path / "gpu_check.json").read_text())
  assert [(row["model"], row["mode"]) for row in report["rows"]] == [
    ("leaves-8x64k", "mpo-16-auto")  # the optimizer alone is not written with layers
  ]
  assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["peak_bytes"] is None for row in report["rows"])
  assert report["rows"][0]["copy_share"] > 0
  assert "leaves-8x64k" in capsys.readouterr().out
