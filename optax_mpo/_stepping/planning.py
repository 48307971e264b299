"""Decides where each weight is updated, in a program that makes gradients.

Why: a gradient takes memory from the operation that completes it to the update that reads it. A plan says after which
operation of the program each weight is updated, and which scans update stacks of layers in their carry.

How: a weight is *due* when its gradient is complete and the program has read the weight for the last time. An earlier
update would keep the old value in memory beside the new one. A gradient that a scan stacks is followed from the scan to
its end. If everything on this path can be done for one layer alone, and so can the update, then the layer is updated
inside the scan. All of this is found in the program, before it runs.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._program import by_layer, jax_forms
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._stepping.site import HELD, Layered, Place, Site, Values, layer_step, small_stacks

# Operations that a gradient is followed through, back to the scan that stacks it.
FOLLOWED = by_layer.ELEMENTWISE | {"transpose", "reshape", "squeeze", "broadcast_in_dim", "optimization_barrier"}
# Operations for which XLA makes no new array: a read of the result is a read of the operand.
_VIEWS = frozenset(
  """transpose reshape squeeze expand_dims convert_element_type sharding_constraint copy copy_p stop_gradient slice
  optimization_barrier""".split()
)


@dataclasses.dataclass
class Released:
  """A site that is updated inside a scan.

  Attributes:
    site: the site, in the program that the scan is in.
    inner: the site, in the body of the scan.
    given: the variables of the outer program that the inner update reads, besides the shared values of the site.
    early: the operations after the scan that make some of these. They run before the scan.
    layered: how a layer is updated.
    index: the position of the site among those of the outer plan.
  """

  site: Site
  inner: Site
  given: tuple[int, ...]
  early: list[int]
  layered: Layered
  index: int


@dataclasses.dataclass
class Own:
  """A scanned operand that is made from one released weight alone: the body makes it from its layer of the weight."""

  released: int
  leaf: int
  operations: tuple[Operation, ...]
  source: int
  result: int
  axis: int


@dataclasses.dataclass
class ScanPlan:
  """A scan that updates stacks in its carry."""

  operation: Operation
  body: Program
  plan: "Plan"
  released: list[Released]
  own: dict[int, Own]  # by the position of the scanned operand
  kept: list[int]  # the positions of the stacked results that stay
  length: int
  early: list[int] = dataclasses.field(default_factory=list)  # operations to run before it


@dataclasses.dataclass
class Plan:
  """What to do after each operation of a program; -1 stands for before the first.

  Attributes:
    program: the program.
    sites: all sites.
    due: the sites to update after an operation.
    scans: the scans that run with stacks in their carry.
    skipped: the operations that are done inside such a scan, or before it.
    ties: the variables that make the rest of the program wait for the updates after an operation.
    last_use: the last operation that reads a variable.
  """

  program: Program
  sites: list[Site]
  due: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  scans: dict[int, ScanPlan] = dataclasses.field(default_factory=dict)
  skipped: set[int] = dataclasses.field(default_factory=set)
  ties: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  last_use: dict[int, int] = dataclasses.field(default_factory=dict)


def make_plan(program: Program, sites: list[Site], results: Iterable[Atom], at_least: int = 0) -> Plan:
  """Plans where the `sites` are updated in `program`, which has to compute `results` too.

  Updates outside scans wait until their gradients have `at_least` bytes together, or for the end of the program: XLA
  fuses nothing across the barrier of an update.
  """
  return _Planner(program, sites, results).plan(at_least)


def gradient_bytes(plan: Plan, index: int) -> int:
  """The bytes of gradient that a site holds at a time."""
  for scan in plan.scans.values():
    for k, r in enumerate(scan.released):
      if r.index == index:
        return gradient_bytes(scan.plan, k)
  site = plan.sites[index]
  atoms = [a for a in site.grads if constant(plan.program, a) is None]
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in map(plan.program.aval, atoms))


def constant(program: Program, atom: Atom) -> Any:
  """The scalar that fills a gradient, such as the zeros of a leaf that nothing depends on; or None."""
  while isinstance(atom, int):
    made = program.makers.get(atom)
    if made is None or program.operations[made].name not in ("broadcast_in_dim", "convert_element_type"):
      return None
    atom = program.operations[made].inputs[0]
  return atom.val


class _Planner:
  def __init__(self, program: Program, sites: list[Site], results: Iterable[Atom]):
    self.program, self.sites = program, sites
    self.results = {a for a in results if isinstance(a, int)}
    self.users: dict[int, list[int]] = {}
    for i, operation in enumerate(program.operations):
      for atom in operation.inputs:
        if isinstance(atom, int):
          self.users.setdefault(atom, []).append(i)
    self.result = Plan(program, sites)

  def plan(self, at_least: int) -> Plan:
    self._place_in_scans()
    end = len(self.program.operations)
    result = self.result
    for i, operation in enumerate(self.program.operations):
      if i not in result.skipped:
        for atom in operation.inputs:
          if isinstance(atom, int):
            result.last_use[atom] = i
    for i, scan in result.scans.items():
      scan.early = sorted({k for r in scan.released for k in r.early})
      read = [a for k in scan.early for a in self.program.operations[k].inputs if isinstance(a, int)]
      read += [v for r in scan.released for v in r.given]
      result.last_use.update((v, max(i, result.last_use.get(v, -1))) for v in read)
    result.last_use.update(dict.fromkeys(self.results, end))
    released = {r.index for scan in result.scans.values() for r in scan.released}
    complete: list[tuple[int, int]] = []
    small = {k for k, site in enumerate(self.sites) if k not in released and self._can_wait(site)}
    for index, site in enumerate(self.sites):
      if index in released:
        continue
      together = index in small and len(small) > 1
      complete.append((end - 1 if together else self._due(site), index))
      if together and site.place in (Place.UNKNOWN, Place.AFTER_SCAN):
        site.put(Place.TOGETHER, "with other small leaves, by one kernel at the end")
      if site.place is Place.UNKNOWN:
        site.put(*self._place(site))
    for due, indices in self._gathered(sorted(complete), at_least):
      result.due.setdefault(due, []).extend(indices)
      for atom in (a for index in indices for a in self.sites[index].grads):
        if isinstance(atom, int):
          result.last_use[atom] = max(due, result.last_use.get(atom, -1))
    self._place_ties()
    return result

  def _gathered(self, complete: Iterable[tuple[int, int]], at_least: int) -> Iterable[tuple[int, list[int]]]:
    """Groups sites, in the order in which they are complete, until their gradients have `at_least` bytes together."""
    waiting: list[int] = []
    size = 0
    for due, index in complete:
      waiting.append(index)
      size += gradient_bytes(self.result, index)
      if size >= at_least:
        yield due, waiting
        waiting, size = [], 0
    if waiting:
      yield len(self.program.operations) - 1, waiting

  def _can_wait(self, site: Site) -> bool:
    """Whether a weight is better updated together with others, and its gradient is small enough to be kept for that."""
    if site.step.backend.together is None:
      return False
    return site.place is Place.AFTER_SCAN or self._gradient_size(site) <= HELD

  def _gradient_size(self, site: Site) -> int:
    return sum(math.prod(self.program.aval(a).shape) for a in site.grads)

  def _made(self, atom: Atom) -> int:
    return self.program.makers.get(atom, -1) if isinstance(atom, int) else -1

  def _due(self, site: Site) -> int:
    complete = max((self._made(a) for a in site.grads), default=-1)
    read = max((self._last_read(v) for views in site.params for v in views), default=-1)
    return max(complete, read)

  def _place(self, site: Site) -> tuple[Place, str]:
    """How a site outside scans is updated, and why."""
    program = self.program
    if all(constant(program, atom) == 0 for atom in site.grads):
      return Place.WITH_ZERO_GRADIENT, "the loss does not depend on it"
    summed = [
      i for atom in site.grads if (i := self._made(atom)) >= 0 and program.operations[i].name in ("scan", "while")
    ]
    if summed:
      return Place.AT_ONCE, f"its gradient is summed in a {program.operations[summed[0]].name}"
    return (Place.AT_ONCE_BY_KERNEL if site.step.backend.kernel else Place.AT_ONCE), ""

  def _last_read(self, var: int) -> int:
    """The last operation that reads a variable, or a view of it."""
    last, queue, seen = -1, [var], {var}
    while queue:
      var = queue.pop()
      for i in self.users.get(var, ()):
        if i in self.result.skipped:
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
    for due, indices in result.due.items():
      for index in indices:
        for atom in self.sites[index].grads:
          if isinstance(atom, int):
            until[atom] = max(due, until.get(atom, -1))
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
    after = {due: [v for k in indices for v in self._makes_of(k)] for due, indices in result.due.items()}
    live: list[int] = []
    before: list[int] = []
    for i, operation in enumerate(program.operations):
      live += [v for v in operation.outputs if v >= 0 and jnp.issubdtype(program.aval(v).dtype, jnp.inexact)]
      live = [v for v in live if result.last_use.get(v, -1) > i and until.get(v, -1) > i]
      if i in result.due and live:
        before = [v for v in before if v in live and v != live[-1]] + [live[-1]]
        coming = next((after[d] for d in sorted(after) if d > i), [])
        if not self._is_near(coming, i):
          coming = []  # other work comes first, and already waits
        result.ties[i] = tuple(dict.fromkeys([*before, *(v for v in coming if v in live)]))

  def _makes_of(self, index: int) -> list[int]:
    """What the gradients of a site are made from, such as the operands of a product."""
    makers, found = self.program.makers, []
    queue = [a for a in self.sites[index].grads if isinstance(a, int)]
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

  # --- Scans ----------------------------------------------------------------------------------------------------------

  def _place_in_scans(self) -> None:
    candidates: dict[int, list[tuple[int, list[int]]]] = {}
    for index, site in enumerate(self.sites):
      found = [self._scan_of(atom) for atom in site.grads]
      scans = {scan for scan, _ in found}
      if scans == {None} or not site.leaves:
        continue
      if len(scans) > 1 or None in scans:
        site.put(Place.AT_END, "its leaves are coupled and get their gradients in different places")
        continue
      scan = scans.pop()
      assert scan is not None
      candidates.setdefault(scan, []).append((index, sorted({i for _, path in found for i in path})))
    for scan, found in candidates.items():
      self._place_in_scan(scan, found)

  def _scan_of(self, atom: Atom) -> tuple[int | None, list[int]]:
    """Follows a gradient back to the last scan that stacks it. Returns the scan and the operations after it."""
    operations, makers = self.program.operations, self.program.makers
    scan, seen = None, set()
    queue = [atom] if isinstance(atom, int) else []
    while queue:
      var = queue.pop()
      i = makers.get(var)
      if i is None or i in seen:
        continue
      operation = operations[i]
      if operation.name == "scan":
        if list(operation.outputs).index(var) >= jax_forms.scan_counts(operation)[1]:
          scan = i if scan is None else max(scan, i)
      elif operation.name in FOLLOWED:
        seen.add(i)
        queue += [a for a in operation.inputs if isinstance(a, int)]
    if scan is None:
      return None, []
    # Everything after the scan has to be done inside it. What does not depend on the scan can be done before it.
    path = jax_forms.slice_of(self.program, [atom], {v for i in range(scan + 1) for v in operations[i].outputs})
    position = {v: i for i in range(scan + 1, len(operations)) for v in operations[i].outputs if v >= 0}
    return scan, sorted({position[v] for operation in path for v in operation.outputs if v >= 0})

  def _place_in_scan(self, scan: int, candidates: list[tuple[int, list[int]]]) -> None:
    operation = self.program.operations[scan]
    consts, carry, _ = jax_forms.scan_counts(operation)
    length = operation.eqn.params["length"]
    ys = {v: j for j, v in enumerate(operation.outputs[carry:]) if v >= 0}
    accepted: list[tuple[int, list[int], Released, list[int]]] = []
    small = small_stacks([self._gradient_size(self.sites[index]) for index, _ in candidates], length)
    for k in small:
      self.sites[candidates[k][0]].put(Place.AFTER_SCAN, "small, so that it is stepped whole")
    # A stacked gradient that anything else reads still has to be stacked. Each refusal changes which paths are left, so
    # this is repeated until nothing is refused.
    for index, path in (c for k, c in enumerate(candidates) if k not in small):
      site = self.sites[index]
      try:
        released, used = self._released(index, path, scan, ys, length)
      except (by_layer.NotSeparableError, TypeError) as error:
        site.put(Place.AT_END, str(error))
        continue
      accepted.append((index, path, released, used))
    while True:
      inside = {i for _, path, _, _ in accepted for i in path}
      bad = [a for a in accepted if self._read_elsewhere(a, operation.outputs[carry:], inside)]
      if not bad:
        break
      for index, *_ in bad:
        self.sites[index].put(Place.AT_END, "its stacked gradient is also used elsewhere")
      accepted = [a for a in accepted if a not in bad]
    if not accepted:
      return

    body = jax_forms.flatten_towards(
      jax_forms.scan_body(operation),
      [False] * carry + [any(j in used for _, _, _, used in accepted) for j in range(len(operation.outputs) - carry)],
      FOLLOWED,
    )
    released = [r for _, _, r, _ in accepted]
    for _, _, r, used in accepted:
      r.inner.grads = tuple(body.outputs[carry + j] for j in used)
    own = self._own(operation, consts + carry, released, body, length)
    taken = {j for _, _, _, used in accepted for j in used}
    kept = [j for j in range(len(operation.outputs) - carry) if j not in taken]
    results = [*body.outputs[:carry], *(body.outputs[carry + j] for j in kept)]
    plan = make_plan(body, [r.inner for r in released], results)
    self.result.scans[scan] = ScanPlan(operation, body, plan, released, own, kept, length)
    self.result.skipped |= {i for _, path, _, _ in accepted for i in path}
    for r in released:
      r.site.put(Place.IN_SCAN_BY_KERNEL if r.layered.backend.kernel else Place.IN_SCAN, r.layered.backend.no_kernel)

  def _released(
    self, index: int, path: list[int], scan: int, ys: dict[int, int], length: int
  ) -> tuple[Released, list[int]]:
    """Makes the update of one layer, or raises NotSeparableError."""
    program, site = self.program, self.sites[index]
    outputs = set(program.operations[scan].outputs)
    layered, later = set(ys), outputs - set(ys)  # what depends on the stacked results, and on the others
    early, operations = [], []
    for i in path:
      operation = program.operations[i]
      read = {a for a in operation.inputs if isinstance(a, int)}
      if read & later or operation.name == "scan":
        raise by_layer.NotSeparableError(f"its gradient gets another part after the scan, {jax_forms.where(operation)}")
      if read & layered:
        layered.update(operation.outputs)
        operations.append(operation)
      else:
        early.append(i)
    made = {v for operation in operations for v in operation.outputs}
    read = jax_forms.read_by(operations, site.grads)
    used = sorted(read & set(ys), key=lambda v: ys[v])
    given = tuple(sorted(read - made - set(used) - set(program.constants)))

    def post(stacks: Values, values: Values) -> list[Any]:
      env = dict(program.constants) | dict(zip(used, stacks, strict=True)) | dict(zip(given, values, strict=True))
      jax_forms.run(program, operations, env)
      return [jax_forms.value(a, env) for a in site.grads]

    structs = [[types.struct(program.aval(v)) for v in part] for part in (used, given)]
    layered = (site.step.layered or layer_step)(site.step, post, structs[0], structs[1], length)
    inner = Site(site.leaves, (), tuple(() for _ in site.params), layered.step)
    return Released(site, inner, given, early, layered, index), [ys[v] for v in used]

  def _read_elsewhere(self, candidate: Any, outputs: Sequence[int], inside: set[int]) -> bool:
    index, path, released, used = candidate
    here = {outputs[j] for j in used}
    here |= {v for i in path if i not in released.early for v in self.program.operations[i].outputs if v >= 0}
    if here & self.results:
      return True
    others = {a for k, site in enumerate(self.sites) if k != index for a in site.grads if isinstance(a, int)}
    return bool(here & others) or any(i not in inside for v in here for i in self.users.get(v, ()))

  def _own(
    self, operation: Operation, first: int, released: list[Released], body: Program, length: int
  ) -> dict[int, Own]:
    """Finds the scanned operands that are layers of released weights, and tells the sites in the body about them."""
    sources = {v: (n, leaf) for n, r in enumerate(released) for leaf, views in enumerate(r.site.params) for v in views}
    own = {}
    inner_params: list[list[list[int]]] = [[[] for _ in r.site.leaves] for r in released]
    for position, atom in enumerate(operation.inputs[first:]):
      chain, var = [], atom
      while isinstance(var, int) and var not in sources:
        maker = self.program.makers.get(var)
        if maker is None:
          break
        step = self.program.operations[maker]
        if step.name not in FOLLOWED or len(step.inputs) != 1:
          break
        chain.append(step)
        var = step.inputs[0]
      if not isinstance(var, int) or var not in sources:
        continue
      number, leaf = sources[var]
      entry = Own(number, leaf, tuple(chain[::-1]), var, atom, released[number].layered.param_axes[leaf])
      try:
        jax.eval_shape(
          lambda x, i, entry=entry: run_own(entry, self.program, x, i, length),
          types.struct(self.program.aval(var), entry.axis),
          jax.ShapeDtypeStruct((), jnp.int32),
        )
      except by_layer.NotSeparableError:
        continue
      own[position] = entry
      inner_params[number][leaf].append(body.inputs[first + position])
    for r, params in zip(released, inner_params, strict=True):
      r.inner.params = tuple(tuple(views) for views in params)
    return own


def run_own(own: Own, program: Program, value: Any, index: Any, length: int) -> Any:
  """Makes one entry of a scanned operand from one layer of a weight."""
  env: dict[int, Any] = {own.source: jnp.expand_dims(value, own.axis)}
  axes: dict[int, int | None] = {own.source: own.axis}
  by_layer.run(own.operations, program, env, axes, index, length)
  if axes[own.result] != 0:
    raise by_layer.NotSeparableError("the layer axis is not the one that is scanned")
  return env[own.result][0]
