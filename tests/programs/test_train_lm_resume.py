"""examples/train_lm.py --resume: a run that is killed at any moment ends with the same weights as an unbroken run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lm_model
import pytest
import train_lm

from optax_mpo.checkpoint import Checkpointer
from tests.helpers import ROOT, assert_same_bits
from tests.programs.test_train_lm import TINY

pytestmark = pytest.mark.full

STEPS, EVERY = 60, 5


def flags(folder, *more):
  steps = ["--steps", str(STEPS), "--storage", "mpo8"]
  return [*TINY, *steps, "--output-dir", str(folder / "out"), "--checkpoint-dir", str(folder / "ckpt"), *more]


def weights(folder):
  """The params, state and losses of the last checkpoint."""
  config = train_lm.Config(
    layers=1, width=32, heads=2, context=16, batch=4, steps=STEPS, storage="mpo8", learning_rate=1e-2
  )
  model = lm_model.Transformer(1, 32, 2)
  storage = train_lm.make_storage("mpo8", model, train_lm.make_optimizer(config), "auto")
  like = train_lm.jax.eval_shape(
    lambda key: (*storage.init(lm_model.init_params(model, key)), train_lm.jnp.zeros(STEPS)), train_lm.jax.random.key(0)
  )
  with Checkpointer(folder / "ckpt/mpo8/steps") as checkpoints:
    step, saved = checkpoints.restore(like)
  assert step == STEPS
  return saved


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("uninterrupted")
  assert train_lm.main(flags(folder)) == 0
  return folder


def saved_steps(folder):
  return sorted(int(f.name) for f in folder.glob("ckpt/mpo8/steps/*") if f.name.isdigit())


def test_sigkill_at_random_moments(uninterrupted, tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, str(ROOT / "examples/train_lm.py"), "--resume", "--checkpoint-every", str(EVERY)]
  rng = random.Random(0)
  killed = 0
  while True:
    before = saved_steps(tmp_path)[-1:] or [0]
    with open(tmp_path / "out.txt", "w") as out:
      process = subprocess.Popen([*command, *flags(tmp_path)], stdout=out, stderr=subprocess.STDOUT, env=environment)
      deadline = time.monotonic() + 240
      # Wait for one more checkpoint, then kill the run after a random delay, perhaps in the middle of a checkpoint.
      while killed < 3 and process.poll() is None and (saved_steps(tmp_path)[-1:] or [0]) <= before:
        assert time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
        time.sleep(0.005)
      if killed < 3 and process.poll() is None:
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        killed += 1
      code = process.wait(240)
    text = (tmp_path / "out.txt").read_text()
    if code == 0:
      break
    assert code == -signal.SIGKILL, text
  assert killed
  assert "Going on after step" in text
  assert_same_bits(weights(tmp_path), weights(uninterrupted))
  runs = [json.loads((folder / "out/results.json").read_text())["runs"]["mpo8"] for folder in (tmp_path, uninterrupted)]
  assert runs[0]["losses"] == runs[1]["losses"]
  assert runs[0]["validation_loss"] == runs[1]["validation_loss"]


# If one read fails, Orbax closes its event loop, and the errors of tensorstore's other reads cannot be raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(uninterrupted, tmp_path, capsys):
  assert train_lm.main(flags(tmp_path, "--checkpoint-every", "20")) == 0
  for file in Path(tmp_path, "ckpt/mpo8/steps/60/arrays").rglob("d/*"):
    file.write_bytes(file.read_bytes()[:-100])
  capsys.readouterr()
  assert train_lm.main(flags(tmp_path, "--resume")) == 0
  out = " ".join(capsys.readouterr().out.split())
  assert "the checkpoint of step 60" in out
  assert "taking step 40" in out
  assert "Going on after step 40" in out
  assert_same_bits(weights(tmp_path), weights(uninterrupted))


def test_settings_that_changed_are_named(uninterrupted, capsys):
  for more, says in (
    (["--resume", "--batch", "8"], "--batch was 4"),
    ([], "add --resume, or name another --checkpoint-dir"),
  ):
    with pytest.raises(SystemExit):
      train_lm.main(flags(uninterrupted, *more))
    assert says in capsys.readouterr().err


def test_resume_needs_a_folder(capsys):
  with pytest.raises(SystemExit):
    train_lm.main([*TINY, "--resume"])
  assert "--resume needs the --checkpoint-dir" in capsys.readouterr().err


def test_resume_without_a_checkpoint_says_so(tmp_path, capsys):
  steps = ["--steps", "2", "--output-dir", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "ckpt")]
  assert train_lm.main([*TINY, *steps, "--storage", "bf16", "--resume"]) == 0
  out = " ".join(capsys.readouterr().out.split())
  assert "--resume: there is no checkpoint in" in out
  assert "training starts with step 1. If there should be one, look at --checkpoint-dir." in out
  assert train_lm.main([*TINY, *steps, "--storage", "mpo8", "--resume"]) == 0
  assert "to go on with one, pass --storage bf16." in " ".join(capsys.readouterr().out.split())
  assert train_lm.main([*TINY, *steps, "--storage", "bf16", "--resume"]) == 0  # what the message recommends
  out = " ".join(capsys.readouterr().out.split())
  assert "Going on after step 2" in out
  assert "no checkpoint" not in out
