"""benchmarks/clipping.py trains with each rule, prints a table and writes its JSON."""

import json

import jax
import numpy as np
import pytest

from benchmarks import clipping
from examples.lm_model import init_params


@pytest.mark.full
def test_it_trains_prints_and_writes(tmp_path, capsys):
  arguments = ["--cases", "sgd-high", "--seeds", "1", "--steps", "3", "--output-dir", str(tmp_path)]
  assert clipping.main(arguments) == 0
  report = json.loads((tmp_path / "clipping.json").read_text())
  assert [row["clipping"] for row in report["rows"]] == list(clipping.RULES)
  assert all(np.isfinite(row["losses"]).all() and len(row["losses"]) == 1 for row in report["rows"])
  assert len({row["losses"][0] for row in report["rows"]}) == len(report["rows"])  # each rule clips in its own way
  assert clipping.table(report["rows"]) in capsys.readouterr().out


def test_the_rms_is_that_of_all_weights_at_the_global_norm():
  params = jax.eval_shape(lambda: init_params(clipping.MODEL, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == clipping.PARAMETERS
