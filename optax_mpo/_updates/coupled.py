"""Takes apart an update whose leaves depend on each other through small arrays, for two passes over the gradients.

Why: clipping by the global norm needs the gradients of all leaves before any leaf can be updated. LOMO
(arXiv:2306.09782) runs the backward pass twice. The first pass only computes the norm, and frees each gradient at once.

How: by dataflow, as in `by_leaf`. The *links* are the small arrays in the update that depend on several leaves: the
norm, the clipping scale, a flag that all is finite. They have to be made from small arrays alone. The largest moment of
a block after clipping is no link: it is small, but needs a whole gradient. The *parts* of a leaf are what it
contributes to the links, such as the sum of its squares. The first pass makes the parts of each leaf. In between, links
are made from parts. The second pass updates each leaf as if the links were constants. Small leaves are not worth two
passes: their gradients are kept from the first pass, and they are updated in between.

A leaf that is a stack of layers may depend on its own gradient in this way: each layer needs a number made of all. For
such leaves, small arrays of a single leaf are links, too.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence, Set

import jax
import jax.numpy as jnp

from optax_mpo._core import trees
from optax_mpo._core.annotations import Values
from optax_mpo._program import branches, dataflow, jax_forms
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._updates import by_leaf, refusals

SMALL = 1024  # elements of an array that may be kept for every leaf


def links_of(
  program: Program, given: Set[int], inputs: tuple[list[int], list[int], list[int]], deps: dict[int, int]
) -> set[int]:
  """The links of an update.

  Args:
    program: the update.
    given: variables that no slice computes.
    inputs: the variables of the gradients, the weights and the state.
    deps: the leaves that each variable depends on, as bit sets.
  """
  made = _made_between(program, given, inputs, deps)
  return {v for v in made if v in deps and is_small(program, v) and deps[v] & (deps[v] - 1)}


def _made_between(
  program: Program, given: Set[int], inputs: tuple[list[int], list[int], list[int]], deps: dict[int, int]
) -> set[int]:
  """The variables that can be made from weights, state and small arrays of single leaves."""
  _, params, states = inputs
  made = {*given, *params, *states}
  made |= {v for v, leaves in deps.items() if is_small(program, v) and not leaves & (leaves - 1)}
  for operation in program.operations:
    if all(a in made for a in operation.inputs if isinstance(a, int)):
      made.update(operation.outputs)
  return made


def is_small(program: Program, var: int) -> bool:
  """Whether a variable may be kept for every leaf."""
  return math.prod(program.aval(var).shape) <= SMALL


@dataclasses.dataclass
class Part:
  """What the first pass makes of one leaf.

  Attributes:
    leaf: the index of the leaf.
    outputs: the variables that are made; for a small leaf, the gradient itself.
    reads: the variables that are read of the weight, of its state, and of state that belongs to no leaf.
    shared: the shared variables that are read.
    operations: the slice that makes `outputs`.
  """

  leaf: int
  outputs: tuple[int, ...]
  reads: tuple[int, ...]
  shared: tuple[int, ...]
  operations: tuple[Operation, ...]


class TwoPass:
  """An update taken apart for two passes.

  Attributes:
    program: the whole update. Branches are replaced by selects where they would be in the way.
    parts: what the first pass makes.
    groups: the updates of single leaves for the second pass; their `shared` are shared variables and links.
    middle: the leaves that are updated between the passes.
  """

  def __init__(self, update: by_leaf.Update, caller: str, alone: Collection[int] = ()):
    """Takes the update apart. `alone` are leaves whose own small arrays the first pass makes as well."""
    self._update, self._caller, self._alone = update, caller, alone
    self._grads, self._params, self._states = update.inputs
    try:
      self._take_apart(update.program)
    except ValueError as error:
      if not branches.has_branches(update.program):
        raise
      try:
        self._take_apart(branches.opened(update.program))
      except ValueError:
        raise error from None

  def _take_apart(self, program: Program) -> None:
    self.program = program
    self._given = self._update.given | set(program.constants)
    count = len(self._grads)
    bits = [1 << i for i in range(count)]
    deps = dataflow.dependencies(program, [*bits, *bits, *([0] * len(self._states))])
    self._own_states(deps)
    owned = [1 << o if o is not None else 0 for o in self._owners]
    self._deps = dataflow.dependencies(program, [*bits, *bits, *owned])
    self._gradients = dataflow.dependencies(program, [*bits, *([0] * len([*bits, *owned]))])
    self._free = self._made_of_free_states()
    self._given |= self._free
    self._small = {v for v in self._deps if is_small(program, v)}
    self.middle = [i for i in range(count) if self._grads[i] in self._small]
    self._links = self._small & _made_between(program, self._given, self._update.inputs, self._deps)
    self.groups = [self._group(i) for i in range(count) if i not in self.middle]
    self._between()

  def _size(self, var: int) -> int:
    return math.prod(self.program.aval(var).shape)

  def _own_states(self, deps: dict[int, int]) -> None:
    """Finds the leaf that each state belongs to: the only one, links aside, that its new value is made from."""
    program, count = self.program, len(self._grads)
    links = links_of(program, self._given, self._update.inputs, deps)
    leaf_of = {v: i for part in (self._grads, self._params) for i, v in enumerate(part)}
    made_of: list[set[int]] = []  # the inputs that each output is made from, links aside
    for output in program.outputs:
      found = dataflow.slice_of(program, [output], self._given | links)
      made_of.append(dataflow.read_by(found, [output]))
    self._owners: list[int | None] = []
    for j in range(len(self._states)):
      leaves = {leaf_of[a] for a in made_of[count + j] if a in leaf_of}
      if len(leaves) > 1:
        first, *others = sorted(leaves)
        refusals.raise_coupled(self._update, [first], others, f"{self._caller}, two_pass")
      self._owners.append(leaves.pop() if leaves else None)
    # Large state that is made from itself alone, such as initial weights to compare with, belongs to its only reader.
    for j, owner in enumerate(self._owners):
      readers = {i for i in range(count) if self._states[j] in made_of[i]}
      if owner is None and len(readers) == 1 and not is_small(program, self._states[j]):
        self._owners[j] = readers.pop()

  def _made_of_free_states(self) -> set[int]:
    """Float scalars that depend only on state that belongs to no leaf, such as the bias correction of a step count.

    They are computed once, as in the ordinary update. XLA divides in one way by a scalar that only one leaf reads, and
    in another way by a scalar that all leaves read.
    """
    count, program = len(self._grads), self.program
    free = dataflow.dependencies(program, [0] * (2 * count) + [int(owner is None) for owner in self._owners])
    floats = {v for v in free if jnp.issubdtype(program.aval(v).dtype, jnp.floating) and self._size(v) == 1}
    return {v for v in floats if free[v] and not self._deps[v]} - {*self._states, *self._given}

  def _slice(self, outputs: Sequence[Atom], given: set[int] | frozenset[int]) -> tuple[list[Operation], set[int]]:
    """Returns the operations that make `outputs` from `given`, and the variables that are read but not made."""
    operations = dataflow.slice_of(self.program, outputs, given)
    made = {v for operation in operations for v in operation.outputs}
    return operations, dataflow.read_by(operations, outputs) - made

  def _group(self, leaf: int) -> by_leaf.Group:
    program, count, update = self.program, len(self._grads), self._update
    links = {v for v in self._links if self._deps[v] & ~(1 << leaf)}
    if leaf in self._alone:
      links |= {v for v in self._small if self._deps[v] == 1 << leaf and self._gradients[v]}
    states = [j for j, owner in enumerate(self._owners) if owner == leaf and j not in update.shared_states]
    inputs = [self._grads[leaf], self._params[leaf], *(self._states[j] for j in states)]
    outputs = [program.outputs[leaf], *(program.outputs[count + j] for j in states)]
    operations, read = self._slice(outputs, self._given | links | set(inputs))
    handed = sorted(read - set(inputs))
    self._refuse_foreign(leaf, [v for v in handed if v not in self._given and v not in links])
    return update.make_group([leaf], states, inputs, outputs, operations, handed, program)

  def _refuse_foreign(self, leaf: int, found: Sequence[int]) -> None:
    """Raises ValueError where the update of a leaf reads more than small arrays of other leaves."""
    others = {i for v in found for i in range(len(self._grads)) if self._deps[v] >> i & 1} - {leaf}
    if others:
      refusals.raise_coupled(self._update, [leaf], sorted(others), f"{self._caller}, two_pass")

  def _between(self) -> None:
    """Finds what is made between the passes, and from which parts."""
    program, count, update = self.program, len(self._grads), self._update
    self._new_states = [
      j
      for j, owner in enumerate(self._owners)
      if (owner is None or owner in self.middle) and j not in update.shared_states
    ]
    outputs: list[Atom] = [*sorted({v for group in self.groups for v in group.shared} - set(update.shared))]
    outputs += [program.outputs[i] for i in self.middle]
    outputs += [program.outputs[count + j] for j in self._new_states]
    large = {i for i in range(count) if i not in self.middle}
    single = {v for v in self._small if self._deps[v] and not self._deps[v] & (self._deps[v] - 1)}
    parts = {v for v in single if self._deps[v].bit_length() - 1 in large}
    inputs = {*(self._grads[i] for i in self.middle), *self._params, *self._states}
    operations, read = self._slice(outputs, self._given | parts | inputs)
    self._middle_operations = operations
    for v in sorted(read - self._given - parts - inputs):
      leaves = [i for i in range(count) if self._deps[v] >> i & 1]
      names = trees.listed(update.names[i] for i in leaves)
      raise ValueError(
        f"{self._caller}, two_pass: tx needs the whole gradient of {names} to step other leaves, and not just a few "
        "numbers made of it. Train with tx.update."
      )
    # A part that only serves to make another part of the same leaf is not needed itself.
    self.parts = [self._part(i, sorted(v for v in read & parts if self._deps[v] == 1 << i)) for i in sorted(large)]
    self.parts = [part for part in self.parts if part.outputs]
    self.parts += [Part(i, (self._grads[i],), (), (), ()) for i in self.middle]

  def _part(self, leaf: int, outputs: list[int]) -> Part:
    states = {v for v, owner in zip(self._states, self._owners, strict=True) if owner in (leaf, None)}
    own = {self._params[leaf], *states}
    operations, read = self._slice(outputs, self._given | own | {self._grads[leaf]})
    shared = tuple(sorted(v for v in read & self._given if v not in self.program.constants))
    return Part(leaf, tuple(outputs), tuple(sorted(read & own)), shared, tuple(operations))

  def known(self, shared: dict[int, jax.Array], weights: Values, states: Values) -> dict[int, jax.Array]:
    """Returns the values, by variable, that are known before the first pass.

    Args:
      shared: the values of the shared variables, from `run_shared`.
      weights: the old weights, by leaf.
      states: the old state.
    """
    known = shared | dict(zip([*self._params, *self._states], [*weights, *states], strict=True))
    env = dict(self.program.constants) | known
    jax_forms.run(self.program, self._slice(sorted(self._free), {*env})[0], env)
    return known | {v: env[v] for v in self._free}

  def parts_of(self, gradients: Values, known: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """Makes the parts of all leaves, where all gradients exist at once.

    Args:
      gradients: the gradients, by leaf.
      known: what `known` returns.

    Returns:
      The values of the parts, by variable.
    """
    made: dict[int, jax.Array] = {}
    for part in self.parts:
      env = dict(self.program.constants) | known | {self._grads[part.leaf]: gradients[part.leaf]}
      jax_forms.run(self.program, part.operations, env)
      made |= {v: env[v] for v in part.outputs}
    return made

  def links(
    self, parts: dict[int, jax.Array], known: dict[int, jax.Array]
  ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
    """Makes the values that the second pass reads.

    Args:
      parts: the values of the parts, by variable.
      known: what `known` returns.

    Returns:
      The values by variable; the new weights and the new states, by index, that are made between the passes.
    """
    program, count = self.program, len(self._grads)
    env = dict(program.constants) | known | parts
    jax_forms.run(program, self._middle_operations, env)
    weights = {i: jax_forms.value(program.outputs[i], env) for i in self.middle}
    return env, weights, {j: jax_forms.value(program.outputs[count + j], env) for j in self._new_states}
