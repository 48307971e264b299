"""The memory benchmark and its results: bytes of whole training steps, compiled by XLA:GPU for an H200."""

import json
import math

import jax
import pytest

import optax_mpo as mpo
from benchmarks import peak_memory
from benchmarks.models import Model, language_model
from benchmarks.modes import MODES, OPTIMIZERS
from optax_mpo._planner import fsdp

pytestmark = pytest.mark.full

# Bytes per parameter of f32-master Optax with AdamW, batch 1 x 1024, rematerialisation per block. They were measured
# for the design, independently of this code. JAX 0.10 and 0.12 agree on them.
BASELINE = {"lm-350m": 16.30, "lm-350m-unrolled": 14.59}
# Measured bytes per parameter of our storage, rounded up to the next 0.05. More is a regression.
AT_MOST = {"mpo-16": 14.65, "mpo-8": 13.65, "mpo-4": 13.15, "mpo-compact": 7.6}
AT_MOST |= {"mpo-16-auto": 12.7, "mpo-compact-auto": 5.8}
# XLA of JAX 0.11 and later: temporaries of one layer more, slices of weights in a scan.
LATER = 0.05 if jax.__version_info__ >= (0, 11) else 0


def per_parameter(model: str, mode: str) -> float:
  row = peak_memory.measure(model, mode, "adamw", "h200")
  assert not row.error, row.error
  return row.total_bytes / row.parameters


@pytest.mark.parametrize(
  "model", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("unrolled")) for name in BASELINE]
)
def test_f32_master_baseline_is_that_of_the_design_table(model):
  assert per_parameter(model, "optax-f32") == pytest.approx(BASELINE[model], rel=0.01)


@pytest.mark.parametrize(
  "mode",
  [pytest.param(mode, marks=[pytest.mark.slow] * (mode in ("mpo-8", "mpo-4", "mpo-compact"))) for mode in AT_MOST],
)
def test_storage_modes_take_no_more_than_measured(mode):
  assert per_parameter("lm-350m", mode) <= AT_MOST[mode] + LATER


def test_with_long_sequences_only_the_gradients_are_saved_and_nothing_is_added():
  """Activations are most of the temporaries there: a released step holds those of the ordinary one, or fewer."""
  model = language_model("125m", batch=4, context=2048)

  def temporaries(mode):
    training = MODES[mode].build(model, "adamw")
    args = training.params, training.opt_state, model.batch
    return mpo.gpu_memory(training.step, *args, target="h200", donate_argnums=(0, 1)).temporary_bytes

  ordinary = temporaries("mpo-16") - 2 * model.count
  assert temporaries("mpo-16-auto") <= ordinary
  assert temporaries("mpo-compact-auto") <= ordinary


@pytest.mark.parametrize(
  ("name", "millions"),
  {
    "lm-125m": 134,
    "lm-350m": 374,
    "lm-1.3b": 1345,
    "lm-8.8b": 8841,
    "lm-70b": 70552,
    "resnet50": 25.6,
    "vit-l16": 304,
  }.items(),
)
def test_models_have_the_shapes_they_are_named_after(name, millions):
  model = peak_memory.MODELS[name]()
  assert model.count / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize("name", peak_memory.MODELS)
def test_models_have_a_scalar_loss_and_gradients_for_all_params(name):
  model: Model = peak_memory.MODELS[name]()
  loss, grads = jax.eval_shape(jax.value_and_grad(model.loss), model.params, model.batch)
  assert loss.shape == ()
  assert jax.tree.map(lambda g: (g.shape, g.dtype), grads) == jax.tree.map(lambda p: (p.shape, p.dtype), model.params)


@pytest.mark.parametrize(
  ("mode", "optimizer"),
  [
    (mode, optimizer)
    for mode in MODES
    for optimizer in OPTIMIZERS
    # Not flashoptim's own state, and no norm over all layers in fused layers, which refuse it (layers/test_misuse.py).
    if not mode.startswith("flash") and not ("-layer" in mode and optimizer == "adamw-clip")
    # Nothing of Optax's factored state is large enough to be moved to the host, and a warning says so.
    if (mode, optimizer) != ("optax-f32-host", "adafactor-layers")
  ],
)
@pytest.mark.few(0, full=6)
def test_steps_keep_the_shapes_of_their_state(mode, optimizer):
  model = peak_memory.MODELS["lm-125m"]()
  training = MODES[mode].build(model, optimizer)
  _, *new = jax.eval_shape(training.step, training.params, training.opt_state, model.batch)
  old = [training.params, training.opt_state]
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), old)


def test_the_benchmark_measures_prints_and_writes(tmp_path, capsys):
  arguments = ["--models", "lm-125m", "--modes", "optax-f32", "mpo-16", "--optimizers", "lion", "--target", "a100-80gb"]
  assert peak_memory.main([*arguments, "--output-dir", str(tmp_path)]) == 0
  rows = {row["mode"]: row for row in json.loads((tmp_path / "peak_memory.json").read_text())["rows"]}
  held = {mode: row["argument_bytes"] / row["parameters"] for mode, row in rows.items()}
  assert held == pytest.approx({"optax-f32": 8, "mpo-16": 8}, abs=1e-3)  # plus the tokens and the step count
  assert rows["mpo-16"]["total_bytes"] < rows["optax-f32"]["total_bytes"]
  out = capsys.readouterr().out
  assert "Optax, f32 master" in out
  assert "a100-80gb" in out


def test_a_row_that_does_not_compile_says_why(tmp_path, monkeypatch):
  def build(model, optimizer):
    raise NotImplementedError("no such optimizer here")

  monkeypatch.setitem(MODES, "broken", peak_memory.dataclasses.replace(MODES["optax-f32"], build=build))
  row = peak_memory.measure("lm-125m", "broken", "adamw", "h100")
  assert row.error == "NotImplementedError: no such optimizer here"
  assert peak_memory.describe(row) == "does not compile"


def test_steps_are_sharded_over_devices():
  model = peak_memory.MODELS["lm-125m"]()
  training = MODES["mpo-4"].build(model, "adamw")
  _, params, opt_state, batch = fsdp.shard(training, model.batch, 8)
  assert params["embedding"].sharding.spec == jax.sharding.PartitionSpec("data")
  assert params["blocks"]["up"].sharding.spec == jax.sharding.PartitionSpec(None, "data")
  assert batch.sharding.spec == jax.sharding.PartitionSpec()  # one sequence cannot be split over eight devices
  whole, shared = (fsdp.held_bytes(x) for x in ((training.params, training.opt_state), (params, opt_state)))
  assert math.isclose(shared, whole / 8, rel_tol=2e-3)  # norms do not split, so they are replicated
