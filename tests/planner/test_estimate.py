"""Estimated peaks against those of compiled steps, of benchmarks/peak_memory.py."""

import dataclasses
import json
from pathlib import Path

import pytest

import benchmarks
from optax_mpo._planner import estimate
from optax_mpo._planner.decoder import LM_SIZES
from optax_mpo._planner.remembered import Figures
from optax_mpo._planner.storages import STORAGES

ROWS = json.loads(Path(benchmarks.__path__[0], "results", "peak_memory.json").read_text())["rows"]
# The decoder of each model of the benchmark, with its sequences and their tokens.
DECODERS = {f"lm-{size}": (LM_SIZES[size], 1, 1024) for size in ("125m", "350m", "1.3b", "8.8b", "70b")} | {
  "lm-350m-tied": (dataclasses.replace(LM_SIZES["350m"], tied=True), 1, 1024),
  "lm-1.3b-batch8": (LM_SIZES["1.3b"], 8, 1024),
  "lm-1.3b-4x2048": (LM_SIZES["1.3b"], 4, 2048),
  "lm-1.3b-fsdp8": (LM_SIZES["1.3b"], 8, 1024),
  "lm-70b-fsdp8": (LM_SIZES["70b"], 8, 1024),
}


def compiled(is_on_host):
  return [
    row
    for row in ROWS
    if row["model"] in DECODERS
    and row["optimizer"] == "adamw"
    and row["mode"] in STORAGES
    and STORAGES[row["mode"]].is_on_host == is_on_host
  ]


def estimated(row):
  config, batch, context = DECODERS[row["model"]]
  held = Figures(row["argument_bytes"], row["host_bytes"])
  return estimate.with_peak(held, config, row["mode"], batch, context, row["devices"]).peak


@pytest.mark.parametrize("is_on_host", [False, True])
def test_estimates_are_near_what_is_compiled(is_on_host):
  """Within 8%. What is fetched from the host is known less well: within 1.6 GiB of a card of 80."""
  rows = compiled(is_on_host)
  assert len(rows) > 10
  for row in rows:
    off = abs(estimated(row) - row["total_bytes"])
    assert off <= (1.6 * 2**30 if is_on_host else 0.08 * row["total_bytes"]), (row["model"], row["mode"])


def test_storages_without_released_gradients_take_more():
  config, held = LM_SIZES["1.3b"], Figures(2**30, 0)
  peaks = [estimate.with_peak(held, config, storage, 1, 1024, 1).peak for storage in ("mpo-16-auto", "mpo-16")]
  assert peaks[1] - peaks[0] == 2 * 1345423360


def test_without_rematerialisation_there_is_no_estimate():
  config = dataclasses.replace(LM_SIZES["1.3b"], remat=False)
  assert estimate.with_peak(Figures(1, 2), config, "mpo-16", 1, 1024, 1) == Figures(1, 2)
