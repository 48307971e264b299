"""Sharded steps (FSDP), compiled by XLA:GPU for eight cards: bytes on each card, and communication between cards.

Beyond its state, the 1.3B model itself needs 2.55 bytes per parameter over all cards. At the head, each card has the
gathered bf16[2048, 32000], logits in f32 and in bf16, and the activations of 24 layers.
"""

import functools
import math
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import pytest

import optax_mpo as mpo
from benchmarks import peak_memory
from benchmarks.models import language_model
from benchmarks.modes import MODES
from optax_mpo._planner import fsdp

pytestmark = pytest.mark.full

# Measured bytes per parameter over all cards, rounded up to the next 0.05. Optax with f32 masters takes 19.49.
AT_MOST = {
  ("mpo-16-layer", "lm-1.3b-fsdp8"): 14.75,
  ("mpo-16-auto", "lm-1.3b-fsdp8"): 14.75,
  ("mpo-16-auto", "lm-1.3b-fsdp8-columns"): 15.3,
  ("mpo-16-auto", "lm-1.3b-fsdp8-largest"): 14.5,
  ("mpo-16-auto", "lm-1.3b-fsdp8-by-batch"): 14.7,
  ("mpo-16-auto", "lm-1.3b-fsdp8-columns-by-batch"): 14.45,
  ("mpo-16-layer", "lm-1.3b-fsdp8-columns-by-batch"): 14.4,
  ("mpo-16-auto", "lm-1.3b-fsdp8-largest-by-batch"): 14.45,
  ("mpo-compact-auto", "lm-1.3b-fsdp8"): 7.9,
  ("mpo-compact-auto", "lm-1.3b-fsdp8-columns"): 8.45,
  ("mpo-compact-auto", "lm-1.3b-fsdp8-largest"): 7.65,
  ("mpo-compact-auto", "lm-1.3b-fsdp8-by-batch"): 7.85,
  ("mpo-compact-auto", "lm-1.3b-fsdp8-columns-by-batch"): 7.6,
  ("mpo-compact-auto", "lm-1.3b-fsdp8-largest-by-batch"): 7.6,
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "model"), AT_MOST)
def test_bytes_of_the_1_3b_model(mode, model):
  row = peak_memory.measure(model, mode, "adamw", "h200")
  assert not row.error, row.error
  assert row.per_parameter(row.total_bytes) <= AT_MOST[mode, model]


@pytest.mark.parametrize(("mode", "again"), {"mpo-16-host": 0.0, "mpo-16-host-weights": 2.0}.items())
@pytest.mark.few(0, full=1)
def test_each_card_fetches_its_part_of_what_its_host_holds(mode, again):
  """Once each way, and the weights of layers a second time, since they are recomputed. No host has a second copy."""
  row = peak_memory.measure("lm-1.3b-fsdp8", mode, "adamw", "h100")
  assert not row.error, row.error
  layers = sum(p.size for p in jax.tree.leaves(language_model("1.3b").params["blocks"]) if p.size > 2**16)
  assert row.to_host_bytes == row.host_bytes
  assert row.to_device_bytes == row.host_bytes + again * layers / 8


@pytest.mark.slow
def test_a_70b_model_fits_on_eight_h100_with_compact_state_and_not_with_f32_masters():
  compact = peak_memory.measure("lm-70b-fsdp8", "mpo-compact-auto", "adamw", "h100")
  assert not compact.error, compact.error
  assert compact.fits
  assert compact.per_parameter(compact.total_bytes) <= 5.85
  model = language_model("70b", batch=8)
  _, params, opt_state, _ = fsdp.shard(MODES["optax-f32"].build(model, "adamw"), model.batch, 8)
  assert fsdp.held_bytes((params, opt_state)) > 80 * 2**30  # the held state alone does not fit


@functools.cache
def collectives(mode, split="rows"):
  """Compiles a step of the 125M model.

  Returns:
    How many elements go between cards, by operation, inside the loops over layers and outside of them; and the bytes
    per parameter over all cards.
  """
  model = language_model("125m", batch=8)
  step, *args = fsdp.shard(MODES[mode].build(model, "adamw"), model.batch, 8, split)
  with tempfile.TemporaryDirectory() as folder:
    report = mpo.gpu_memory(step, *args, target="h200", devices=8, dump_to=folder)
    texts = [path.read_text() for path in Path(folder).glob("*gpu_after_optimizations.txt")]
  (text,) = (t for t in texts if "num_partitions=8" in t)
  computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
  loops = _called([name for body in computations.values() for name in _named(body, "body|condition")], computations)
  inside, outside = Counter(), Counter()
  for computation, body in computations.items():
    counts = inside if computation in loops else outside
    for shapes, name, start in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", body):
      arrays = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
      # The result of a -start operation contains its operands, followed by its real results.
      counts[name] += sum(arrays[len(arrays) // 2 :] if start and name == "all-gather" else arrays)
  return inside, outside, 8 * report.total_bytes / model.count


def _named(body, fields):
  """The computations that the operations of one name in these fields."""
  lists = re.findall(rf"\b(?:{fields})=\{{?(%[\w.-]+(?:, %[\w.-]+)*)", body)
  return [name.strip("% ") for listed in lists for name in listed.split(",")]


def _called(names, computations):
  """These computations, and all that they call: a collective may be in one of its own, in a loop or not."""
  found, left = set(), list(names)
  while left:
    name = left.pop()
    if name in computations and name not in found:
      found.add(name)
      left += _named(computations[name], "body|condition|calls|to_apply|branch_computations|called_computations")
  return found


@pytest.mark.parametrize("mode", ["mpo-16-layer", "mpo-compact-auto"])
@pytest.mark.few(0, full=1)
def test_no_more_goes_between_cards_than_in_the_ordinary_step(mode):
  (ordinary, ordinary_outside, _), (ours, ours_outside, _) = collectives("optax-f32"), collectives(mode)
  model = language_model("125m")
  layer = sum(math.prod(p.shape[1:]) for p in jax.tree.leaves(model.params["blocks"]) if len(p.shape) == 3)
  assert ordinary["all-gather"] >= layer, "every layer is gathered: the parser sees something"
  for name in COLLECTIVES:
    assert ours[name] <= ordinary[name], name
  # By layers, the head is a separate layer and is gathered again for its backward pass, like any layer with `remat`.
  head = math.prod(model.params["head"].shape)
  assert ours_outside["all-gather"] <= ordinary_outside["all-gather"] + (head if mode == "mpo-16-layer" else 0)
  assert ours_outside["all-reduce"] <= ordinary_outside["all-reduce"]


def test_along_the_largest_axis_no_more_goes_between_cards_than_in_the_ordinary_step():
  (ordinary, outside, _), (ours, ours_outside, _) = (collectives(mode, "largest") for mode in ("mpo-16", "mpo-16-auto"))
  for name in COLLECTIVES:
    assert ours[name] <= ordinary[name], name
    assert ours_outside[name] <= outside[name], name
  assert sum(ordinary.values()) > 0, "the parser sees something"


@pytest.mark.parametrize(("mode", "at_most"), {"mpo-16-layer": 28.0, "mpo-compact-auto": 21.15}.items())
def test_bytes_of_the_125m_model(mode, at_most):
  """Optax with f32 masters takes 32.8. Each card gathers the embedding and the head, a third of this small model."""
  assert collectives(mode)[2] <= at_most < collectives("optax-f32")[2]
