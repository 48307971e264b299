"""Decides which stacks of layers are updated inside a scan, one layer at a time.

How: a gradient that a scan stacks is followed from the scan to its end. If everything on this path can be done for one
layer alone, and so can the update, then the layer is updated inside the scan. Several scans may each have some of the
layers: the gradients of such *pieces* are padded with zeros and added.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._program import by_layer, jax_forms, layer_origins
from optax_mpo._program.layer_rules import Entries, NotSeparableError
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._stepping.layered import layer_step, type_of_layer
from optax_mpo._stepping.plan import FOLLOWED, Own, Plan, Released, ScanPlan, run_own
from optax_mpo._stepping.site import Place, Site, Values, small_stacks

_FREE = frozenset(["reshape", "squeeze", "optimization_barrier"])  # a scan reads the result as it reads the operand

_SUMS = ("add", "add_any")


def gradient_size(program: Program, site: Site) -> int:
  """The elements of the gradients of a site."""
  return sum(math.prod(program.aval(a).shape) for a in site.grads)


@dataclasses.dataclass
class Piece:
  """The layers of a site whose gradients one scan makes.

  Attributes:
    scan: the operation of the scan.
    path: the operations after the scan that are done inside it, or before it.
    used: which of the stacked results become gradients.
    released: how the layers are updated.
    covered: the entries along the axis of the layers.
  """

  scan: int
  path: list[int]
  used: list[int]
  released: Released
  covered: set[int]


class ScanPlacer:
  """Places sites in the scans of a program.

  Attributes:
    scans: the plan of each scan that updates stacks or reads weights where they lie, by the position of its operation.
    skipped: the operations that are done inside such a scan.
  """

  def __init__(
    self,
    program: Program,
    sites: Sequence[Site],
    results: set[int],
    users: dict[int, list[int]],
    make_plan: Callable[..., Plan],
    weights: Sequence[int] = (),
  ):
    """Takes a program, its sites, its results, the operations that read each variable, and what plans a scan's body.

    `weights` are variables that scans read where they lie, besides the weights of the sites.
    """
    self.program, self.sites, self.results, self.users, self.make_plan = program, sites, results, users, make_plan
    self.scans: dict[int, ScanPlan] = {}
    self.skipped: set[int] = set()
    self._weights = dict.fromkeys(weights, 0) | {
      v: leaf for site in sites for leaf, views in enumerate(site.params) for v in views
    }

  def place(self) -> None:
    """Places what it can, and sets the place of each site that gets its gradient from a scan."""
    pieces = self._unread(self._pieces())
    for found in pieces.values():
      self.skipped |= {i for piece in found for i in piece.path}
    for i, operation in enumerate(self.program.operations):
      if operation.name == "scan" and i not in self.skipped:
        self._place_in_scan(i, [piece for found in pieces.values() for piece in found if piece.scan == i])

  def _pieces(self) -> dict[int, list[Piece]]:
    """The pieces of the sites whose layers can all be updated in scans."""
    candidates: dict[int, list[int]] = {}  # by the last scan
    stacked: dict[int, dict[int, set[int]]] = {}
    for index, site in enumerate(self.sites):
      found = [self._stacked(atom) for atom in site.grads]
      if not any(found) or not site.leaves:
        continue
      if len({max(f, default=None) for f in found}) > 1:
        site.put(
          Place.AT_END, "its leaves depend on each other, and get gradients from different scans: scan them together"
        )
        continue
      # Leaves that depend on each other are updated in one scan; a single one may be in pieces.
      last = max(found[0])
      stacked[index] = found[0] if len(found) == 1 else {last: {v for f in found for v in f[last]}}
      candidates.setdefault(last, []).append(index)
    for scan, indices in candidates.items():
      length = jax_forms.scan_options(self.program.operations[scan])["length"]
      for k in small_stacks([gradient_size(self.program, self.sites[index]) for index in indices], length):
        self.sites[indices[k]].put(Place.AFTER_SCAN, "small, so that it is updated whole")
        del stacked[indices[k]]
    pieces = {index: self._pieces_of(index, stacked[index]) for index in sorted(stacked)}
    return {index: found for index, found in pieces.items() if found}

  def _pieces_of(self, index: int, stacked: dict[int, set[int]]) -> list[Piece]:
    """The pieces of a site, last scan first; empty where they are not all of it.

    Layers may also be interleaved in one scan. Then each of the results that it stacks has some of them.
    """
    found, why = [], ""
    left: set[int] = set()

    def add(scan: int, chosen: set[int]) -> str:
      nonlocal left
      try:
        piece, length = self._piece(index, scan, chosen)
      except (NotSeparableError, TypeError) as error:
        return str(error)
      left = left if found else set(range(length))
      if found and piece.released.layered.across.totals != found[0].released.layered.across.totals:
        return "its scans make different sums over the layers"
      if not piece.covered <= left:
        return "some of its layers get gradients from several scans: scan each layer once"
      found.append(piece)
      left -= piece.covered
      return ""

    for scan in sorted(stacked, reverse=True):
      refused = add(scan, stacked[scan])
      if refused and len(stacked[scan]) > 1 and len(self.sites[index].grads) == 1:
        for v in sorted(stacked[scan]):
          refused = add(scan, {v}) or refused
      why = why or refused
      if found and not left:
        return found
    if found:
      why = (
        why or f"{len(left)} of its layers get no gradient from a scan: scan them too, or make them leaves of their own"
      )
    self.sites[index].put(Place.AT_END, why)
    return []

  def _stacked(self, atom: Atom) -> dict[int, set[int]]:
    """Follows a gradient back to the scans that stack it, and the results in which they do."""
    operations, makers = self.program.operations, self.program.makers
    found: dict[int, set[int]] = {}
    seen: set[int] = set()
    queue = [atom] if isinstance(atom, int) else []
    while queue:
      var = queue.pop()
      i = makers.get(var)
      if i is None or var in seen:
        continue
      seen.add(var)
      operation = operations[i]
      if operation.name == "scan":
        if list(operation.outputs).index(var) >= jax_forms.scan_counts(operation)[1]:
          found.setdefault(i, set()).add(var)
      elif operation.name in FOLLOWED:
        queue += [a for a in operation.inputs if isinstance(a, int)]
    return found

  def _piece(self, index: int, scan: int, chosen: set[int]) -> tuple[Piece, int]:
    """Makes the update of one layer from the results `chosen` of a scan. Returns the number of all layers, too.

    Raises:
      NotSeparableError: where a layer cannot be updated alone.
    """
    program, site = self.program, self.sites[index]
    operation = program.operations[scan]
    carry, count = jax_forms.scan_counts(operation)[1], jax_forms.scan_options(operation)["length"]
    ys = {v: j for j, v in enumerate(operation.outputs[carry:]) if v in chosen}
    outputs = {v for v in operation.outputs if v >= 0}
    before = {v for o in program.operations[: scan + 1] for v in o.outputs if v >= 0}
    fills, sums = self._fills(site.grads, before, set(ys), count)

    # Everything after the scan has to be done inside it. What does not depend on the scan can be done before it.
    inner, later = set(ys) | set(fills), outputs - set(ys)  # what the scan's body makes, and what it cannot have
    path, early, operations = [], [], []
    for operation in jax_forms.slice_of(program, site.grads, (before - sums) | set(fills)):
      position = program.makers[next(v for v in operation.outputs if v >= 0)]
      operation = program.operations[position]
      read = {a for a in operation.inputs if isinstance(a, int)}
      if read & later or operation.name == "scan":
        raise NotSeparableError(
          f"its gradient gets another part after the scan, {jax_forms.where(operation)}: use these layers in one scan "
          "only, or make those that are used elsewhere leaves of their own"
        )
      path.append(position)
      if read & inner:
        inner.update(operation.outputs)
        operations.append(operation)
      else:
        early.append(position)
    made = {v for operation in operations for v in operation.outputs}
    read = jax_forms.read_by(operations, site.grads)
    used = sorted(read & set(ys), key=lambda v: ys[v])
    given = tuple(sorted(read - made - set(used) - set(fills) - set(program.constants)))

    def post(stacks: Values, values: Values) -> list[Any]:
      env = dict(program.constants) | dict(zip(used, stacks, strict=True)) | dict(zip(given, values, strict=True))
      env |= {v: jnp.full(program.aval(v).shape, x) for v, x in fills.items()}
      jax_forms.run(program, operations, env)
      return [jax_forms.value(a, env) for a in site.grads]

    structs = [[types.struct(program.aval(v)) for v in part] for part in (used, given)]
    layered = layer_step(site.step, post, structs[0], structs[1], count)
    inner = Site(site.leaves, (), tuple(() for _ in site.params), layered.step)
    released = Released(site, inner, given, early, layered, index)
    lengths = [grad.shape[e.axis] for grad, e in zip(site.step.grads, layered.gradients, strict=True)]
    covered = [e.covered(count) for e in layered.gradients]
    if len(covered) > 1 and any(c != set(range(n)) for c, n in zip(covered, lengths, strict=True)):
      raise NotSeparableError(
        "its leaves depend on each other, and some of their layers are not in this scan: scan all"
      )
    return Piece(scan, path, [ys[v] for v in used], released, covered[0]), lengths[0]

  def _fills(
    self, grads: Sequence[Atom], before: set[int], ys: set[int], count: int
  ) -> tuple[dict[int, Any], set[int]]:
    """The scalars that other parts of a gradient have at these layers, such as the zeros around another piece.

    Returns:
      The scalars, by variable, and the sums that have such parts.
    """
    program = self.program
    layered, operations = set(ys), []
    for operation in program.operations:
      if any(isinstance(a, int) and a in layered for a in operation.inputs) and before.isdisjoint(operation.outputs):
        layered.update(v for v in operation.outputs if v >= 0)
        operations.append(operation)
    needed = jax_forms.slice_of(dataclasses.replace(program, operations=operations), grads, before)
    fills: dict[int, Any] = {}
    sums: set[int] = set()
    if not any(operation.name in _SUMS for operation in needed):
      return fills, sums
    read = jax_forms.read_by(needed)
    where = by_layer.entries_of(needed, program, {v: Entries(0) for v in ys & read}, count)

    def has_fill(atom: Atom, entries: Entries) -> bool:
      made = program.makers.get(atom) if isinstance(atom, int) and atom not in layered else None
      if made is None:
        return False
      value, operation = layer_origins.fill(program, atom, entries, count), program.operations[made]
      if value is not None:
        fills[atom] = value
      elif operation.name in _SUMS and any([has_fill(a, entries) for a in operation.inputs]):
        sums.add(atom)
      return atom in fills or atom in sums

    for operation in needed:
      entries = next((e for a in operation.inputs if isinstance(a, int) and (e := where.get(a))), None)
      for atom in operation.inputs:
        if entries is not None and program.aval(atom).shape == program.aval(operation.outputs[0]).shape:
          has_fill(atom, entries)
    return fills, sums

  def _unread(self, pieces: dict[int, list[Piece]]) -> dict[int, list[Piece]]:
    """Refuses sites whose stacked gradient anything else reads, since it still has to be stacked.

    Each refusal changes which operations are left outside, so this is repeated until nothing is refused.
    """
    while True:
      inside = {i for found in pieces.values() for p in found for i in p.path if i not in p.released.early}
      bad = [index for index, found in pieces.items() if any(self._read_elsewhere(p, inside) for p in found)]
      if not bad:
        return pieces
      for index in bad:
        why = "its stacked gradient is also used elsewhere: add up weights, or share them, in the body of the scan"
        self.sites[index].put(Place.AT_END, why)
        del pieces[index]

  def _read_elsewhere(self, piece: Piece, inside: set[int]) -> bool:
    operations, released = self.program.operations, piece.released
    operation = operations[piece.scan]
    ys = operation.outputs[jax_forms.scan_counts(operation)[1] :]
    here = {ys[j] for j in piece.used}
    here |= {v for i in piece.path if i not in released.early for v in operations[i].outputs if v >= 0}
    if here & self.results:
      return True
    others = {a for k, site in enumerate(self.sites) if k != released.index for a in site.grads if isinstance(a, int)}
    return bool(here & others) or any(i not in inside for v in here for i in self.users.get(v, ()))

  def _place_in_scan(self, scan: int, pieces: list[Piece]) -> None:
    operation = self.program.operations[scan]
    consts, carry, _ = jax_forms.scan_counts(operation)
    count = jax_forms.scan_options(operation)["length"]
    released = [piece.released for piece in pieces]
    own = self._own(operation, consts + carry, released, count)
    if not released and not own:
      return
    taken = {j for piece in pieces for j in piece.used}
    stacked = range(len(operation.outputs) - carry)
    body = jax_forms.flatten_towards(
      jax_forms.scan_body(operation), [False] * carry + [j in taken for j in stacked], FOLLOWED
    )
    for piece in pieces:
      piece.released.inner.grads = tuple(body.outputs[carry + j] for j in piece.used)
    for k, r in enumerate(released):  # the sites in the body have their weights there
      views = [
        [body.inputs[consts + carry + i] for i, o in own.items() if (o.released, o.leaf, o.beside) == (k, leaf, ())]
        for leaf in range(len(r.site.leaves))
      ]
      r.inner.params = tuple(map(tuple, views))
    kept = [j for j in stacked if j not in taken]
    results = [*body.outputs[:carry], *(body.outputs[carry + j] for j in kept)]
    plan = self.make_plan(body, [r.inner for r in released], results)
    self.scans[scan] = ScanPlan(operation, body, plan, released, own, kept, count)
    for r in released:
      r.site.put(Place.IN_SCAN_BY_KERNEL if r.layered.backend.kernel else Place.IN_SCAN, r.layered.backend.no_kernel)

  def _own(self, operation: Operation, first: int, released: list[Released], count: int) -> dict[int, Own]:
    """Finds the scanned operands that the body can read from weights: its own, or those that nothing here updates."""
    own = {}
    for position, atom in enumerate(operation.inputs[first:]):
      found = layer_origins.origin(self.program, atom, count, self._weights.keys())
      if found is None:
        continue
      numbers = [k for k, r in enumerate(released) if self._is_layer(r, found)]
      if not numbers and all(o.name in _FREE for o in found.operations):
        continue  # the scan reads it where it lies anyway
      leaf = self._weights[found.source]
      entry = Own(
        numbers[0] if numbers else None, leaf, found.operations, found.source, atom, found.entries, found.beside
      )
      structs = [type_of_layer(self.program.aval(v), found.entries) for v in (found.source, *found.beside)]
      try:
        jax.eval_shape(
          lambda xs, i, entry=entry: run_own(entry, self.program, xs, i, count),
          structs,
          jax.ShapeDtypeStruct((), jnp.int32),
        )
      except NotSeparableError:
        continue
      own[position] = entry
    return own

  def _is_layer(self, released: Released, found: layer_origins.Origin) -> bool:
    """Whether this is the layer that a scan updates."""
    leaf = self._weights[found.source]
    views = released.site.params[leaf] if leaf < len(released.site.params) else ()
    return found.source in views and released.layered.entries[leaf] == found.entries
