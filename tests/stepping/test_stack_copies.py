"""On CPUs, stacks of layers that are updated inside a scan are written in place: no loop copies stacks of state."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from benchmarks.models import language_model
from benchmarks.modes import MODES

LAYERS = 5  # no other axis has this size
NAME = re.compile(r"\n(?=(?:ENTRY )?%[\w.-]+ \()")
COPY = re.compile(rf"= (\w+\[{LAYERS},[\d,]+\])\S* copy\(")


def copies_in_loops(program) -> list[str]:
  text = program.as_text() or ""
  bodies = set(re.findall(r"body=%([\w.-]+)", text))
  assert bodies, "there is no loop"
  computations = {c.split()[0].removeprefix("%"): c for c in NAME.split(text)}
  return [shape for name in bodies for shape in COPY.findall(computations[name])]


@pytest.mark.parametrize("mode", ["mpo-16-auto", "mpo-16-layer", "mpo-compact-auto", "mpo-compact-layer"])
@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.few(1, full=3)
def test_no_stack_of_state_is_copied_for_each_layer(mode, width):
  sizes = {"layers": LAYERS, "width": width, "heads": 4, "hidden": 2 * width + 32, "vocab": 256}
  model = language_model("125m", batch=2, context=16, **sizes)
  training = MODES[mode].build(model, "adamw")
  options = {"xla_backend_optimization_level": 0}  # LLVM runs after copies are placed, and takes most of the time
  step = jax.jit(training.step, donate_argnums=(0, 1), compiler_options=options)
  copied = copies_in_loops(step.lower(training.params, training.opt_state, model.batch).compile())
  # XLA copies weights that the backward pass reads once more, those of fused layers and, before JAX 0.12, others too.
  # Preventing it made no step faster (docs/performance.md).
  assert all(shape.startswith("bf16[") for shape in copied)
  assert len(copied) <= (0 if mode.endswith("auto") and jax.__version_info__ >= (0, 12) else 2)


def eight_bit():
  return mpo.quantized_state(optax.contrib.muon(1e-2), min_size=1)


@pytest.mark.parametrize("inner", [lambda: optax.contrib.muon(1e-2), lambda: optax.lamb(1e-2), eight_bit])
def test_no_stack_is_copied_where_layers_are_weights_of_their_own(inner):
  tx = mpo.compensated(mpo.per_layer(inner()))

  def loss(params, x):
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])
    return jnp.mean(x.astype(jnp.float32) ** 2)

  params, state = jax.eval_shape(lambda: mpo.init(tx, {"w": jnp.zeros((LAYERS, 64, 64))}))
  options = {"xla_backend_optimization_level": 0}
  step = jax.jit(mpo.value_and_update(loss, tx), donate_argnums=(0, 1), compiler_options=options)
  program = step.lower(params, state, jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)).compile()
  assert copies_in_loops(program) == []
