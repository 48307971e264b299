"""The README's quickstart runs as it stands, and its test command is the one that CI runs."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_quickstart_runs():
  (code,) = blocks("python")
  lines = [line for line in code.splitlines() if line.strip()]
  assert len(lines) <= 15
  names: dict = {}
  exec(compile(code, "README.md", "exec"), names)
  assert names["params"]["w"].dtype == jnp.bfloat16
  # The first step of AdamW moves each weight by the learning rate (and its own decay, 1e-4 of that).
  moved = jax.tree.leaves(names["masters"])[1] - 0.1
  np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)


def test_two_commands_stand_alone_and_name_files_that_exist():
  commands = [block.strip() for block in blocks("bash")]
  assert len(commands) == 2
  for command in commands:
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
  assert commands[0].endswith(".venv/bin/python examples/train_lm.py")
  assert commands[1].endswith(".venv/bin/python -m pytest")
  assert (ROOT / "examples/train_lm.py").exists()
  for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
    assert (ROOT / target).exists(), target


def test_ci_takes_its_test_command_from_the_readme():
  assert "README.md" in (ROOT / ".ci/run").read_text()
