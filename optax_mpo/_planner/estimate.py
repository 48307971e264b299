"""About how much memory a step of the decoder needs, by arithmetic, before anything is compiled.

Why: XLA takes some seconds for each cell of a plan. Whether a cell is near the memory of the card can be said at once.

How: the inputs of all layers are kept. A step is at its peak in one of four places. At the head there are the logits,
in f32 and in bf16; then the head's gradient and that of the logits, in bf16. In the backward pass of a layer there are
its attention weights; or the hidden layer of its MLP and what is fetched from the host of one weight: what comes, what
goes, and what is computed with. Beside all that, each weight has a bf16 gradient, unless gradients are released.
Attention weights count with what XLA:GPU holds of them at once: 6 bytes, and 11 where heads share keys and values.
`tests/planner/test_estimate.py` compares estimates with compiled steps.
"""

import math

import jax

from optax_mpo._planner.decoder import LMConfig, language_model
from optax_mpo._planner.remembered import Figures
from optax_mpo._stepping.rows import ELEMENTS_OF_LAYER

_BESIDE = {"optax-f32": 4, "optax-bf16": 2, "mpo-16": 2, "mpo-8": 2}
"""Bytes per parameter of gradients, and of a bf16 copy of weights, by storage; the others release gradients."""


def with_peak(held: Figures, config: LMConfig, storage: str, batch: int, context: int, devices: int) -> Figures:
  """Returns the figures of a step, with an estimated peak.

  Args:
    held: what persists on one device, and on the host.
    config: the decoder. If its layers are not rematerialised, there is no estimate.
    storage: one of STORAGES.
    batch: sequences of a step, on all devices.
    context: tokens of a sequence.
    devices: over how many devices weights, state and batch are split.
  """
  if not config.remat:
    return held
  params = language_model(config, "").params
  count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
  sequences = batch / devices
  tokens, width, vocab = sequences * context, config.width, config.vocab
  scores = sequences * config.heads * context**2
  inputs = 2 * tokens * width * config.layers
  head = 6 * tokens * vocab + 4 * tokens * width
  head_gradient = 2 * vocab * width + 2 * tokens * vocab
  is_grouped = config.kv_heads not in (None, config.heads)
  attention = (11 if is_grouped else 6) * scores + 24 * tokens * width
  fetched = held.host / count * min(width * config.hidden, ELEMENTS_OF_LAYER)  # what the host has of one weight
  mlp = 8 * tokens * config.hidden + 3 * fetched
  gathered = 2 * vocab * width if devices > 1 else 0
  beside = _BESIDE.get(storage, 0) * count / devices
  return held._replace(peak=held.held + round(inputs + max(head, head_gradient, attention, mlp) + gathered + beside))
