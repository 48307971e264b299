"""Takes an Optax update apart into updates of single leaves, by dataflow.

Why: to update a weight as soon as its gradient is complete, its update has to be separated from all others. Whether a
transformation allows that depends on what it computes, not on its name.

How: `tx.update` and the addition to the params are traced once, into one program for the whole tree. What depends on
no gradient and no weight (step counts, schedules) is *shared*: it is computed once a step. Everything else belongs to
the leaves it depends on. Leaves that have any of it in common are *coupled*: their updates depend on each other, so
they can only be updated together. The update of a group of leaves is the slice of the program that makes its new
weights and its new state.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from optax_mpo._backends import step_weight
from optax_mpo._codecs import apply, formats
from optax_mpo._core import host, trees, types, wrapping
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.layer_rules import ELEMENTWISE
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._updates import refusals
from optax_mpo._updates.group import Group

# Each slice computes large results of these itself: keeping them would cost more.
_CHEAP = ELEMENTWISE | {"broadcast_in_dim", "iota", "reshape", "transpose", "squeeze", "bitcast_convert_type"}
_SMALL = 1024  # elements


class Update:
  """`tx.update` and the addition to the params, traced for one tree of params and taken apart.

  Attributes:
    names: the name of every leaf of the params.
    program: the whole update: gradients, weights, state -> new weights, new state.
    given: the variables that no slice computes: `shared` and constants.
    shared: the variables that `run_shared` computes.
    shared_states: the leaves of the state that `run_shared` updates.
    kernels: whether GPU kernels are allowed, by the caller or by `with_kernels` around `tx` or in it.
    caller: the name of the function that takes it apart, for errors.
    dependencies: for each variable the leaves, then the states, that it depends on, as bits.
  """

  def __init__(
    self,
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    caller: str,
    kernels: bool = False,
    extra: Mapping[str, PyTree] | None = None,
  ):
    """Traces and takes apart an update. `extra` are extra arguments of `tx.update`, which become state of no leaf."""
    self.caller = caller
    self._extra, self._extra_treedef = jax.tree.flatten(dict(extra or {}))
    self._params, self._treedef = jax.tree.flatten(params)
    self._state, self._state_treedef = jax.tree.flatten(opt_state)
    self.names = [name for name, _ in trees.named_leaves(params)]
    self.state_names = [name for name, _ in trees.named_leaves(opt_state, "opt_state")]
    wrapping.check_state(tx, params, opt_state, caller)
    scaled = [name for name, leaf in zip(self.names, self._params, strict=True) if formats.is_scaled(leaf)]
    if caller == refusals.BY_LAYERS and scaled:
      raise ValueError(
        f"{caller}: fused layers read weights without the scales that float8 needs, and {trees.listed(scaled)} have "
        "that dtype. Train with value_and_update, which decodes them, or keep these leaves in bfloat16 or float16."
      )
    with step_weight.left_out() as met:
      grads = [formats.gradient_like(leaf) for leaf in self._params]
      self.program, out = jax_forms.trace(self._whole(tx), grads, self._params, self._state, self._extra)
    self.kernels = kernels or bool(met)
    refusals.check_state(caller, self.state_names, self._state, self._state_treedef, out[1])
    refusals.check_effects(caller, self.program)
    self._state += self._extra
    self.state_names += [name for name, _ in trees.named_leaves(extra or {}, "tx_args")]
    self._own()

  def _whole(self, tx: optax.GradientTransformation) -> Callable[..., tuple[PyTree, PyTree, Values]]:
    def whole(grads: Values, params: Values, state: Values, extra: Values) -> tuple[PyTree, PyTree, Values]:
      tree, old_state = self._treedef.unflatten(params), self._state_treedef.unflatten(state)
      weights, extra_args = host.fetched(tree), self._extra_treedef.unflatten(extra)
      given = self._treedef.unflatten(grads), host.fetched(old_state), weights
      try:
        updates, new_state = wrapping.update(tx, *given, extra_args)
      except TypeError as error:
        refusals.raise_if_missing(error, self.caller)
        raise
      if jax.tree.structure(new_state) == self._state_treedef:  # checked later
        new_state = host.stored_like(new_state, old_state)
      return host.stored_like(apply.apply_updates(weights, updates), tree), new_state, extra

    return whole

  def _own(self) -> None:
    """Finds which state is shared, and which leaves and states belong together."""
    program, count = self.program, len(self._params)
    states = self.inputs[2]
    leaf_bits = [1 << i for i in range(count)]
    state_bits = [1 << (count + j) for j in range(len(states))]
    self.dependencies = dataflow.dependencies(program, [*leaf_bits, *leaf_bits, *state_bits])
    new = dataflow.output_bits(program, self.dependencies)
    own = (1 << count) - 1  # the leaves; the loop adds the states that are not shared
    while True:
      found = dataflow.union([bit for bit, bits in zip(state_bits, new[count:], strict=True) if bits & own])
      if found | own == own:
        break
      own |= found

    # Leaves and states belong together if a new weight or a new state depends on both.
    self._parent = list(range(count + len(states)))
    for node, bits in enumerate(new):
      bits &= own
      if node >= count and not bits:
        continue
      for other in _set_bits(bits):
        self._parent[self._root(node)] = self._root(other)
    self.shared_states = [j for j in range(len(states)) if not state_bits[j] & own]
    self._members: dict[int, list[int]] = {}
    for node in range(count + len(states)):
      if node < count or state_bits[node - count] & own:
        self._members.setdefault(self._root(node), []).append(node)

    given = [v for v, bits in self.dependencies.items() if not bits & own and self._is_given(v)]
    self.shared = tuple(v for v in given if v not in program.constants)
    self.given = frozenset(given)

  def _is_given(self, var: int) -> bool:
    maker, size = self.program.makers.get(var), math.prod(self.program.aval(var).shape)
    if maker is None:
      return True
    operation = self.program.operations[maker]
    if operation.name == "broadcast_in_dim" and size > math.prod(self.program.aval(operation.inputs[0]).shape) == 1:
      return False  # a broadcast scalar: the slice reads the scalar
    if self.kernels and (size > 1 or jnp.issubdtype(self.program.aval(var).dtype, jnp.integer)):
      return operation.name not in _CHEAP  # free inside a kernel, while XLA takes a launch for each leaf
    return size <= _SMALL or operation.name not in _CHEAP

  def _root(self, node: int) -> int:
    while self._parent[node] != node:
      self._parent[node] = self._parent[self._parent[node]]
      node = self._parent[node]
    return node

  def at(self, opt_state: Values, constants: dict[int, jax.Array]) -> "Update":
    """The same update with other values for the leaves of its state and for constants of its program."""
    other = copy.copy(self)
    other._state, other.program = list(opt_state), self.program.replaced(constants)
    return other

  def rewritten(self, program: Program, names: Sequence[str] = ()) -> "Update":
    """The same update with another program; `names` are those of further states, which start as zeros."""
    other = copy.copy(self)
    other.__dict__.pop("_used_gradients", None)
    other.program, other.state_names = program, [*self.state_names, *names]
    other._state = [*self._state, *(types.zeros(program.aval(v)) for v in program.inputs[len(self.program.inputs) :])]
    other._own()
    return other

  @property
  def value(self) -> int | None:
    """Which leaf of the state stands for the extra argument `value`, if the update reads it."""
    name = "tx_args['value']"
    if name not in self.state_names:
      return None
    j = self.state_names.index(name)
    var = self.inputs[2][j]
    return j if any(var in operation.inputs for operation in self.program.operations) else None

  def run_shared(self) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
    """Computes once what all leaves share.

    Returns:
      The values of `shared`, by variable, and the new values of the shared leaves of the state, by index.
    """
    program, count = self.program, len(self._params)
    states = self.inputs[2]
    env = dict(program.constants)
    env.update((states[j], self._state[j]) for j in self.shared_states)
    outputs = {j: program.outputs[count + j] for j in self.shared_states}
    known = frozenset(env)
    jax_forms.run(program, dataflow.slice_of(program, [*self.given, *outputs.values()], known), env)
    new = {j: jax_forms.value(a, env) for j, a in outputs.items()}
    return {v: env[v] for v in self.shared}, new

  def components(self, leaves: Iterable[int]) -> list[tuple[int, ...]]:
    """Sorts leaves into the smallest groups that can be updated alone."""
    by_root: dict[int, list[int]] = {}
    for leaf in leaves:
      by_root.setdefault(self._root(leaf), []).append(leaf)
    return [tuple(group) for group in by_root.values()]

  def states_of(self, leaf: int) -> list[int]:
    """The leaves of the state that belong to a leaf, or to those that it is coupled to."""
    count = len(self._params)
    return [node - count for node in self._members[self._root(leaf)] if node >= count]

  @property
  def is_coupled(self) -> bool:
    """Whether the updates of any two leaves depend on each other."""
    return any(len(leaves) > 1 for leaves in self.components(range(len(self.names))))

  @property
  def inputs(self) -> tuple[list[int], list[int], list[int]]:
    """The variables of the gradients, the weights and the state."""
    inputs, count = self.program.inputs, len(self._params)
    return inputs[:count], inputs[count : 2 * count], inputs[2 * count :]

  def needs_gradient(self, leaf: int) -> bool:
    """Whether any new weight or new state depends on the gradient of a leaf."""
    return bool(self._used_gradients >> leaf & 1)

  @functools.cached_property
  def _used_gradients(self) -> int:
    program, count = self.program, len(self._params)
    bits = [1 << i if i < count else 0 for i in range(len(program.inputs))]
    return dataflow.union(dataflow.output_bits(program, dataflow.dependencies(program, bits)))

  def group(self, leaves: Sequence[int], who: str) -> Group:
    """Returns the slice of the update that updates `leaves` together.

    Raises:
      ValueError: where they are coupled to other leaves, or an operation that also updates others cannot be cut.
    """
    program, count = self.program, len(self._params)
    wanted = set(leaves)
    members = sorted({node for leaf in leaves for node in self._members[self._root(leaf)]})
    if outside := [node for node in members if node < count and node not in wanted]:
      refusals.raise_coupled(self, sorted(wanted), outside, who)
    owned = [node - count for node in members if node >= count]
    outputs = [program.outputs[i] for i in leaves] + [program.outputs[count + j] for j in owned]
    grads, params, states = self.inputs
    inputs = [grads[i] for i in leaves] + [params[i] for i in leaves] + [states[j] for j in owned]
    operations = dataflow.slice_of(program, outputs, self.given | set(inputs))
    read = dataflow.read_by(operations, outputs)
    if foreign := read & set(program.inputs) - set(inputs) - self.given:
      refusals.raise_foreign(self, leaves, min(foreign), operations, who)
    return self.make_group(leaves, owned, inputs, outputs, operations, sorted(read & self.given))

  def make_group(
    self,
    leaves: Sequence[int],
    states: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[Atom],
    operations: Sequence[Operation],
    handed: Sequence[int],
    program: Program | None = None,
  ) -> Group:
    """Returns a slice of this update as a group; `handed` are the variables that it reads besides its inputs.

    `program` is the program of the slice, where that is another form of this update's program.
    """
    program = program or self.program
    constants = program.constants
    return Group(
      leaves=tuple(leaves),
      states=tuple(states),
      shared=tuple(v for v in handed if v not in constants),
      constants={v: constants[v] for v in handed if v in constants},
      operations=tuple(operations),
      outputs=tuple(outputs),
      program=program,
      inputs=tuple(inputs),
      names=(*(self.names[i] for i in leaves), *(self.state_names[j] for j in states)),
    )


def _set_bits(bits: int) -> Iterable[int]:
  while bits:
    low = bits & -bits
    yield low.bit_length() - 1
    bits ^= low
