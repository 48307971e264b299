"""Tricks for XLA:CPU, each of which makes it do something once, in place or on all cores.

Why: XLA:CPU has no kernels with several results, orders operations after it has removed barriers, and runs some loops
on one core. Each trick says what it prevents; docs/performance.md says what it brings. When XLA:CPU does better, this
file can go.

How: primitives that return their first operand, and are lowered for CPUs to something that XLA treats as we need it. On
other platforms they do nothing, except `tie`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

from optax_mpo._core import order, primitives
from optax_mpo._core.annotations import PyTree

_HELD = 2**10  # elements; for smaller arrays, computing twice costs less than `held`


def tie(values: PyTree) -> PyTree:
  """A `barrier`; nothing on CPUs, since XLA:CPU orders operations after it has removed barriers.

  There a barrier would only make XLA transpose gradients that are wanted as they lie.
  """
  leaves, treedef = jax.tree.flatten(values)
  return treedef.unflatten(_tie.bind(*leaves))


def laid_out(x: jax.Array) -> jax.Array:
  """Returns a gradient `x`; on one CPU, with its axes in order in memory if it is large and comes out transposed.

  Derivatives of products come out transposed. XLA:CPU would transpose such a gradient in each loop that reads it, for
  instance for each of two moments, one element per cache line: three times as slow as reading in order. Transposing it
  where it is written costs only once. Any other gradient is left alone, since XLA may compute it within those loops.
  """
  return _laid_out.bind(x) if x.ndim > 1 and x.size >= order.SMALL else x


def held(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns `x: f32[*s]` as a value that XLA:CPU computes only once, even if it is used several times.

  XLA:CPU repeats cheap operations in each loop that uses them. New weights and their bits are two loops, so both would
  compute the new master weight. And the old weights would be copied first, since both loops read them and write in
  their place; in a scan, the whole stack. XLA takes a division for expensive, so `x` is divided by one. Only LLVM sees
  that the divisor is one, and removes the division.

  Args:
    x: the value to return.
    like: [*s], of a dtype of 8 or 16 bits: any array that `x` is computed from.
  """
  return _held.bind(x, like) if x.size >= _HELD else x


def on_all_cores(i: jax.Array) -> jax.Array:
  """Returns the index `i` of a loop, i32[], so that XLA:CPU runs the loop's body on all cores.

  XLA:CPU of JAX 0.12 runs a loop on one core unless it has a sort, a product or a call in it.
  """
  return lax.sort(jnp.stack([i, i + 1]))[0]


def kept_division(x: jax.Array, divisor: jax.Array) -> list[jax.Array]:
  """Returns the operands of `x / divisor`, f32[*s] each, so that XLA divides by `divisor`, one number everywhere.

  Where a scalar is read once in a loop or a branch, XLA multiplies by its inverse, which may differ in the last bit.
  The scalars of an update, such as those of Adam's bias correction, are read by several leaves, and so do divide. So
  they have to where rows of a leaf are updated in a loop of their own.
  """
  divisor = jnp.broadcast_to(divisor, x.shape)
  return [x, jnp.where(x == x, divisor, divisor + 1)]  # for NaN, either gives NaN


# --- The primitives ---------------------------------------------------------------------------------------------------


def _divided_by_one(x: jax.Array, like: jax.Array) -> jax.Array:
  bits = 8 * like.dtype.itemsize
  zero = lax.bitcast_convert_type(like, f"uint{bits}").astype(jnp.uint32) >> bits
  return x / lax.bitcast_convert_type(zero + jnp.uint32(0x3F80_0000), jnp.float32)


def _lay_out(lower: primitives.Lower, context: mlir.LoweringRuleContext, x: mlir.Value) -> primitives.IrValues:
  # Not in exported programs: JAX does not promise that a later XLA knows this constraint.
  is_kept = getattr(getattr(context.module_context, "lowering_parameters", None), "for_export", False)
  return lower(order.row_major if order.is_for_one(context) and not is_kept and _comes_transposed(x) else order.first)


def _comes_transposed(x: Any) -> bool:
  """Whether a value in a program that is being lowered comes from a transposition."""
  while True:
    operation = getattr(x.owner, "operation", x.owner)  # a function's argument has a block, without a name
    name = getattr(operation, "name", "")
    if name not in ("stablehlo.reshape", "stablehlo.broadcast_in_dim"):
      return name == "stablehlo.transpose"
    x = operation.operands[0]


_held = primitives.make_hint("held", {None: order.everywhere(order.first), "cpu": order.everywhere(_divided_by_one)})
_laid_out = primitives.make_hint(
  "laid_out", {None: order.everywhere(order.first), "cpu": _lay_out}, depends_on_operands=True
)
_tie = primitives.make_hint(
  "tie",
  {
    None: order.everywhere(lambda *values: order.barrier(list(values))),
    "cpu": order.everywhere(lambda *values: list(values)),
  },
  all_operands=True,
)
