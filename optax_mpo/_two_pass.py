"""Takes apart an update whose leaves are coupled through a few numbers, for two passes over the gradients.

Why: clipping by the global norm needs the gradients of all leaves before any leaf can be stepped. LOMO
(arXiv:2306.09782) runs the backward pass twice: the first time for the norm alone, each gradient being used up at once.

How: by dataflow, as in `_separable`. In the program of the update, the small arrays that depend on several leaves (the
norm, the scale that clips, a flag that all is finite) are the *links*, as far as small arrays are all it takes to make
them: the largest moment of a block after clipping is small, but takes a whole gradient. What a leaf contributes to
them, such as the sum of its squares, are its *parts*. The first pass makes the parts of each leaf; in between, links
are made from parts; in the second pass each leaf is stepped as if the links were constants. Leaves that are small
themselves are not worth the effort: their gradients are kept from the first pass, and they are stepped in between.

The parts of a stack of layers are made layer by layer: a sum over the stack becomes a sum of the layers' sums. That is
the one place where the last bit of a number can differ from that of the unfused step.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo import _jaxpr, _separable, _site, _stacked, _tree, _types

SMALL = 1024  # elements: what may be held for every leaf


def _keeping_dtype(reduction: Callable[..., Any]) -> Callable[..., Any]:
  """A sum or a product of whole numbers as they are, which NumPy would make wider."""
  return lambda x, axis: reduction(x, axis=axis, dtype=x.dtype)


_REDUCED_AGAIN = {
  "reduce_sum": _keeping_dtype(jnp.sum),
  "reduce_max": jnp.max,
  "reduce_min": jnp.min,
  "reduce_prod": _keeping_dtype(jnp.prod),
  "reduce_and": jnp.all,
  "reduce_or": jnp.any,
}


@dataclasses.dataclass
class Part:
  """What the first pass makes of one leaf.

  Attributes:
    leaf: which.
    outputs: the variables that it makes, the gradient itself for a small leaf.
    reads: the variables of its weight and state that it reads.
    shared: the shared variables that it reads.
    operations: the slice.
  """

  leaf: int
  outputs: tuple[int, ...]
  reads: tuple[int, ...]
  shared: tuple[int, ...]
  operations: tuple[_jaxpr.Operation, ...]


class TwoPass:
  """An update taken apart for two passes.

  Attributes:
    parts: what the first pass makes.
    groups: the updates of single leaves for the second pass; their `shared` are shared variables and links.
    middle: the leaves that are stepped in between.
  """

  def __init__(self, update: _separable.Update, caller: str):
    self._update, self._program, self._caller = update, update.program, caller
    self._grads, self._params, self._states = update.inputs
    count = len(self._grads)
    bits = [1 << i for i in range(count)]
    deps = _jaxpr.dependencies(self._program, [*bits, *bits, *([0] * len(self._states))])
    self._own_states(deps)
    owned = [1 << o if o is not None else 0 for o in self._owners]
    self._deps = _jaxpr.dependencies(self._program, [*bits, *bits, *owned])
    self._small = {v for v in self._deps if self._size(v) <= SMALL}
    self.middle = [i for i in range(count) if self._grads[i] in self._small]
    self._links = self._small & self._made_between(self._deps, self._small)
    self.groups = [self._group(i) for i in range(count) if i not in self.middle]
    self._between()

  def _size(self, var: int) -> int:
    return math.prod(self._program.aval(var).shape)

  def _made_between(self, deps: dict[int, int], small: set[int]) -> set[int]:
    """The variables that can be made from weights, state and small arrays of single leaves."""
    made = {*self._update.given, *self._params, *self._states}
    made |= {v for v in small if not deps[v] & (deps[v] - 1)}
    for operation in self._program.operations:
      if all(a in made for a in operation.inputs if isinstance(a, int)):
        made.update(operation.outputs)
    return made

  def _own_states(self, deps: dict[int, int]) -> None:
    """Finds the leaf that each state belongs to: that from which alone, but for links, its new value is made."""
    program, count = self._program, len(self._grads)
    small = {v for v in deps if self._size(v) <= SMALL}
    links = {v for v in small & self._made_between(deps, small) if deps[v] & (deps[v] - 1)}
    leaf_of = {v: i for part in (self._grads, self._params) for i, v in enumerate(part)}
    self._owners: list[int | None] = []
    for j in range(len(self._states)):
      found = _jaxpr.slice_of(program, [program.outputs[count + j]], self._update.given | links)
      leaves = {leaf_of[a] for a in _jaxpr.read_by(found, [program.outputs[count + j]]) if a in leaf_of}
      if len(leaves) > 1:
        first, *others = sorted(leaves)
        self._update.raise_coupled([first], others, f"{self._caller}, two_pass")
      self._owners.append(leaves.pop() if leaves else None)

  def _slice(self, outputs: Sequence[Any], given: set[int] | frozenset[int]) -> tuple[list[Any], set[int]]:
    """Returns the operations that make `outputs` from `given`, and the variables that are read but not made."""
    operations = _jaxpr.slice_of(self._program, outputs, given)
    made = {v for operation in operations for v in operation.outputs}
    return operations, _jaxpr.read_by(operations, outputs) - made

  def _group(self, leaf: int) -> _separable.Group:
    program, count, update = self._program, len(self._grads), self._update
    links = {v for v in self._links if self._deps[v] & ~(1 << leaf)}
    states = [j for j, owner in enumerate(self._owners) if owner == leaf and j not in update.shared_states]
    inputs = [self._grads[leaf], self._params[leaf], *(self._states[j] for j in states)]
    outputs = [program.outputs[leaf], *(program.outputs[count + j] for j in states)]
    operations, read = self._slice(outputs, update.given | links | set(inputs))
    handed = sorted(read - set(inputs))
    self._refuse_foreign(leaf, [v for v in handed if v not in update.given and v not in links])
    return update.make_group([leaf], states, inputs, outputs, operations, handed)

  def _refuse_foreign(self, leaf: int, found: Sequence[int]) -> None:
    """Raises where a leaf's step reads more than small numbers of other leaves."""
    others = {i for v in found for i in range(len(self._grads)) if self._deps[v] >> i & 1} - {leaf}
    if others:
      self._update.raise_coupled([leaf], sorted(others), f"{self._caller}, two_pass")
    large = [self._update.state_names[self._states.index(v)] for v in found if self._size(v) > SMALL]
    if large:
      raise ValueError(
        f"{self._caller}, two_pass: {_tree.listed(large)} belongs to no leaf of the params. Train with tx.update."
      )

  def _between(self) -> None:
    """Finds what is made between the passes, from which parts."""
    program, count, update = self._program, len(self._grads), self._update
    self._new_states = [
      j
      for j, owner in enumerate(self._owners)
      if (owner is None or owner in self.middle) and j not in update.shared_states
    ]
    outputs: list[Any] = sorted({v for group in self.groups for v in group.shared} - set(update.shared))
    outputs += [program.outputs[i] for i in self.middle]
    outputs += [program.outputs[count + j] for j in self._new_states]
    large = {i for i in range(count) if i not in self.middle}
    single = {v for v in self._small if self._deps[v] and not self._deps[v] & (self._deps[v] - 1)}
    parts = {v for v in single if self._deps[v].bit_length() - 1 in large}
    inputs = {*(self._grads[i] for i in self.middle), *self._params, *self._states}
    operations, read = self._slice(outputs, update.given | parts | inputs)
    self._middle_operations = operations
    for v in sorted(read - update.given - parts - inputs):
      leaves = [i for i in range(count) if self._deps[v] >> i & 1]
      names = _tree.listed(update.names[i] for i in leaves)
      raise ValueError(
        f"{self._caller}, two_pass: tx needs the whole gradient of {names} to step other leaves, and not just a few "
        "numbers made of it. Train with tx.update."
      )
    # A part that another part of the same leaf is made of is not needed itself.
    self.parts = [self._part(i, sorted(v for v in read & parts if self._deps[v] == 1 << i)) for i in sorted(large)]
    self.parts = [part for part in self.parts if part.outputs]
    self.parts += [Part(i, (self._grads[i],), (), (), ()) for i in self.middle]

  def _part(self, leaf: int, outputs: list[int]) -> Part:
    own = {self._params[leaf], *(v for v, owner in zip(self._states, self._owners, strict=True) if owner == leaf)}
    operations, read = self._slice(outputs, self._update.given | own | {self._grads[leaf]})
    shared = tuple(sorted(v for v in read & self._update.given if v not in self._program.constants))
    return Part(leaf, tuple(outputs), tuple(sorted(read & own)), shared, tuple(operations))

  def parts_of(self, gradients: Sequence[Any], known: dict[int, Any]) -> dict[int, Any]:
    """Makes the parts of all leaves, where all gradients are at hand.

    Args:
      gradients: by leaf.
      known: as for `links`.

    Returns:
      The values of the parts, by variable.
    """
    made: dict[int, Any] = {}
    for part in self.parts:
      env = dict(self._program.constants) | known | {self._grads[part.leaf]: gradients[part.leaf]}
      _jaxpr.run(self._program, part.operations, env)
      made |= {v: env[v] for v in part.outputs}
    return made

  def links(
    self, parts: dict[int, Any], known: dict[int, Any]
  ) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """Makes what the second pass is handed.

    Args:
      parts: the values of the parts, by variable.
      known: the values of the shared variables, the old weights and the old state, by variable.

    Returns:
      The values of variables; the new weights and the new states of what is stepped in between, by index.
    """
    program, count = self._program, len(self._grads)
    env = dict(program.constants) | known | parts
    _jaxpr.run(program, self._middle_operations, env)
    weights = {i: _jaxpr.value(program.outputs[i], env) for i in self.middle}
    return env, weights, {j: _jaxpr.value(program.outputs[count + j], env) for j in self._new_states}


def part_step(part: Part, program: _jaxpr.Program, grad: int) -> _site.Step:
  """The step of the first pass: its new state are the values of the parts, and it leaves the weight alone."""

  def struct(var: int) -> jax.ShapeDtypeStruct:
    return _types.struct(program.aval(var))

  def run(grads: Any, params: Any, states: Any, shared: Any) -> tuple[list[Any], list[Any]]:
    env = dict(program.constants) | dict(zip((grad, *part.reads, *part.shared), [*grads, *shared], strict=True))
    _jaxpr.run(program, part.operations, env)
    return [], [env[v] for v in part.outputs]

  shared = tuple(struct(v) for v in (*part.reads, *part.shared))
  return _site.Step(run, (struct(grad),), (), tuple(struct(v) for v in part.outputs), shared, layer_part)


def layer_part(step: _site.Step, post: Any, stacks: Sequence[Any], given: Sequence[Any], length: int) -> _site.Layered:
  """Makes the step of one layer for the first pass, as `_site.layer_step` does for the second.

  The state of a layer are its own reductions; those of the stack are made from them when the scan is over.
  """

  def whole(ys: Any, shared: Any, values: Any) -> list[Any]:
    return step.run(post(ys, values), [], [], shared)[1]

  program, _ = _jaxpr.trace(whole, list(stacks), list(step.shared), list(given))
  layers = [_types.struct(s, 0) for s in stacks]
  rest, number = [*step.shared, *given], jax.ShapeDtypeStruct((), jnp.int32)
  marks = _jaxpr.dependencies(program, [1] * len(stacks) + [0] * len(rest))
  inside: list[_jaxpr.Operation] = []
  across: list[_jaxpr.Operation] = []
  after: list[_jaxpr.Operation] = []

  def begin(ys: Any, handed: Any) -> tuple[dict[int, Any], dict[int, int | None]]:
    values = [*(y[None] for y in ys), *handed]
    env = dict(program.constants) | dict(zip(program.inputs, values, strict=True))
    return env, dict.fromkeys(program.inputs[: len(stacks)], 0)

  def split(index: Any, ys: Any, handed: Any) -> list[Any]:
    (env, axes), crossed = begin(ys, handed), set()
    for operation in program.operations:
      read = {a for a in operation.inputs if isinstance(a, int)}
      if read & crossed:
        if any(marks[a] for a in read - crossed):
          raise _stacked.NotSeparableError(f"{_jaxpr.where(operation)} needs all layers before it goes on with each")
        after.append(operation)
        crossed.update(operation.outputs)
      elif operation.name in _REDUCED_AGAIN and axes.get(operation.inputs[0]) in operation.eqn.params["axes"]:
        across.append(operation)
        crossed.update(operation.outputs)
      else:
        inside.append(operation)
        if not any(marks[a] for a in read):
          after.append(operation)
        _stacked.run([operation], program, env, axes, index, length)
    if any(isinstance(a, int) and marks[a] and a not in crossed for a in program.outputs):
      raise _stacked.NotSeparableError("other leaves need more of its gradient than reductions over the layers")
    return []

  jax.eval_shape(split, number, layers, rest)
  inside = _needed(inside, {a for o in across for a in o.inputs if isinstance(a, int)})
  after = _needed(after, {a for a in program.outputs if isinstance(a, int)})

  def run(ys: Any, params: Any, states: Any, shared: Any) -> tuple[list[Any], list[Any]]:
    *handed, index = shared
    env, axes = begin(ys, handed)
    _stacked.run(inside, program, env, axes, index, length)
    return [], [_jaxpr.run_operation(o, [env[a] for a in o.inputs], **_unsharded(o))[0] for o in across]

  def finish(totals: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    env = dict(program.constants) | dict(zip(program.inputs[len(stacks) :], shared, strict=True))
    for operation, total in zip(across, totals, strict=True):
      env[operation.outputs[0]] = _REDUCED_AGAIN[operation.name](total, axis=0)
    _jaxpr.run(program, after, env)
    return [_jaxpr.value(a, env) for a in program.outputs]

  avals = [program.aval(o.outputs[0]) for o in across]
  kept = tuple(_types.struct(a) for a in avals)
  layer = _site.Step(run, tuple(layers), (), kept, (*rest, number), _no_deeper)
  return _site.Layered(layer, (), (0,) * len(kept), finish)


def _needed(operations: list[_jaxpr.Operation], wanted: set[int]) -> list[_jaxpr.Operation]:
  kept = []
  for operation in reversed(operations):
    if wanted & set(operation.outputs):
      kept.append(operation)
      wanted |= {a for a in operation.inputs if isinstance(a, int)}
  return kept[::-1]


def _unsharded(operation: _jaxpr.Operation) -> dict[str, Any]:
  return {"out_sharding": None} if operation.eqn.params.get("out_sharding") is not None else {}


def _no_deeper(*_: Any) -> Any:
  raise _stacked.NotSeparableError("its reductions are made for one scan, not for scans inside of scans")
