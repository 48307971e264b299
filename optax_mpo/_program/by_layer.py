"""Runs the update of a stack of layers for one layer at a time, where the result is provably the same.

Why: the weights of scanned layers are stacked, `[layers, ...]`, and so are their moments. The backward pass of the scan
has the gradient of one layer at a time, and should update that layer's weights at once. But Optax's update is for the
whole stack. Traced again for one layer, it could mean something else: a weight decay mask by rank would see scales as
scalars, adafactor would factor other axes.

How: run the operations of the update one by one on arrays that have the entries of one layer only, and track where
these lie in the whole array (`entries.Entries`): elementwise operations keep them there, a transpose moves them to
another axis, a slice shifts them. An operation that mixes layers (a sum over their axis, say) or is not known is
refused by name. Arrays that do not depend on the layer are sliced at its entries where they meet ones that do.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._core.annotations import Index
from optax_mpo._program import dataflow, jax_forms, layer_origins
from optax_mpo._program.entries import Entries, Where
from optax_mpo._program.layer_rules import ELEMENTWISE, Layer, rule_of
from optax_mpo._program.layer_scans import Crossing
from optax_mpo._program.program import Atom, Operation, Program


def run(
  operations: Sequence[Operation],
  program: Program,
  env: dict[int, jax.Array],
  where: dict[int, Where],
  index: Index,
  count: int,
  is_rows: bool = False,
  divisors: frozenset[int] = frozenset(),
) -> None:
  """Runs operations for one layer.

  Args:
    operations: the operations, in order.
    program: the program they are from.
    env: the values of variables, read and written; those that depend on the layer have its entries only.
    where: where the layer lies in each variable in `env`, read and written; missing for those that do not depend on it.
    index: i32[], which layer.
    count: the number of layers.
    is_rows: whether "layers" are rows of one weight.
    divisors: the variables that have to divide, as for `xla_cpu.kept_division`.

  Raises:
    NotSeparableError: if an operation mixes layers or is not known.
  """
  layer = Layer(index, count, is_rows, divisors, run)
  for operation in operations:
    values = [jax_forms.operand(a, env) for a in operation.inputs]
    found = [where.get(a) if isinstance(a, int) else None for a in operation.inputs]
    if isinstance(operation, Crossing):
      result, entries = operation.run(values[0], found[0], layer)
      results, out = [result], [entries]
    elif all(e is None for e in found):
      results, out = jax_forms.run_operation(operation, values), [None] * len(operation.outputs)
    else:
      if operation.name in ELEMENTWISE:
        _cut_early(operation, program, env, values, found, layer)
      results, out = rule_of(operation)(operation, values, found, layer, [program.aval(a) for a in operation.inputs])
    for var, result, entries in zip(operation.outputs, results, out, strict=True):
      if var >= 0:
        env[var], where[var] = result, entries


def _cut_early(
  operation: Operation,
  program: Program,
  env: dict[int, jax.Array],
  values: list[jax.Array],
  found: list[Where],
  layer: Layer,
) -> None:
  """Cuts operands that do not depend on the layer, before they are broadcast or moved: XLA may store the result."""
  entries = next(e for e in found if e is not None)

  def cut(atom: Atom, entries: Entries) -> jax.Array | None:
    if not isinstance(atom, int) or atom in layer.divisors or (made := program.makers.get(atom)) is None:
      return None
    operation = program.operations[made]
    if not layer_origins.is_move(operation):
      return None
    source, at = operation.inputs[0], layer_origins.before(program, atom, entries, layer.count)
    if at is None or not isinstance(source, int) or source not in env:
      return None
    value = cut(source, at)
    value = layer.cut(env[source], at) if value is None else value
    (result,), (where,) = rule_of(operation)(operation, [value], [at], layer, [program.aval(source)])
    return result if where == entries else None

  for k, atom in enumerate(operation.inputs):
    value = cut(atom, entries) if found[k] is None and program.aval(atom).shape else None
    if value is not None:
      values[k], found[k] = value, entries


def entries_of(
  operations: Sequence[Operation], program: Program, where: dict[int, Where], count: int
) -> dict[int, Where]:
  """Returns where a layer lies in all variables that operations make, given where it lies in those that they read.

  Raises:
    NotSeparableError: as `run` does.
  """
  found = dict(where)
  read = dataflow.read_by(operations) - {v for o in operations for v in o.outputs} - set(program.constants)

  def trace(index: Index) -> None:
    env = dict(program.constants) | {v: types.zeros(program.aval(v)) for v in read}
    env |= {v: types.zeros(types.resized(program.aval(v), e.axis, e.size)) for v, e in where.items() if e is not None}
    run(operations, program, env, found, index, count)

  jax.eval_shape(trace, jax.ShapeDtypeStruct((), jnp.int32))
  return found


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of an update, run and written before the next part is read.

  Attributes:
    inputs: the variables of gradients, weights and states. A new state that is already written replaces the old one.
    outputs: the indices of the update's outputs that it makes.
    operations: its operations.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  operations: tuple[Operation, ...]

  @classmethod
  def whole(cls, program: Program, inputs: Sequence[int]) -> "Part":
    """All of an update."""
    return cls(tuple(inputs), tuple(range(len(program.outputs))), tuple(program.operations))


def parts(
  program: Program,
  inputs: Sequence[int],
  outputs: Sequence[Atom],
  places: dict[int, int],
  given: set[int],
) -> list[Part]:
  """Splits an update into parts that can be run and written one after the other, each over what it has read.

  Why: XLA:GPU writes each stack in a kernel of its own, and would compute all new values before the first write. If
  nothing later needs an old moment, the new one is written first, and then read again in its place.

  Args:
    program: the program of the update.
    inputs: the variables of gradients, weights and states.
    outputs: the atoms of new weights and states.
    places: for each output that is a new state, the index of the input that it replaces.
    given: the variables that are known besides the inputs.
  """

  def part(inputs: Sequence[int], chosen: Sequence[int]) -> Part:
    operations = dataflow.slice_of(program, [outputs[k] for k in chosen], {*given, *inputs})
    return Part(tuple(inputs), tuple(chosen), tuple(operations))

  now, left, found = list(inputs), list(range(len(outputs))), []
  for k, place in places.items():
    new = outputs[k]
    if not isinstance(new, int) or new in inputs:
      continue
    after = [*now[:place], new, *now[place + 1 :]]
    rest = [o for o in left if o != k]
    if now[place] in dataflow.read_by(part(after, rest).operations, [outputs[o] for o in rest]):
      continue
    found.append(part(now, [k]))
    now, left = after, rest
  return [*found, part(now, left)]
