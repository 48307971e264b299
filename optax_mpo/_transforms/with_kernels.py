"""An Optax transformation whose updates one CUDA GPU computes with kernels of our own.

Why: XLA:GPU reads the state of some updates twice, and writes stacks of layers with a kernel for each array
(`gpu_kernel` has the reasons). The bytes that are moved are what an update costs.

How: within fused steps, the wrapper is a mark that `by_leaf` finds, and does nothing. In an ordinary step
`leafwise` puts the results of kernels in the place of those that a kernel makes with less traffic.
"""

from typing import Any

import optax

from optax_mpo._backends import step_weight
from optax_mpo._core import wrapping
from optax_mpo._stepping import leafwise

PyTree = Any


def with_kernels(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Lets one CUDA GPU step weights with Pallas kernels that read and write every byte once.

  Put it around the whole transformation. State and results are those of `tx`: one can add it and take it away in the
  middle of a run, and checkpoints are the same. A kernel is used under `jax.jit`, on one GPU, Ampere or later,

  - for weights with 8-bit state;
  - in fused steps, for stacks of layers (`lax.scan`, `fused_scan`);
  - for small weights, some forty of them in one launch; of a fused step those of up to 2^14 elements outside of scans,
    at its end or at that of a fused layer;

  where the update works on each element alone, or on each block of 8-bit state, as those of Adam, AdamW, Lion, SGD and
  most others do. Everything else is left to XLA: other updates (adafactor, lamb), 4-bit storage, stochastic rounding,
  axes that do not split into tiles of 128 elements, several devices, CPUs. `explain` says which leaves are stepped by a
  kernel, and of layers in scans why not.

  The kernels compute what XLA does, with the instructions that XLA's own kernels have: tests hold them to XLA's
  program. One card has run them, an H200 (docs/gpu.md), so that they are opt-in.

  Args:
    tx: an Optax transformation, with `compensated` in it.

  Returns:
    The transformation.

  Raises:
    TypeError: where `tx` is no Optax transformation.

  Memory: traffic, in bytes read and written per parameter by AdamW with 16 bits in a scan: 26 in place of 46; with
    8-bit state 12.3 in place of 18, and of 36 in a scan. What is held is no more.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.with_kernels(mpo.compensated(optax.adamw(1e-2)))
    >>> def loss_fn(params, x):
    ...   x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)
    ...   return jnp.mean(x.astype(jnp.float32) ** 2)
    >>> params, opt_state = mpo.init(tx, jnp.ones((3, 16, 16)))
    >>> table = mpo.explain(loss_fn, tx, params, opt_state, jnp.ones((8, 16), jnp.bfloat16))
    leaf    shape        stepped               gradient held  why
    params  [3, 16, 16]  in scan, by a kernel  512 B
    768 parameters; the largest gradient held is 512 B
  """
  tx = wrapping.as_transformation(tx, "with_kernels", "tx", "tx")

  def update(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: Any
  ) -> tuple[optax.Updates, optax.OptState]:
    def plain(updates: optax.Updates, state: optax.OptState, params: PyTree = None) -> Any:
      return tx.update(updates, state, params, **extra_args)

    if params is None or not step_weight.asked():
      return plain(updates, state, params)
    with step_weight.left_out():
      new = plain(updates, state, params)
    taken = optax.GradientTransformation(tx.init, plain)
    return leafwise.replaced(taken, (updates, state, params), new, "with_kernels", kernels=True)

  return optax.GradientTransformationExtraArgs(tx.init, update)
