"""Runs operations so that a reduction does not wait for the scalar that selects what it reduces.

Why: the first of two passes makes the norm of a stack layer by layer. But `optax.safe_norm`, which LAMB and LARS use,
takes the norm of `where(norm(x) <= least, 1, x)`: no layer can go on before the first norm of all layers is there.

How: what a scalar selects is kept as its cases, through elementwise operations. Each case is reduced, and the scalar
selects among the results: the same bits.
"""

import math
from collections.abc import Iterable

import jax
from jax import lax

from optax_mpo._program import jax_forms
from optax_mpo._program.layer_rules import ELEMENTWISE
from optax_mpo._program.program import Operation, Program

REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split())
"""Reductions that can be made in parts, which are then reduced in the same way."""


def run(program: Program, operations: Iterable[Operation], env: dict[int, jax.Array]) -> None:
  """Runs operations in order, reading and writing `env`, and selects after reductions.

  Selected arrays are made as well; nothing needs them where only their reductions are read.
  """
  scalars: dict[int, jax.Array] = {}  # the scalar that fills an array
  cases: dict[int, tuple[jax.Array, list[jax.Array]]] = {}  # the scalar that selects an array, and what it selects from
  for operation in operations:
    values = [jax_forms.operand(a, env) for a in operation.inputs]
    found = [cases.get(a) if isinstance(a, int) else None for a in operation.inputs]
    selected = [f for f in found if f is not None]
    same = bool(selected) and all(f[0] is selected[0][0] for f in selected)
    if same and operation.name in REDUCTIONS:
      scalar, options = selected[0]
      results = [lax.select_n(scalar, *(jax_forms.run_operation(operation, [x])[0] for x in options))]
    else:
      results = jax_forms.run_operation(operation, values)
    env.update((v, r) for v, r in zip(operation.outputs, results, strict=True) if v >= 0)
    first, out = operation.inputs[0] if operation.inputs else None, operation.outputs[0]
    if operation.name == "broadcast_in_dim" and isinstance(first, int) and math.prod(program.aval(first).shape) == 1:
      scalars[out] = lax.reshape(values[0], ())
    elif operation.name == "select_n" and program.aval(operation.inputs[0]).shape != program.aval(out).shape:
      cases[out] = values[0], values[1:]
    elif operation.name == "select_n" and isinstance(first, int) and first in scalars:
      cases[out] = scalars[first], values[1:]
    elif same and operation.name in ELEMENTWISE:
      scalar, options = selected[0]
      rows = [[x if f is None else f[1][k] for x, f in zip(values, found, strict=True)] for k in range(len(options))]
      cases[out] = scalar, [jax_forms.run_operation(operation, row)[0] for row in rows]
