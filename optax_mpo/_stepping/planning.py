"""Decides where each weight is updated, in a program that makes gradients.

Why: a gradient takes memory from the operation that completes it to the update that reads it. A plan says after which
operation of the program each weight is updated, and which scans update stacks of layers in their carry.

How: a weight is *due* when its gradient is complete and the program has read the weight for the last time. An earlier
update would keep the old value in memory beside the new one. `scans` places stacks of layers. All of this is found in
the program, before it runs.
"""

from collections.abc import Iterable, Sequence, Set

import jax.numpy as jnp

from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Program
from optax_mpo._stepping import pairs, rows
from optax_mpo._stepping.pieces import Piece
from optax_mpo._stepping.plan import FOLLOWED, Plan, Rest, constant, final_bytes
from optax_mpo._stepping.scans import ScanPlacer, gradient_size
from optax_mpo._stepping.site import HELD, Place, Site

# Operations for which XLA makes no new array: a read of the result is a read of the operand.
_VIEWS = frozenset(
  """transpose reshape squeeze expand_dims convert_element_type sharding_constraint copy copy_p stop_gradient slice
  optimization_barrier""".split()
)


def make_plan(
  program: Program,
  sites: list[Site],
  results: Iterable[Atom | None],
  at_least: int = 0,
  weights: Sequence[int] = (),
  first: Atom | None = None,
  in_scan: bool = False,
) -> Plan:
  """Plans where the `sites` are updated in `program`, which has to compute `results` too.

  Updates outside scans wait until their gradients have `at_least` bytes together, or for the end of the program: XLA
  fuses nothing across the barrier of an update. `weights` are other variables that scans read where they lie.
  Nothing is updated before the atom `first` is made. `in_scan`: whether this is the body of a scan.
  """
  return _Planner(program, sites, results, first, in_scan).plan(at_least, weights)


class _Planner:
  def __init__(
    self, program: Program, sites: list[Site], results: Iterable[Atom | None], first: Atom | None, in_scan: bool
  ):
    self.program, self.sites, self.in_scan = program, sites, in_scan
    self.first = self._made(first)
    self.results = {a for a in results if isinstance(a, int)}
    self.users: dict[int, list[int]] = {}
    for i, operation in enumerate(program.operations):
      for atom in operation.inputs:
        if isinstance(atom, int):
          self.users.setdefault(atom, []).append(i)
    self.result = Plan(program, sites)

  def plan(self, at_least: int, weights: Sequence[int]) -> Plan:
    placer = ScanPlacer(self.program, self.sites, self.results, self.users, make_plan, weights, self.in_scan)
    placer.place()
    self.result.scans, self.result.skipped = placer.scans, placer.skipped
    program, result = self.program, self.result
    end = len(program.operations)
    for i, operation in enumerate(program.operations):
      if i not in result.skipped:
        for atom in operation.inputs:
          if isinstance(atom, int):
            result.last_use[atom] = i
    for i, scan in result.scans.items():
      scan.early = sorted({k for r in scan.released for k in r.early})
      read = [a for k in scan.early for a in self.program.operations[k].inputs if isinstance(a, int)]
      read += [v for r in scan.released for v in r.given]
      read += [v for own in scan.own.values() for v in own.given]
      read += [v for own in scan.own.values() for v, source in own.sources.items() if source.released is None]
      result.last_use.update((v, max(i, result.last_use.get(v, -1))) for v in read)
    result.last_use.update(dict.fromkeys(self.results, end))
    released = {piece.released.index for piece in placer.pieces}
    complete: list[tuple[int, int]] = []
    small = {k for k, site in enumerate(self.sites) if k not in released and self._can_wait(site)}
    for index, site in enumerate(self.sites):
      if index in released:
        continue
      rest, whole = rows.rest_of(program, site, index, self.in_scan)
      if rest is not None:
        result.rests.setdefault(self._due(site), []).append(rest)
        site.put(*self._place(site))
        continue
      together = index in small and len(small) > 1
      complete.append((end - 1 if together else self._due(site), index))
      if together and site.place in (Place.UNKNOWN, Place.AFTER_SCAN):
        site.put(Place.TOGETHER, "with other small leaves, by one kernel at the end")
      if site.place is Place.UNKNOWN:
        place, why = self._place(site)
        site.put(place, why or whole)
    for due, indices in self._gathered(sorted(complete), at_least):
      result.due.setdefault(due, []).extend(indices)
    for piece in (piece for piece in placer.pieces if piece.scan is None):
      rest = Rest(piece.released, {} if piece.fill is not None else piece.sources, piece.fill)
      result.rests.setdefault(self._due_rest(piece), []).append(rest)
    for due in {*result.due, *result.rests}:
      early = [
        a for rest in result.rests.get(due, ()) for k in rest.released.early for a in program.operations[k].inputs
      ]
      for atom in (*result.grads_due(due), *early):
        if isinstance(atom, int):
          result.last_use[atom] = max(due, result.last_use.get(atom, -1))
    self._place_ties()
    result.pairs = pairs.find(program, result.last_use, result.skipped)
    return result

  def _due_rest(self, piece: Piece) -> int:
    """After which operation layers outside of scans have their gradients, and nothing reads the old weights."""
    free = {
      (i, own.result)
      for i, scan in self.result.scans.items()
      for own in scan.own.values()
      for source in own.sources.values()
      if source.released is not None
      and scan.released[source.released].index == piece.released.index
      and source.entries.covered(scan.length).isdisjoint(piece.covered)
    }
    complete = [self._made(v) for v in piece.sources] if piece.fill is None else []
    read = [self._last_read(v, free) for views in piece.released.site.params for v in views]
    return max([self.first, *complete, *read])

  def _gathered(self, complete: Iterable[tuple[int, int]], at_least: int) -> Iterable[tuple[int, list[int]]]:
    """Groups sites, in the order in which they are complete, until their gradients have `at_least` bytes together."""
    waiting: list[int] = []
    size = 0
    for due, index in complete:
      waiting.append(index)
      size += final_bytes(self.program, self.sites[index])
      if size >= at_least:
        yield due, waiting
        waiting, size = [], 0
    if waiting:
      yield len(self.program.operations) - 1, waiting

  def _can_wait(self, site: Site) -> bool:
    """Whether a weight is better updated together with others, and its gradient is small enough to be kept for that."""
    if site.step.backend.together is None:
      return False
    return site.place is Place.AFTER_SCAN or gradient_size(self.program, site) <= HELD

  def _made(self, atom: Atom | None) -> int:
    return self.program.makers.get(atom, -1) if isinstance(atom, int) else -1

  def _due(self, site: Site) -> int:
    complete = max((self._made(a) for a in site.grads), default=-1)
    read = max((self._last_read(v) for views in (*site.params, site.reads) for v in views), default=-1)
    return max(complete, read, self.first)

  def _place(self, site: Site) -> tuple[Place, str]:
    """How a site outside scans is updated, and why."""
    program = self.program
    if all(constant(program, atom) == 0 for atom in site.grads):
      return Place.WITH_ZERO_GRADIENT, "the loss does not depend on it"
    return (Place.AT_ONCE_BY_KERNEL if site.step.backend.kernel else Place.AT_ONCE), ""

  def _last_read(self, var: int, free: Set[tuple[int, int]] = frozenset()) -> int:
    """The last operation that reads a variable, or a view of it, other than those operands of scans in `free`."""
    scans = self.result.scans.items()
    in_place = (i for i, scan in scans for own in scan.own.values() if var in own.sources and own.sources[var].in_place)
    last, queue, seen = max(in_place, default=-1), [var], {var}
    while queue:
      var = queue.pop()
      for i in self.users.get(var, ()):
        if i in self.result.skipped or (i, var) in free:
          continue
        last = max(last, i)
        operation = self.program.operations[i]
        if operation.name in _VIEWS:
          views = [o for a, o in zip(operation.inputs, operation.outputs, strict=False) if a == var and o >= 0]
          queue += [v for v in views if v not in seen]
          seen.update(views)
    return last

  def _place_ties(self) -> None:
    """Finds, for every operation after which something is updated, variables that the backward pass goes on with.

    They are the latest one, those of earlier updates that are still needed, and what the next gradient is made from, so
    that gradients and updates come one after another.
    """
    program, result = self.program, self.result
    until = dict.fromkeys(self.results, len(program.operations))
    updates = {due: result.grads_due(due) for due in sorted({*result.due, *result.rests})}
    for due, atoms in updates.items():
      until.update((a, max(due, until.get(a, -1))) for a in atoms if isinstance(a, int))
    for i in range(len(program.operations) - 1, -1, -1):
      operation = program.operations[i]
      needed = max((until.get(v, -1) for v in operation.outputs), default=-1)
      if i in result.scans:
        needed = max(needed, i)
      if needed < 0:
        continue
      for atom in operation.inputs:
        if isinstance(atom, int):
          until[atom] = max(needed, until.get(atom, -1))
    after = {due: self._makes_of(atoms) for due, atoms in updates.items()}
    live: list[int] = []
    before: list[int] = []
    for i, operation in enumerate(program.operations):
      live += [v for v in operation.outputs if v >= 0 and jnp.issubdtype(program.aval(v).dtype, jnp.inexact)]
      live = [v for v in live if result.last_use.get(v, -1) > i and until.get(v, -1) > i]
      if i in updates and live:
        before = [v for v in before if v in live and v != live[-1]] + [live[-1]]
        coming = next((after[d] for d in after if d > i), [])
        if not self._is_near(coming, i):
          coming = []  # other work comes first, and already waits
        result.ties[i] = tuple(dict.fromkeys([*before, *(v for v in coming if v in live)]))

  def _makes_of(self, grads: Iterable[Atom]) -> list[int]:
    """What gradients are made from, such as the operands of a product."""
    makers, found = self.program.makers, []
    queue = [a for a in grads if isinstance(a, int)]
    while queue:
      made = makers.get(queue.pop())
      if made is not None:
        operation = self.program.operations[made]
        (queue if operation.name in FOLLOWED else found).extend(a for a in operation.inputs if isinstance(a, int))
    return found

  def _is_near(self, atoms: list[int], now: int) -> bool:
    """Whether atoms exist after operation `now`, or only the operations of `FOLLOWED` are missing."""
    queue = list(atoms)
    while queue:
      made = self._made(queue.pop())
      if made > now:
        operation = self.program.operations[made]
        if not jax_forms.consists_of(operation.eqn, FOLLOWED):
          return False
        queue += [a for a in operation.inputs if isinstance(a, int)]
    return True
