"""State that is made of all leaves, but that no weight reads in the same step, such as a norm for the logs.

Why: such state couples all leaves, although each weight could be updated alone. Two passes would be a waste.

How: by dataflow. The new values of this *late* state are taken out of the update, so that nothing couples its leaves.
What a leaf gives to them, such as the sum of its squares, is a small array: its *part*. Parts become state of their
leaf, which the update of that leaf makes. After the step, the new values are made of the parts.

In two passes, the *links* of `coupled` are known before any weight is updated. So state is late there only if it needs
more of several leaves than links: the norm of the updates after clipping by the norm of the gradients.
"""

import dataclasses
from collections.abc import Collection

import jax

from optax_mpo._core import types
from optax_mpo._core.annotations import Values
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Atom, Operation
from optax_mpo._updates import by_leaf
from optax_mpo._updates.coupled import is_small, links_of


@dataclasses.dataclass(frozen=True)
class Late:
  """An update without its late state.

  Attributes:
    rest: the update without late state, which it keeps as it is.
    update: the same, and it makes the parts: they are its last states.
    states: which leaves of the state are late.
    parts: the variables of the parts.
    operations: make the new values of the late state from the parts and from state that belongs to no leaf.
    outputs: these new values.
  """

  rest: by_leaf.Update
  update: by_leaf.Update
  states: tuple[int, ...] = ()
  parts: tuple[int, ...] = ()
  operations: tuple[Operation, ...] = ()
  outputs: tuple[Atom, ...] = ()

  def with_parts(self, states: Values) -> list[jax.Array]:
    """The leaves of the state that `update` takes: those of the whole update, and zeros for the parts."""
    return [*states, *(types.zeros(self.update.program.aval(v)) for v in self.parts)]

  def finish(self, old: Values, new: Values, constants: dict[int, jax.Array]) -> list[jax.Array]:
    """Makes the late state.

    Args:
      old: the leaves of the state before the step.
      new: those that `update` has made, with the parts.
      constants: of the program of the update.

    Returns:
      The new leaves of the state.
    """
    count = len(new) - len(self.parts)
    inputs = self.update.inputs[2][:count]
    env = constants | dict(zip(inputs, old[:count], strict=True)) | dict(zip(self.parts, new[count:], strict=True))
    jax_forms.run(self.update.program, self.operations, env)
    made = dict(zip(self.states, self.outputs, strict=True))
    return [jax_forms.value(made[j], env) if j in made else new[j] for j in range(count)]


def take(update: by_leaf.Update) -> Late:
  """Takes late state out of an update. If there is none that can be, the update is returned as it is.

  Its leaves may be coupled all the same, by what two passes make between them.
  """
  if not update.is_coupled:
    return Late(update, update)
  late = _taken(update, set())
  if late.update.is_coupled:
    bits = [1 << i for i in range(len(update.names))]
    deps = dataflow.dependencies(update.program, [*bits, *bits, *([0] * len(update.inputs[2]))])
    given = update.given | set(update.program.constants)
    late = _taken(update, links_of(update.program, given, update.inputs, deps))
  return late


def _taken(update: by_leaf.Update, links: Collection[int]) -> Late:
  """Takes out the state that depends on several leaves by more than `links`."""
  program, count = update.program, len(update.names)
  bits = [1 << i for i in range(count)]
  states = update.inputs[2]
  of_leaves = dataflow.output_bits(program, dataflow.dependencies(program, [*bits, *bits, *([0] * len(states))], links))
  late = [j for j, leaves in enumerate(of_leaves[count:]) if leaves & (leaves - 1)]
  kept = {count + j: states[j] for j in late}
  outputs = [kept.get(k, atom) for k, atom in enumerate(program.outputs)]
  rest = update.rewritten(dataclasses.replace(program, outputs=outputs))
  if not late or (rest.is_coupled and not links):
    return Late(update, update)

  if links:
    owners = {j: leaves.bit_length() - 1 for j, leaves in enumerate(of_leaves[count:]) if leaves and j not in late}
  else:
    owners = {j: i for i in range(count) for j in rest.states_of(i)}
  of_states = [1 << owners[j] if j in owners else 0 for j in range(len(states))]
  deps = dataflow.dependencies(program, [*bits, *bits, *of_states], links)
  single = {v for v, leaves in deps.items() if leaves and not leaves & (leaves - 1) and is_small(program, v)}
  made = [program.outputs[count + j] for j in late]
  known = {*program.constants, *(v for j, v in enumerate(states) if j not in owners)}
  operations = dataflow.slice_of(program, made, known | single)
  read = dataflow.read_by(operations, made) - {v for operation in operations for v in operation.outputs}
  if read - known - single:
    return Late(update, update)  # it needs more of a leaf than small arrays

  parts = sorted(read & single)
  avals = [*program.avals, *(program.aval(v) for v in parts)]
  inputs = [*program.inputs, *range(len(program.avals), len(avals))]
  whole = dataclasses.replace(program, inputs=inputs, outputs=[*outputs, *parts], avals=avals)
  names = [f"a part of {update.names[deps[v].bit_length() - 1]}" for v in parts]
  return Late(rest, update.rewritten(whole, names), tuple(late), tuple(parts), tuple(operations), tuple(made))
