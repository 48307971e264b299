"""The first of two passes over the gradients: what a leaf contributes to the small arrays that couple it with others.

Why: `coupled` says which small arrays of each leaf the update of all leaves needs, such as the sum of its squares. They
are made as soon as the leaf's gradient is complete, so that the gradient can be freed at once.

How: each leaf gets a `Step` that makes these arrays as its new state and leaves the weight alone. For a stack of layers
they are made layer by layer, as `across` does it for any state that a whole stack has once.
"""

import jax

from optax_mpo._core import types
from optax_mpo._core.annotations import Values
from optax_mpo._program import selects
from optax_mpo._program.program import Program
from optax_mpo._stepping.site import Step
from optax_mpo._updates.coupled import Part


def part_step(part: Part, program: Program, grad: int) -> Step:
  """Makes the step of the first pass: its new state is the values of the part, and it leaves the weight alone."""

  def struct(var: int) -> jax.ShapeDtypeStruct:
    return types.struct(program.aval(var))

  def run(grads: Values, params: Values, states: Values, shared: Values) -> tuple[list[jax.Array], list[jax.Array]]:
    env = dict(program.constants) | dict(zip((grad, *part.reads, *part.shared), [*grads, *shared], strict=True))
    selects.run(program, part.operations, env)
    return [], [env[v] for v in part.outputs]

  shared = tuple(struct(v) for v in (*part.reads, *part.shared))
  return Step(run, (struct(grad),), (), tuple(struct(v) for v in part.outputs), shared)
