"""What the update of a stack needs from all of its layers: made before the scan that updates them, or after it.

Why: `optax.scale_by_param_block_rms` scales each layer by a norm of the whole stack of weights, and `optax.zero_nans`
keeps one flag for the whole stack of gradients. No layer has these alone. But the old weights are there before the
scan, and only new state reads the flag.

How: by dataflow. What `by_layer` refuses and what depends on no gradient is made from the whole stack, before any layer
is updated. A reduction of gradients over the layers is cut in two: the scan stacks what each layer gives to it, and the
rest is done after the scan. This changes the order of a sum, so its last bit can differ from the ordinary step's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._core.annotations import Index
from optax_mpo._program import by_layer, dataflow, jax_forms
from optax_mpo._program.entries import Entries, NotSeparableError, Where
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._program.selects import REDUCTIONS
from optax_mpo._stepping.site import Values

_SMALL = 1024  # elements that are always few enough to be kept; otherwise, those of one layer


@dataclasses.dataclass(frozen=True)
class Across:
  """What is done for a whole stack, around the scans that update its layers.

  Attributes:
    carried: the positions among weights, then states, of those that have layers. The scans carry them.
    wholes: the positions of those that have none.
    totals: the types of arrays with an entry for each layer, from which `wholes` are made. The scans carry them, too.
    before: `before(params, states, shared)` makes the values that each layer reads besides `shared`.
    after: `after(totals, shared)` makes the new `wholes`; `shared` are all values that the update of a layer reads,
      without its index.
  """

  carried: tuple[int, ...]
  wholes: tuple[int, ...] = ()
  totals: tuple[jax.ShapeDtypeStruct, ...] = ()
  before: Callable[[Values, Values, Values], list[jax.Array]] = lambda *_: []
  after: Callable[[Values, Values], list[jax.Array]] = lambda *_: []


@dataclasses.dataclass(frozen=True)
class Update:
  """The update of a stack, as arguments and results of a program.

  Attributes:
    program: what the scan stacks, weights, states, shared and given values -> new weights and states.
    counts: the numbers of these five kinds of arguments.
    entries: where a layer lies in each of the first three; None for a state that has no layers.
    count: the number of layers.
    large: the elements of one layer's gradients.
  """

  program: Program
  counts: tuple[int, ...]
  entries: tuple[Where, ...]
  count: int
  large: int

  @functools.cached_property
  def inputs(self) -> list[list[int]]:
    """The variables of each kind of argument."""
    left = iter(self.program.inputs)
    return [[next(left) for _ in range(n)] for n in self.counts]


@dataclasses.dataclass(frozen=True)
class _Total:
  """A reduction over the layers, and where they lie in its operand."""

  operation: Operation
  entries: Entries

  @property
  def rest(self) -> tuple[int, ...]:
    """The other axes that it reduces."""
    return tuple(a for a in self.operation.eqn.params["axes"] if a != self.entries.axis)

  @property
  def stacked(self) -> Entries:
    """Where the layers lie once the other axes are reduced."""
    return self.entries.on(self.entries.axis - sum(a < self.entries.axis for a in self.rest))

  def run(self, value: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Reduces some of the axes."""
    changes = {"out_sharding": None} if self.operation.eqn.params.get("out_sharding") is not None else {}
    return jax_forms.run_operation(self.operation, [value], axes=axes, **changes)[0] if axes else value


@dataclasses.dataclass
class _Found:
  """What is found of an update.

  Attributes:
    where: where a layer lies in each variable; missing for those that need all layers.
    early: the variables that are made before the scan.
    totals: the reductions over the layers, by the variable of the result.
    refused: for each variable that needs all layers, why no layer can have it alone.
  """

  where: dict[int, Where]
  early: set[int]
  totals: dict[int, _Total] = dataclasses.field(default_factory=dict)
  refused: dict[int, NotSeparableError] = dataclasses.field(default_factory=dict)


def take_apart(update: Update) -> tuple[Update, Across]:
  """Takes from an update what needs all layers.

  Returns:
    The rest: it reads the values that are made before, and its last new states are the totals. And what was taken.

  Raises:
    NotSeparableError: where that is more than `Across` can do.
  """
  stacks, params, states, shared, given = update.inputs
  program, places = update.program, range(len(params) + len(states))
  where = update.entries[len(stacks) :]
  wholes = [k for k in places if where[k] is None]
  found = _find(update)
  if not (wholes or found.early):
    return update, Across(tuple(places))

  layered = [k for k in places if where[k] is not None]
  outputs = [program.outputs[k] for k in layered]
  new_wholes = [program.outputs[k] for k in wholes]
  for atom in outputs:
    if isinstance(atom, int) and atom in found.refused:
      raise found.refused[atom]
  for atom in new_wholes:
    if isinstance(atom, int) and found.where.get(atom) is not None:
      raise NotSeparableError("is made layer by layer")

  known = {*shared, *given, *program.constants, *found.early}
  late = dataflow.slice_of(program, new_wholes, known | set(found.totals))
  read_late = dataflow.read_by(late, new_wholes)
  totals = [total for v, total in found.totals.items() if v in read_late]
  reduced = [total.operation.inputs[0] for total in totals]
  left = [v for v, e in zip(states, where[len(params) :], strict=True) if e is not None]
  own = {*stacks, *params, *left}
  operations = dataflow.slice_of(program, [*outputs, *reduced], known | own)
  early = sorted(found.early & (read_late | dataflow.read_by(operations, [*outputs, *reduced])))

  def before(weights: Values, old: Values, values: Values) -> list[jax.Array]:
    env = dict(program.constants) | dict(zip([*params, *states, *shared], [*weights, *old, *values], strict=True))
    jax_forms.run(program, dataflow.slice_of(program, early, set(env)), env)
    return [env[v] for v in early]

  def after(parts: Values, values: Values) -> list[jax.Array]:
    env = dict(program.constants) | dict(zip([*shared, *early, *given], values, strict=True))
    for total, part in zip(totals, parts, strict=True):
      env[total.operation.outputs[0]] = total.run(part, (total.stacked.axis,))
    jax_forms.run(program, late, env)
    return [jax_forms.value(a, env) for a in new_wholes]

  def rest(ys: Values, weights: Values, old: Values, values: Values, handed: Values) -> list[jax.Array]:
    env = dict(program.constants) | dict(zip(stacks, ys, strict=True))
    env |= dict(zip([*params, *left], [*weights, *old[: len(left)]], strict=True))
    env |= dict(zip([*shared, *early, *given], [*values, *handed], strict=True))
    jax_forms.run(program, operations, env)
    results = [jax_forms.value(a, env) for a in outputs]
    return results + [total.run(jax_forms.value(v, env), total.rest) for total, v in zip(totals, reduced, strict=True)]

  def struct(atoms: Sequence[Atom]) -> list[jax.ShapeDtypeStruct]:
    return [types.struct(program.aval(a)) for a in atoms]

  sums = jax.eval_shape(
    lambda values: [total.run(v, total.rest) for total, v in zip(totals, values, strict=True)], struct(reduced)
  )
  if any(s.size > max(update.large, _SMALL) for s in sums):
    raise found.refused[totals[0].operation.outputs[0]]
  handed = struct([*early, *given])
  new, _ = jax_forms.trace(rest, struct(stacks), struct(params), [*struct(left), *sums], struct(shared), handed)
  entries = [e for e in update.entries if e is not None] + [t.stacked for t in totals]
  counts = (len(stacks), len(params), len(left) + len(sums), len(shared), len(handed))
  across = Across(tuple(layered), tuple(wholes), tuple(map(types.struct, sums)), before, after)
  return dataclasses.replace(update, program=new, counts=counts, entries=tuple(entries)), across


def _find(update: Update) -> _Found:
  """Goes through an update operation by operation, and finds what needs all layers."""
  program = update.program
  stacks, params, states, _, given = update.inputs
  of_gradients = dataflow.dependencies(program, [int(v in {*stacks, *given}) for v in program.inputs])
  layered = dict(zip([*stacks, *params, *states], update.entries, strict=True))
  found = _Found(dict(layered), {v for v in states if layered[v] is None})

  def is_small(var: int) -> bool:
    return math.prod(program.aval(var).shape) <= max(update.large, _SMALL)

  def needs_all(operation: Operation, error: NotSeparableError, env: dict[int, jax.Array]) -> None:
    """Marks the results of an operation that needs all layers."""
    for v in (v for v in operation.outputs if v >= 0):
      if is_small(v) and not of_gradients[v]:
        found.early.add(v)
        env[v], found.where[v] = types.zeros(program.aval(v)), None
      else:
        found.refused[v] = error

  def go_through(index: Index) -> None:
    env = dict(program.constants) | {v: types.zeros(program.aval(v)) for v in program.inputs}
    env |= {v: types.zeros(types.resized(program.aval(v), e.axis, e.size)) for v, e in layered.items() if e is not None}
    for operation in dataflow.slice_of(program, program.outputs, {*program.inputs, *program.constants}):
      read = {a for a in operation.inputs if isinstance(a, int)}
      error = next((found.refused[a] for a in operation.inputs if isinstance(a, int) and a in found.refused), None)
      if error is not None:
        if any(of_gradients[a] for a in read) and any(found.where.get(a) is not None for a in read):
          raise error  # it goes on with each layer after it has read all of them
        if any(of_gradients[a] for a in read) and any(a in found.refused and not of_gradients[a] for a in read):
          raise error
        needs_all(operation, error, env)
        continue
      try:
        by_layer.run([operation], program, env, found.where, index, update.count)
      except NotSeparableError as refused:
        if any(of_gradients[a] for a in read):
          reduced = operation.inputs[0]
          entries = found.where.get(reduced) if isinstance(reduced, int) else None
          if operation.name not in REDUCTIONS or entries is None:
            raise
          found.totals[operation.outputs[0]] = _Total(operation, entries)
        needs_all(operation, refused, env)
        continue
      if any(found.where.get(a) is not None or of_gradients[a] for a in read):
        continue
      if read & found.early or any(not is_small(a) for a in read):  # once, and not in each layer
        found.early.update(v for v in operation.outputs if v >= 0 and is_small(v))

  jax.eval_shape(go_through, jax.ShapeDtypeStruct((), jnp.int32))
  return found
