"""examples/train_digits.py: Flax Linen and NNX on real images, with the commands of the README."""

import re
import subprocess
import sys

import numpy as np
import pytest
import train_digits

from tests.helpers import ROOT

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("default_promotion")]  # an example runs as users run it

COMMANDS = re.findall(r"`(examples/train_digits\.py [^`]*)`", (ROOT / "README.md").read_text())


ROW = re.compile(r"^(\w+) +([\d.]+) +([\d.]+) +([\d.]+) ", re.MULTILINE)


def test_it_learns_the_digits():
  settings = train_digits.Settings(model="linen", epochs=4)
  result = train_digits.train(settings)
  assert result.accuracy > 0.93
  assert result.train_loss < result.losses[0] / 5
  bytes_per_parameter = (result.weight_bytes + result.state_bytes) / result.parameters
  assert bytes_per_parameter == pytest.approx(12, abs=0.01)  # plus the step counts


def test_a_run_is_the_same_each_time():
  settings = train_digits.Settings(model="nnx", epochs=1)
  first, second = train_digits.train(settings), train_digits.train(settings)
  np.testing.assert_array_equal(first.losses, second.losses)


def test_one_table_for_several_storages(capsys):
  assert train_digits.main(["--storage", "fp32", "compact", "--epochs", "1"]) == 0
  rows = ROW.findall(capsys.readouterr().out)
  assert rows[0][:3] == ("fp32", "4.00", "8.00")
  held = {name: float(total) for name, _, _, total in rows}
  # Small leaves, such as the scales of norms, keep f32 moments: a fifth of a byte per parameter in this small model.
  assert held == pytest.approx({"fp32": 12, "compact": 5.32}, abs=0.01)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme(command):
  done = subprocess.run(
    [sys.executable, *command.split(), "--epochs", "1"], cwd=ROOT, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  assert "accuracy" in done.stdout


def test_the_readme_names_both():
  assert [command.split()[-1] for command in COMMANDS] == ["linen", "nnx"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--epochs", "0"], "--epochs is 0"),
    (["--batch-size", "9999"], "at most 1437"),
    (["--seed", "-1"], "--seed is -1"),
  ],
)
def test_flags_that_cannot_work(flags, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    train_digits.main(flags)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err
