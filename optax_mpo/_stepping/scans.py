"""Decides which stacks of layers are updated inside a scan, one layer at a time.

How: a gradient that a scan stacks is followed from the scan to its end. If everything on this path can be done for one
layer alone, and so can the update, then the layer is updated inside the scan. Several scans may each have some of the
layers: the gradients of such *pieces* are padded with zeros and added.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._program import dataflow, jax_forms, layer_origins
from optax_mpo._program.entries import Entries, NotSeparableError
from optax_mpo._program.program import Atom, Program
from optax_mpo._stepping.layered import type_of_layer
from optax_mpo._stepping.pieces import Finder, Piece
from optax_mpo._stepping.plan import FOLLOWED, Own, Plan, ScanPlan, Source, run_own
from optax_mpo._stepping.site import Place, Site, small_stacks


def gradient_size(program: Program, site: Site) -> int:
  """The elements of the gradients of a site."""
  return sum(math.prod(program.aval(a).shape) for a in site.grads)


class ScanPlacer:
  """Places sites in the scans of a program.

  Attributes:
    pieces: the pieces of the sites that are updated in scans.
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
    in_scan: bool = False,
  ):
    """Takes a program, its sites, its results, the operations that read each variable, and what plans a scan's body.

    `weights` are variables that scans read where they lie, besides the weights of the sites.
    """
    self.program, self.sites, self.results, self.users, self.make_plan = program, sites, results, users, make_plan
    self.pieces: list[Piece] = []
    self.scans: dict[int, ScanPlan] = {}
    self.skipped: set[int] = set()
    self._in_scan = in_scan
    self._carried = {v: k for k, site in enumerate(sites) for views in site.params for v in views}
    self._weights = dict.fromkeys(weights, 0) | {
      v: leaf for site in sites for leaf, views in enumerate(site.params) for v in views
    }

  def place(self) -> None:
    """Places what it can, and sets the place of each site that gets its gradient from a scan."""
    self.pieces = [piece for found in self._unread(self._pieces()).values() for piece in found]
    self.skipped = self._skipped()
    for i, operation in enumerate(self.program.operations):
      if operation.name == "scan" and i not in self.skipped:
        self._place_in_scan(i, [piece for piece in self.pieces if piece.scan == i])

  def _skipped(self) -> set[int]:
    """The operations on the paths of pieces, without those whose results are needed outside, too."""
    program, skipped = self.program, {i for piece in self.pieces for i in piece.path}
    kept = [operation for i, operation in enumerate(program.operations) if i not in skipped]
    released = {piece.released.index for piece in self.pieces}
    grads = [a for k, site in enumerate(self.sites) if k not in released for a in site.grads]
    needed = dataflow.read_by(kept, [*grads, *self.results]).union(*(p.reads(program) for p in self.pieces))
    made = {v for v, i in program.makers.items() if i not in skipped}
    again = dataflow.slice_of(program, needed, made)
    return skipped - {program.makers[v] for operation in again for v in operation.outputs if v >= 0}

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
    pieces: dict[int, list[Piece]] = {}
    for index in sorted(stacked):
      finder = Finder(self.program, self.sites[index], index)
      if found := finder.find(stacked[index]):
        pieces[index] = found
      else:
        self.sites[index].put(Place.AT_END, finder.why)
    return pieces

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

  def _unread(self, pieces: dict[int, list[Piece]]) -> dict[int, list[Piece]]:
    """Refuses sites whose stacked gradient anything else reads, since it still has to be stacked.

    Each refusal changes which operations are left outside, so this is repeated until nothing is refused.
    """
    while True:
      inside = {i for found in pieces.values() for p in found for i in p.path if i not in p.released.early}
      read = set().union(*(p.reads(self.program) for found in pieces.values() for p in found))
      bad = [
        index
        for index, found in pieces.items()
        if any(self._read_elsewhere(p, inside, read) for p in found if p.scan is not None)
      ]
      if not bad:
        return pieces
      for index in bad:
        why = "its stacked gradient is also used elsewhere: add up weights, or share them, in the body of the scan"
        self.sites[index].put(Place.AT_END, why)
        del pieces[index]

  def _read_elsewhere(self, piece: Piece, inside: set[int], read: set[int]) -> bool:
    operations, released = self.program.operations, piece.released
    here = set(piece.sources)
    here |= {v for i in piece.path if i not in released.early for v in operations[i].outputs if v >= 0}
    if here & (self.results | read):
      return True
    others = {a for k, site in enumerate(self.sites) if k != released.index for a in site.grads if isinstance(a, int)}
    return bool(here & others) or any(i not in inside for v in here for i in self.users.get(v, ()))

  def _place_in_scan(self, scan: int, pieces: list[Piece]) -> None:
    operation = self.program.operations[scan]
    consts, carry, _ = jax_forms.scan_counts(operation)
    count = jax_forms.scan_options(operation)["length"]
    released = [piece.released for piece in pieces]
    taken = {v for piece in pieces for v in piece.sources}
    stacked = operation.outputs[carry:]
    body = jax_forms.flatten_towards(
      jax_forms.scan_body(operation), [not pieces] * carry + [v in taken for v in stacked], FOLLOWED
    )
    scanned = body.inputs[consts + carry :]
    own = self._own(scan, consts + carry, pieces, count)
    found = {scanned[i]: source for i, o in own.items() if (source := o.layer_of(self.program)) is not None}
    for piece in pieces:
      piece.released.inner.grads = tuple(body.outputs[operation.outputs.index(v)] for v in piece.sources)
    for k, r in enumerate(released):  # the sites in the body have their weights there
      r.inner.params = tuple(
        tuple(v for v, source in found.items() if source[:2] == (k, leaf)) for leaf in range(len(r.site.leaves))
      )
      read = [scanned[i] for i, o in own.items() if any(s.released == k for s in o.sources.values())]
      read += [
        v
        for v, atom in zip(scanned, operation.inputs[consts + carry :], strict=True)
        if r.site.reads and layer_origins.origin(self.program, atom, count, set(r.site.reads))
      ]
      views = {v for leaf in r.inner.params for v in leaf}
      r.inner.reads = tuple(v for v in read if v not in views)
    kept = [j for j, v in enumerate(stacked) if v not in taken]
    results = [*body.outputs[:carry], *(body.outputs[carry + j] for j in kept)]
    weights = [v for v, source in found.items() if source.released is None]
    plan = self.make_plan(body, [r.inner for r in released], results, weights=weights, in_scan=True)
    if not released and not own:
      return
    layers = {scanned[i]: i for i in own if scanned[i] in found}
    self.scans[scan] = ScanPlan(operation, body, plan, released, own, layers, kept, count)
    for r in released:
      r.site.put(Place.IN_SCAN_BY_KERNEL if r.layered.backend.kernel else Place.IN_SCAN, r.layered.backend.no_kernel)

  def _own(self, scan: int, first: int, pieces: list[Piece], count: int) -> dict[int, Own]:
    """Finds the scanned operands that the body can read from weights: its own, or those that nothing here updates."""
    own, program = {}, self.program
    for position, atom in enumerate(program.operations[scan].inputs[first:]):
      found = layer_origins.origin(program, atom, count, self._weights.keys())
      if found is None or not isinstance(atom, int):
        continue
      sources = {v: self._source(scan, pieces, v, e, count) for v, e in found.sources.items()}
      entry = Own(sources, found.given, found.operations, atom)
      structs = {v: type_of_layer(program.aval(v), e) for v, e in found.sources.items()}
      structs |= {v: types.struct(program.aval(v)) for v in found.given}
      try:
        jax.eval_shape(
          lambda values, i, entry=entry: run_own(entry, program, values, i, count),
          structs,
          jax.ShapeDtypeStruct((), jnp.int32),
        )
      except NotSeparableError:
        continue
      own[position] = entry
    return own

  def _source(self, scan: int, pieces: list[Piece], var: int, entries: Entries, count: int) -> Source:
    """Where a scan finds its layers of a weight."""
    leaf = self._weights.get(var, -1)
    for k, piece in enumerate(pieces):
      if self._has(piece, var, entries, count):
        return Source(k, leaf, entries)
    site = self._carried.get(var)
    updated = [p for p in self.pieces if p.released.index == site and p.scan is not None and p.scan <= scan]
    return Source(None, leaf, entries, in_place=self._in_scan and not updated)

  def _has(self, piece: Piece, var: int, entries: Entries, count: int) -> bool:
    """Whether a scan that updates a piece has these layers of a weight in its carry, and not yet updated."""
    leaf, released = self._weights.get(var, -1), piece.released
    views = released.site.params[leaf] if 0 <= leaf < len(released.site.params) else ()
    if var not in views or released.layered.entries[leaf]._replace(without=entries.without) != entries:
      return False
    earlier = [p for p in self.pieces if p.scan is not None and piece.scan is not None and p.scan <= piece.scan]
    others = [p for p in earlier if p.released.index == released.index and p is not piece]
    return all(p.covered.isdisjoint(entries.covered(count)) for p in others)
