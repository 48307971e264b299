"""examples/train_lm.py in two processes with four CPU devices each, on loopback, against one process with eight.

Both run the same program on the same mesh and have the same losses, except for the order of sums over devices: XLA sums
inside a process, and Gloo between processes. This can change the last bit of an f32 gradient, which sometimes rounds a
bf16 weight differently.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import train_lm

from optax_mpo.checkpoint import Checkpointer
from tests.helpers import ROOT

pytestmark = pytest.mark.full

SMALL = "--layers 2 --width 64 --heads 2 --context 32 --batch 8 --steps 8 --eval-batches 2 --shard fsdp".split()


def start(folder, devices, *flags):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  command = [sys.executable, str(ROOT / "examples/train_lm.py"), *SMALL, "--cpu-devices", str(devices), *flags]
  return subprocess.Popen(
    [*command, "--output-dir", str(folder)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(*processes):
  out = []
  try:
    for process in processes:
      stdout, stderr = process.communicate(timeout=240)
      assert process.returncode == 0, stderr
      out.append(stdout)
  finally:
    for process in processes:
      process.kill()
  return out


def two_processes(folder, *flags):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  where = ["--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2"]
  return finish(*(start(folder, 4, *flags, *where, "--process-id", str(i)) for i in range(2)))


def run_of(folder):
  return json.loads((folder / "results.json").read_text())["runs"]["mpo16"]


def test_two_processes_have_the_losses_of_one_and_their_checkpoints_go_on_in_another(tmp_path, capsys):
  (said,) = finish(start(tmp_path / "one", 8))
  assert "8 x cpu, fsdp" in said
  checkpoints = ["--checkpoint-dir", str(tmp_path / "ckpt"), "--checkpoint-every", "3"]
  first, second = two_processes(tmp_path / "two", *checkpoints)
  assert "8 x cpu in 2 processes, fsdp" in first
  for word in ("fsdp", "loss"):  # not by lines: those of Gloo, which its threads write, may be mixed up
    assert word in first
    assert word not in second, "one process does the talking"
  one, two = run_of(tmp_path / "one"), run_of(tmp_path / "two")
  assert len(one["losses"]) == len(two["losses"]) == 8
  assert one["losses"][0] == two["losses"][0]
  np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-3)  # a bf16 weight may round differently, as above
  assert one["losses"][0] - one["losses"][-1] > 0.1, "nothing was trained"

  # One process with a single device restores what two processes saved in parts.
  assert Checkpointer(tmp_path / "ckpt/mpo16/steps").steps() == [3, 6, 8]
  flags = [*SMALL[:-2], *checkpoints, "--resume", "--output-dir", str(tmp_path / "three")]
  assert train_lm.main(flags) == 0
  assert "Going on after step 8" in capsys.readouterr().out
  assert run_of(tmp_path / "three")["losses"] == two["losses"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--num-processes", "2"], "needs --coordinator-address"),
    (["--process-id", "1"], "--process-id is 1"),
    (["--shard", "data", "--batch", "12"], "--batch 12 does not split over 8 devices: make it a multiple, such as 16"),
  ],
)
def test_flags_that_cannot_work(flags, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    train_lm.main([*SMALL, *flags, "--output-dir", str(tmp_path)])
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err
