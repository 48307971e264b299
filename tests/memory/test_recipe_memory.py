"""What the recipe of a real run takes on a GPU: norms and clipping nothing, microbatches one accumulator.

Bytes per parameter of temporaries of the step compiled by XLA:GPU: AdamW, 16 layers of 2048 x 2048, batch 8.
"""

import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from tests.memory.test_stack_memory import D, L, scan, temporaries


def loss(params, x):
  return jnp.mean(scan(x, params["w"]).astype(jnp.float32) ** 2)


@pytest.mark.full
def test_norms_and_delayed_clipping_take_nothing():
  plain = temporaries(loss, mpo.compensated(optax.adamw(1e-3)), (L, D, D))
  tx = optax.chain(mpo.record_norms(), mpo.clip_by_delayed_norm(1.0), optax.adamw(1e-3), mpo.record_norms("update"))
  assert temporaries(loss, mpo.compensated(tx), (L, D, D)) <= plain + 0.02


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:compensated. without a gradient")
def test_microbatches_take_one_accumulator(bits):
  tx = mpo.compensated(optax.adamw(1e-3), extra_bits=bits)
  plain = temporaries(loss, tx, (L, D, D))
  assert temporaries(loss, tx, (L, D, D), microbatches=8) <= plain + 4 + 0.1


@pytest.mark.parametrize("bits", [8, 4, 0])
@pytest.mark.few(0)
def test_an_accumulator_in_low_precision_takes_its_bytes(bits):
  tx = mpo.compensated(optax.adamw(1e-3))
  plain, how = temporaries(loss, tx, (L, D, D)), mpo.Microbatches(8, accumulator_bits=bits)
  assert temporaries(loss, tx, (L, D, D), microbatches=how) <= plain + 2 + bits / 8 + 0.1


@pytest.mark.filterwarnings("ignore:compensated. without a gradient")
@pytest.mark.full
def test_an_accumulator_in_low_precision_with_8_bit_state():
  """A block of state is made of its largest value and then of each, so XLA keeps the sum of one layer in f32."""
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)), extra_bits=8)
  plain, how = temporaries(loss, tx, (L, D, D)), mpo.Microbatches(8, accumulator_bits=8)
  assert temporaries(loss, tx, (L, D, D), microbatches=how) <= plain + 3 + 4 / L + 0.1
