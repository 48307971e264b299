"""Device and host bytes of compiled steps whose state, or weights too, are in host memory, and how they are moved."""

import re

import jax
import pytest

import optax_mpo as mpo
from benchmarks import peak_memory
from benchmarks.modes import MODES, OPTIMIZERS, fused_layers, on_host
from tests.helpers import relaxed

pytestmark = pytest.mark.full

# Device bytes per parameter at the peak, at most. The weights are 2.00 of them where only the state is on the host.
AT_MOST = {
  ("lm-1.3b", "mpo-16-host"): 2.50,
  ("lm-1.3b", "mpo-compact-host"): 2.50,
  ("lm-8.8b", "mpo-16-host"): 2.30,
  ("lm-8.8b", "mpo-16-host-weights"): 0.60,
  ("lm-8.8b", "mpo-compact-host-weights"): 0.60,
  ("lm-1.3b", "mpo-16-layer-host"): 2.50,
  ("lm-1.3b", "mpo-16-layer-host-weights"): 0.70,
}
BUILDS = {name: mode.build for name, mode in MODES.items()} | {
  "mpo-16-layer-host": on_host(fused_layers(16)),
  "mpo-16-layer-host-weights": on_host(fused_layers(16), weights=True),
}
WEIGHTS = {"lm-1.3b": 1.805, "lm-8.8b": 1.77}  # bytes per parameter of the layers' weights


@pytest.fixture(scope="module")
def compiled():
  cache = {}

  def report(model, mode, dump_to=None):
    key = model, mode, dump_to
    if key not in cache:
      made = peak_memory.MODELS[model]()
      training = relaxed(BUILDS[mode])(made, "adamw")
      args = training.params, training.opt_state, made.batch
      options = {"donate_argnums": (0, 1), "target": "h200", "params": training.params, "dump_to": dump_to}
      cache[key] = relaxed(mpo.gpu_memory)(training.step, *args, **options)
    return cache[key]

  return report


@pytest.mark.parametrize(("model", "mode"), AT_MOST)
@pytest.mark.few(0, full=2)
def test_the_device_holds_weights_and_a_layer(compiled, model, mode):
  report = compiled(model, mode)
  assert report.bytes_per_parameter <= AT_MOST[model, mode]
  assert report.host_temporary_bytes == 0
  assert report.host_aliased_bytes == report.host_argument_bytes == report.host_output_bytes
  state = 3.125 if "compact" in mode else 10.0
  weights = WEIGHTS[model] if mode.endswith("weights") else 0.0
  assert report.per_parameter(report.host_bytes) == pytest.approx(state + weights, abs=0.01)
  assert "on the host" in str(report)


def test_layers_are_fetched_one_by_one_while_gradients_are_computed(tmp_path, compiled):
  """In the loop of the backward pass a fetch starts, and products run before it is done. No stack moves whole."""
  compiled("lm-1.3b", "mpo-16-host", dump_to=tmp_path / "dump")
  (path,) = (tmp_path / "dump").glob("*gpu_after_optimizations.txt")
  lines = path.read_text().splitlines()
  moves = [line for line in lines if re.search(r"= .*(async-start|copy-start)\(", line) and "S(5)" in line]
  assert len(moves) > 20
  for line in moves:
    moved = re.search(r"= \(\(?\w+\[[\d,]*\]\S*,? ?.*?\)?, (\w+\[[\d,]*\])", line)
    assert moved, line
    if "dynamic-slice" in line:
      assert not re.match(r"\w+\[24,", moved[1]), line  # of 24 layers one
  started, overlapped = {}, 0
  for i, line in enumerate(lines):
    if found := re.search(r"%(dynamic-slice-start\S*) = ", line):
      started[found[1]] = i
    elif found := re.search(r"async-done\(%(dynamic-slice-start[^)]*)\)", line):
      between = lines[started[found[1]] : i]
      overlapped += any("gemm" in x or "custom-call(" in x or "dot(" in x for x in between)
  assert overlapped >= 1


def test_an_ordinary_step_holds_weights_gradients_and_some_rows_of_state():
  """Fetched together, the state would take 10 bytes per parameter more."""
  model = peak_memory.MODELS["lm-1.3b"]()
  tx = mpo.compensated(OPTIMIZERS["adamw"]())

  def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(model.loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return loss, mpo.apply_updates(params, updates), opt_state

  training = relaxed(MODES["mpo-16-host"].build)(model, "adamw")
  args, options = (training.params, training.opt_state, model.batch), {"target": "h200", "params": training.params}
  report = relaxed(mpo.gpu_memory)(step, *args, donate_argnums=(0, 1), **options)
  assert report.bytes_per_parameter <= 4.30  # weights and gradients are 4
  assert report.host_temporary_bytes == 0
  assert report.host_aliased_bytes == report.host_argument_bytes == report.host_output_bytes


def test_evaluation_holds_a_layer(compiled):
  model = peak_memory.MODELS["lm-1.3b"]()
  training = relaxed(MODES["mpo-16-host-weights"].build)(model, "adamw")
  report = relaxed(mpo.gpu_memory)(
    mpo.streamed(model.loss), training.params, model.batch, target="h200", params=training.params
  )
  assert report.bytes_per_parameter <= 0.55  # embedding and head, which are on the device, are 0.20, logits 0.1
  assert report.host_temporary_bytes == 0
  assert report.host_argument_bytes == sum(
    x.size * 2 for x in jax.tree.leaves(training.params["blocks"]) if x.size > 2**16
  )
