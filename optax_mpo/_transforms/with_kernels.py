"""Optional Pallas kernels for the updates of an Optax transformation, on one CUDA GPU.

Why: memory traffic is the cost of an update. XLA:GPU reads the state of some updates twice, and writes stacks of layers
with a kernel for each array (`gpu_kernel` has the reasons).

How: in steps with gradient release, the wrapper is only a mark that `by_leaf` finds. In an ordinary step, `leafwise`
replaces results of the update by those of a kernel that moves fewer bytes, or that updates several small weights.
"""

import optax

from optax_mpo._backends import step_weight
from optax_mpo._core import wrapping
from optax_mpo._core.annotations import PyTree
from optax_mpo._stepping import leafwise


def with_kernels(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Lets one CUDA GPU update weights with Pallas kernels that read and write every byte once.

  Wrap the whole transformation. State and results are those of `tx`: you can add or remove the wrapper in the middle
  of a run, and checkpoints do not change. Kernels run under `jax.jit` on one GPU, Ampere or later, for

  - weights with 8-bit state;
  - stacks of layers (`lax.scan`, `fused_scan`) in steps with gradient release;
  - small weights, about forty in one launch. With gradient release these are weights of up to 2^14 elements outside of
    scans, updated at the end of the step or of a fused layer.

  The update has to be per element, or per block of 8-bit state, as in Adam, AdamW, Lion, SGD and most others. XLA
  computes everything else: other updates (adafactor, lamb, `per_layer`), 4-bit storage, stochastic rounding, axes that
  do not split into tiles of 128 elements, several devices, CPUs. `explain` lists which leaves a kernel updates, and for
  layers in scans why one does not.

  The kernels compute the same as XLA, with the instructions of XLA's own kernels: tests compare them with XLA's
  program. They are opt-in, as only one card, an H200, has run them, in Triton. Where JAX has no Triton backend, cards
  from Hopper on run them in Mosaic GPU, which no card has done yet (docs/gpu.md).

  Args:
    tx: an Optax transformation, with `compensated` in it.

  Returns:
    The transformation.

  Raises:
    TypeError: if `tx` is not an Optax transformation.

    Memory: no more than without kernels. Traffic, in bytes read and written per parameter by AdamW: with 16 bits in a
    scan 26 instead of 46; with 8-bit state 12.3 instead of 18, or instead of 36 in a scan.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.with_kernels(mpo.compensated(optax.adamw(1e-2)))
    >>> def loss_fn(params, x):
    ...   x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)
    ...   return jnp.mean(x.astype(jnp.float32) ** 2)
    >>> params, opt_state = mpo.init(tx, jnp.ones((3, 16, 16)))
    >>> mpo.explain(loss_fn, tx, params, opt_state, jnp.ones((8, 16), jnp.bfloat16))
    leaf    shape        stepped               gradient held  why
    params  [3, 16, 16]  in scan, by a kernel  512 B
    768 parameters; the largest gradient held is 512 B
  """
  tx = wrapping.as_transformation(tx, "with_kernels", "tx", "tx")

  def update(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: PyTree
  ) -> tuple[optax.Updates, optax.OptState]:
    def plain(updates: optax.Updates, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, PyTree]:
      return tx.update(updates, state, params, **extra_args)

    if params is None or not step_weight.asked():
      return plain(updates, state, params)
    taken = optax.GradientTransformation(tx.init, plain)
    return leafwise.update(taken, updates, state, params, "with_kernels", kernels=True)

  return optax.GradientTransformationExtraArgs(tx.init, update)
