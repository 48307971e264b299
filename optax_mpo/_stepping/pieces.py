"""Finds the pieces of a stack: layers whose gradients come from one place, and how each is updated from there.

Why: several scans may each make the gradients of some layers; single layers may be used outside of scans, or not at
all. The gradient of the stack is a sum of padded parts, or joins parts.

How: the operations from the results of one scan to the gradient are done for one layer alone, without the parts that
have nothing to add there. Where no scan makes the gradient of a layer, it is followed back to the array that it is
copied from, or to the scalar that fills it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_mpo._core import types
from optax_mpo._core.annotations import Shaped
from optax_mpo._program import by_layer, dataflow, jax_forms, layer_origins
from optax_mpo._program.entries import Entries, NotSeparableError, Where
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._stepping.layered import layer_step
from optax_mpo._stepping.plan import Released
from optax_mpo._stepping.site import Site, Values


@dataclasses.dataclass
class Piece:
  """Layers of a site whose gradients come from one place.

  Attributes:
    scan: the operation of the scan; None where no scan makes them.
    path: the operations after the scan that are done inside it, or before it.
    sources: what the gradients are made from, such as results that a scan stacks, and where a layer lies in each.
    released: how the layers are updated.
    covered: the entries along the axis of the layers.
    fill: the scalar that fills the gradients, where they have no sources.
  """

  scan: int | None
  path: list[int]
  sources: dict[int, Entries]
  released: Released
  covered: set[int]
  fill: float | None = None

  def reads(self, program: Program) -> set[int]:
    """The variables that the update of a layer needs besides those sources, or their early operations."""
    early = [program.operations[i] for i in self.released.early]
    made = {v for operation in early for v in operation.outputs}
    return ({*self.released.given} | dataflow.read_by(early)) - made


class Finder:
  """Finds the pieces of a site.

  Attributes:
    why: why there are none.
  """

  def __init__(self, program: Program, site: Site, index: int):
    """Takes a program, and a site with its index."""
    self.program, self.site, self.index, self.why = program, site, index, ""
    self._found: list[Piece] = []
    self._left: set[int] = set()

  def find(self, stacked: dict[int, set[int]]) -> list[Piece]:
    """The pieces, last scan first; empty where they are not all of the site.

    Layers may also be interleaved in one scan. Then each of the results that it stacks has some of them.

    Args:
      stacked: the results that scans stack for the gradients, by scan.
    """
    for scan in sorted(stacked, reverse=True):
      refused = self._add_scan(scan, stacked[scan])
      if refused and len(stacked[scan]) > 1 and len(self.site.grads) == 1:
        for v in sorted(stacked[scan]):
          refused = self._add_scan(scan, {v}) or refused
      self.why = self.why or refused
    if self._found and self._left and len(self.site.grads) == 1:
      for sources, count, fill in list(self._rests()):
        self._add(None, sources, count, set(), fill)
    if self._found and self._left:
      self.why = self.why or (
        f"{len(self._left)} of its layers get no gradient from a scan: scan them too, or make them leaves of their own"
      )
    return [] if self._left else self._found

  def _add_scan(self, scan: int, chosen: set[int]) -> str:
    operation = self.program.operations[scan]
    outputs = operation.outputs[jax_forms.scan_counts(operation)[1] :]
    others = {v for v in operation.outputs if v >= 0} - chosen
    sources = {v: Entries(0) for v in outputs if v in chosen}
    return self._add(scan, sources, jax_forms.scan_options(operation)["length"], others)

  def _add(
    self, scan: int | None, sources: dict[int, Entries], count: int, others: set[int], fill: float | None = None
  ) -> str:
    """Adds a piece; returns why it is none."""
    try:
      piece, length = self._piece(scan, sources, count, others, fill)
    except (NotSeparableError, TypeError) as error:
      return str(error)
    left = self._left if self._found else set(range(length))
    if self._found and piece.released.layered.across.totals != self._found[0].released.layered.across.totals:
      return "its scans make different sums over the layers"
    if not piece.covered <= left:
      return "some of its layers get gradients from several scans: scan each layer once"
    self._found.append(piece)
    self._left = left - piece.covered
    return ""

  def _rests(self) -> Iterator[tuple[dict[int, Entries], int, float | None]]:
    """What makes the gradients of the layers that are left: arrays with their layers, and the number of these.

    Where a scalar fills them, the only array is the gradient itself, and the scalar stands beside it.
    """
    (grad,), (e,) = self.site.grads, self._found[0].released.layered.gradients
    made = {v for piece in self._found for i in piece.path for v in self.program.operations[i].outputs}
    groups: dict[tuple[float | None, *tuple[tuple[int, int], ...]], list[tuple[int, ...]]] = {}
    if not isinstance(grad, int):
      return
    for i in sorted(self._left):
      entries = Entries(e.axis, i)
      fill = layer_origins.fill(self.program, grad, entries, 1)
      leaves = layer_origins.leaves(self.program, grad, entries) if fill is None else {grad: entries}
      if fill is not None or made.isdisjoint(leaves):
        key = (None if fill is None else fill.item(), *((v, at.axis) for v, at in leaves.items()))
        groups.setdefault(key, []).append((i, *(at.start for at in leaves.values())))
    for (fill, *keys), places in groups.items():
      for run in _progressions(places):
        steps = [b - a for a, b in zip(*run[:2], strict=True)] if len(run) > 1 else [1] * len(run[0])
        starts = zip(keys, run[0][1:], steps[1:], strict=True)
        sources = {v: Entries(axis, start, step) for (v, axis), start, step in starts}
        yield sources, len(run), fill

  def _piece(
    self, scan: int | None, sources: dict[int, Entries], count: int, others: set[int], fill: float | None
  ) -> tuple[Piece, int]:
    """Makes the update of one layer from where it lies in `sources`. Returns the number of all layers, too.

    `others` are variables that are made together with the sources, and that a layer cannot have.

    Raises:
      NotSeparableError: where a layer cannot be updated alone.
    """
    program, site = self.program, self.site
    last = max(program.makers[v] for v in sources)
    before = {v for o in program.operations[: last + 1] for v in o.outputs if v >= 0}
    fills, sums = self._fills(before, sources, count)

    # Everything after the scan has to be done inside it. What does not depend on the scan can be done before it.
    inner, later = set(sources) | set(fills), others  # what the scan's body makes, and what it cannot have
    inside, early = [], []
    for operation in dataflow.slice_of(program, site.grads, (before - sums) | inner):
      position = self._position(operation)
      operation = program.operations[position]
      read = {a for a in operation.inputs if isinstance(a, int)}
      if read & later or operation.name == "scan":
        raise NotSeparableError(
          f"its gradient gets another part after the scan, {jax_forms.where(operation)}: use these layers in one scan "
          "only, or make those that are used elsewhere leaves of their own"
        )
      if read & inner:
        inner.update(operation.outputs)
        inside.append(position)
      else:
        early.append(position)
    operations = [program.operations[i] for i in sorted([*inside, *self._moves(inside, inner)])]
    made = {v for operation in operations for v in operation.outputs}
    read = dataflow.read_by(operations, site.grads)
    sources = {v: e for v, e in sources.items() if v in read}
    given = tuple(sorted(read - made - set(sources) - set(fills) - set(program.constants)))
    early = [self._position(o) for o in dataflow.slice_of(program, given, (before - sums) | inner)]

    def post(stacks: Values, values: Values) -> list[jax.Array]:
      env = dict(program.constants) | dict(zip(given, values, strict=True))
      env |= {v: _placed(x, e, program.aval(v)) for x, (v, e) in zip(stacks, sources.items(), strict=True)}
      env |= {v: jnp.full(program.aval(v).shape, x) for v, x in fills.items()}
      jax_forms.run(program, operations, env)
      return [jax_forms.value(a, env) for a in site.grads]

    stacks = [_stack(program.aval(v), e, count) for v, e in sources.items()]
    layered = layer_step(site.step, post, stacks, [types.struct(program.aval(v)) for v in given], count)
    inner_site = Site(site.leaves, (), tuple(() for _ in site.params), layered.step)
    released = Released(site, inner_site, given, early, layered, self.index)
    lengths = [grad.shape[e.axis] for grad, e in zip(site.step.grads, layered.gradients, strict=True)]
    covered = [e.covered(count) for e in layered.gradients]
    if len(covered) > 1 and any(c != set(range(n)) for c, n in zip(covered, lengths, strict=True)):
      raise NotSeparableError(
        "its leaves depend on each other, and some of their layers are not in this scan: scan all"
      )
    return Piece(scan, [*inside, *early], sources, released, covered[0], fill), lengths[0]

  def _position(self, operation: Operation) -> int:
    """Where an operation of a slice is in the program."""
    return self.program.makers[next(v for v in operation.outputs if v >= 0)]

  def _moves(self, inside: Sequence[int], inner: set[int]) -> set[int]:
    """What moves or broadcasts the other arrays that operations read: done to one layer of these, it stores nothing.

    `inner`: variables that are no such arrays.
    """
    program, found = self.program, set[int]()
    queue = dataflow.read_by([program.operations[i] for i in inside]) - inner
    while queue:
      made = program.makers.get(queue.pop())
      if made is not None and made not in found and layer_origins.is_move(program.operations[made]):
        found.add(made)
        queue |= dataflow.read_by([program.operations[made]])
    return found

  def _fills(self, before: set[int], sources: dict[int, Entries], count: int) -> tuple[dict[int, np.ndarray], set[int]]:
    """The scalars that other parts of a gradient have at these layers, such as the zeros around another piece.

    Parts that are joined to those with these layers may have any.

    Returns:
      The scalars, by variable, and the sums that have such parts.
    """
    program = self.program
    layered, operations = set(sources), []
    for operation in program.operations:
      if any(isinstance(a, int) and a in layered for a in operation.inputs) and before.isdisjoint(operation.outputs):
        layered.update(v for v in operation.outputs if v >= 0)
        operations.append(operation)
    needed = dataflow.slice_of(dataclasses.replace(program, operations=operations), self.site.grads, before)
    fills: dict[int, np.ndarray] = {}
    sums: set[int] = set()
    if not any(operation.name in (*layer_origins.SUMS, "concatenate") for operation in needed):
      return fills, sums
    read = dataflow.read_by(needed)
    scanned: dict[int, Where] = {v: e for v, e in sources.items() if v in read}
    where = by_layer.entries_of(needed, program, scanned, count)

    def has_fill(atom: Atom, entries: Entries) -> bool:
      if not isinstance(atom, int) or atom in layered or (made := program.makers.get(atom)) is None:
        return False
      value, operation = layer_origins.fill(program, atom, entries, count), program.operations[made]
      if value is not None:
        fills[atom] = value
      elif operation.name in layer_origins.SUMS and any([has_fill(a, entries) for a in operation.inputs]):
        sums.add(atom)
      return atom in fills or atom in sums

    for operation in needed:
      joined = where.get(operation.outputs[0])
      if joined is not None and layer_origins.joins(operation, joined):
        for atom, part in layer_origins.parts(program, operation, joined, count):
          if not isinstance(atom, int) or atom in layered or sum(atom in o.inputs for o in needed) != 1:
            continue
          if part is not None and not part.layers(count):
            fills[atom] = np.zeros((), program.aval(atom).dtype)
      entries = next((e for a in operation.inputs if isinstance(a, int) and (e := where.get(a))), None)
      for atom in operation.inputs:
        if entries is not None and program.aval(atom).shape == program.aval(operation.outputs[0]).shape:
          has_fill(atom, entries)
    return fills, sums


def _stack(aval: Shaped, entries: Entries, count: int) -> jax.ShapeDtypeStruct:
  """The type of some layers of an array, stacked along the first axis."""
  layer = types.struct(aval, entries.axis)
  return jax.ShapeDtypeStruct((count, *layer.shape), layer.dtype)


def _placed(stack: jax.Array, entries: Entries, aval: Shaped) -> jax.Array:
  """An array that has these layers where `entries` says, and zeros elsewhere."""
  axis, start, step = entries.axis, entries.start, entries.stride
  value = jnp.moveaxis(stack, 0, axis) if axis else stack
  end = aval.shape[axis] - start - step * (len(stack) - 1) - 1
  config = [(start, end, step - 1) if a == axis else (0, 0, 0) for a in range(value.ndim)]
  return value if value.shape == aval.shape else lax.pad(value, jnp.zeros((), value.dtype), config)


def _progressions(places: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
  """Splits places into runs that go on by equal steps, forward in each axis."""
  run: list[tuple[int, ...]] = []
  for place in places:
    step = [b - a for a, b in zip(run[-1], place, strict=True)] if run else []
    if run and (min(step) < 1 or (len(run) > 1 and step != [b - a for a, b in zip(*run[-2:], strict=True)])):
      yield run
      run = []
    run.append(place)
  yield run
