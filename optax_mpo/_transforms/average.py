"""A moving average of the master weights, in f32 or in low precision with compensation bits.

Why: an average with a decay of 0.9999 moves by 1e-4 of its distance to the weights, far less than bf16 resolves. With 8
bits of compensation it resolves 2^-16 of itself, which is still more than most of its steps.

How: with 16 bits, bf16 and its bits are the f32 average, exactly. With 8 bits, it is rounded stochastically, so that
small steps count on average. Errors fade as the average forgets: at 0.9999, their root mean square is 0.0004 of the
average of a weight that stays 1 % away, and never above 0.0011. Rounding to bf16 alone makes 0.001.

The average moves by a fraction of its distance to the weights. `decay * old + (1 - decay) * new` would be off by 0.0002
at 0.9999, since the two factors do not add up to 1 in f32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_mpo._codecs import checks, formats, stochastic_rounding
from optax_mpo._core import overwritten
from optax_mpo._core.annotations import KeyPath, PyTree

BITS = (None, 8, 16)  # None: f32, in one array
_SEED = 0x5EED_A4E5  # not that of `compensated`, so that the two roundings are independent


class Average(NamedTuple):
  """A moving average in low precision.

  Attributes:
    values: a tree like the params, in the dtypes that a loss gets: bf16 where the params are bf16 or float8.
    compensation: a tree like the params with the bits that the values lack, as in `CompensatedState`.
  """

  values: PyTree
  compensation: PyTree


def start(params: PyTree, masters: PyTree, bits: int | None) -> Average | PyTree:
  """Returns the average of the first weights: `masters`, f32, as they are or in the dtypes of `params`."""
  if bits is None:
    return masters
  return _stored(masters, jax.tree.map(lambda p: formats.compute_dtype(p.dtype), params), bits, None)


def moved(average: Average | PyTree, masters: PyTree, decay: float, bits: int | None, step: jax.Array) -> PyTree:
  """Returns `decay` of the average and `1 - decay` of the new weights; `step: i32[]` counts the steps.

  Leaves that are overwritten have no average, but their newest value.
  """

  def mix(path: KeyPath, old: jax.Array, new: jax.Array) -> jax.Array:
    return new if overwritten.is_overwritten(path) else old + (1 - decay) * (new - old)

  values = jax.tree_util.tree_map_with_path(mix, joined(average), masters)
  return values if bits is None else _stored(values, jax.tree.map(lambda v: v.dtype, average.values), bits, step)


def joined(average: Average | PyTree) -> PyTree:
  """Returns the average as a tree like the params, f32[*s]."""
  if not isinstance(average, Average):
    return average
  leaves, treedef = jax.tree.flatten(average.values)
  kept = treedef.flatten_up_to(average.compensation)
  return treedef.unflatten([formats.join(x, k) if jax.tree.leaves(k) else x for x, k in zip(leaves, kept, strict=True)])


def _stored(values: PyTree, dtypes: PyTree, bits: int, step: jax.Array | None) -> Average:
  leaves, treedef = jax.tree.flatten(values)
  found: list[tuple[jax.Array, PyTree]] = []
  for i, (leaf, dtype) in enumerate(zip(leaves, treedef.flatten_up_to(dtypes), strict=True)):
    if leaf.dtype == dtype:
      found.append((leaf, checks.bits_or_masked(None)))
      continue
    if step is not None and not formats.is_exact(dtype, bits):
      random = stochastic_rounding.random_bits(_SEED, step, i, leaf.shape)
      _, low, kept = formats.step(jnp.zeros(leaf.shape, dtype), leaf, bits, random)
    else:
      low, kept = formats.split(leaf, dtype, bits)
    found.append((low, checks.bits_or_masked(kept)))
  return Average(treedef.unflatten([f[0] for f in found]), treedef.unflatten([f[1] for f in found]))
