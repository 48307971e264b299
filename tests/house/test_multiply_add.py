"""Tests that must equal f32 masters even with fused multiply-adds, which real processors have.

All other tests run without these instructions (tests/conftest.py says why). XLA reads the flag once per process, so
these tests run in separate processes.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.full
MODEL = "--layers 2 --width 32 --heads 2 --context 16 --batch 4 --eval-batches 2 --steps 25".split()


def run(*command) -> str:
  """Runs Python as on a real processor, and returns what it prints."""
  environment = os.environ | {"XLA_FLAGS": "", "OPTAX_MPO_TEST_MULTIPLY_ADD": "1", "OPTAX_MPO_TEST_OPTIMIZED": "1"}
  result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
  return result.stdout


@pytest.mark.parametrize(
  ("path", "chosen"),
  [
    ("transforms/test_exactness.py", "equal_f32_masters and not without_fusion and not operation_by_operation"),
    ("stepping/test_gradient_layout.py", "scan"),
    ("layers/test_layer.py", "hundred and adamw"),
  ],
)
def test_equal_with_fused_multiply_adds(path, chosen):
  options = ["-q", "-n=0", "-m", "not slow", "-p", "no:cacheprovider"]
  assert re.search(r"\d+ passed", run("-m", "pytest", *options, ROOT / "tests" / path, "-k", chosen))


@pytest.mark.parametrize("flags", [["--scan", "--remat"], []], ids=["scanned", "unrolled"])
@pytest.mark.few(0, full=1)
def test_a_language_model_has_equal_losses_with_them(flags, tmp_path):
  run(ROOT / "examples" / "train_lm.py", *MODEL, *flags, "--compare", "fp32", "mpo16", "--output-dir", tmp_path)
  runs = json.loads((tmp_path / "results.json").read_text())["runs"]
  assert len(runs["fp32"]["losses"]) == 25
  assert runs["mpo16"]["losses"] == runs["fp32"]["losses"]
  assert runs["mpo16"]["validation_loss"] == runs["fp32"]["validation_loss"]
