"""Tests that must equal f32 masters even with fused multiply-adds, which real processors have.

All other tests run without these instructions (tests/conftest.py says why). XLA reads the flag once per process, so
these tests run in separate processes.
"""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.full
@pytest.mark.parametrize(
  "chosen",
  [
    ["transforms/test_exactness.py", "-k", "equal_f32_masters and not without_fusion and not operation_by_operation"],
    ["stepping/test_gradient_layout.py", "-k", "scan"],
    ["layers/test_layer.py", "-k", "hundred"],
    ["programs/test_train_lm.py", "-k", "fp32_and_mpo16"],
  ],
  ids=lambda chosen: chosen[0],
)
def test_equal_with_fused_multiply_adds(chosen):
  environment = os.environ | {"XLA_FLAGS": "", "OPTAX_MPO_TEST_MULTIPLY_ADD": "1", "OPTAX_MPO_TEST_OPTIMIZED": "1"}
  command = [sys.executable, "-m", "pytest", "-q", "-n=0", "-m", "not slow", "-p", "no:cacheprovider"]
  command += [ROOT / "tests" / chosen[0], *chosen[1:]]
  run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
  assert re.search(r"\d+ passed", run.stdout)
