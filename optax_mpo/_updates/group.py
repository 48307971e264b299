"""Leaves that are updated together, and their slice of the traced update."""

import dataclasses
from typing import NoReturn

import jax

from optax_mpo._core import trees
from optax_mpo._core.annotations import Values
from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Operation, Program, Slice


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Leaves that are updated together, and their slice of the update.

  Attributes:
    leaves: which leaves of the params.
    states: which leaves of the optimizer state belong to them.
    shared: the other variables that the slice reads; `Update.run_shared` computes them, or `TwoPass.links`.
    constants: the values of the constants that it reads, by variable; the transformation closes over them.
    operations: the slice.
    outputs: the new weights, then the new state.
    program: the program of the whole update.
    inputs: the variables of the gradients, the weights and the state.
    names: the names of the leaves of the params and of the state.
  """

  leaves: tuple[int, ...]
  states: tuple[int, ...]
  shared: tuple[int, ...]
  constants: dict[int, jax.Array]
  operations: tuple[Operation, ...]
  outputs: tuple[Atom, ...]
  program: Program
  inputs: tuple[int, ...]
  names: tuple[str, ...]

  def step(
    self, grads: Values, params: Values, states: Values, shared: Values
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the new weights and the new state of the group."""
    env = self.constants | dict(zip(self.shared, shared, strict=True))
    env |= dict(zip(self.inputs, [*grads, *params, *states], strict=True))
    jax_forms.run(self.program, self.operations, env)
    results = [jax_forms.value(a, env) for a in self.outputs]
    return results[: len(self.leaves)], results[len(self.leaves) :]

  @property
  def update(self) -> Slice:
    """The slice."""
    return Slice(self.program, self.operations, self.inputs, self.shared, self.constants, self.outputs)

  def raise_mixed(self, why: str) -> NoReturn:
    """Raises ValueError: the leaves are stacks of layers, and one layer alone cannot be updated."""
    raise ValueError(
      f"the update of the stacked weights {trees.listed(self.names[: len(self.leaves)])} cannot be done layer by "
      f"layer: {why}. Wrap the transformation in per_layer, which treats each layer as a weight of its own, give each "
      "layer weights of its own (a list of trees, and fused_layer for each), use a transformation that treats each "
      "element alone, or step with tx.update."
    )
