"""Decides which stacks of layers are updated inside a scan, one layer at a time.

How: a gradient that a scan stacks is followed from the scan to its end. If everything on this path can be done for one
layer alone, and so can the update, then the layer is updated inside the scan.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._program import by_layer, jax_forms
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._stepping.plan import FOLLOWED, Own, Plan, Released, ScanPlan, run_own
from optax_mpo._stepping.site import Place, Site, Values, layer_step, small_stacks


def gradient_size(program: Program, site: Site) -> int:
  """The elements of the gradients of a site."""
  return sum(math.prod(program.aval(a).shape) for a in site.grads)


class ScanPlacer:
  """Places sites in the scans of a program.

  Attributes:
    scans: the plan of each scan that updates stacks, by the position of its operation.
    skipped: the operations that are done inside such a scan.
  """

  def __init__(
    self,
    program: Program,
    sites: Sequence[Site],
    results: set[int],
    users: dict[int, list[int]],
    make_plan: Callable[..., Plan],
  ):
    """Takes a program, its sites, its results, the operations that read each variable, and what plans a scan's body."""
    self.program, self.sites, self.results, self.users, self.make_plan = program, sites, results, users, make_plan
    self.scans: dict[int, ScanPlan] = {}
    self.skipped: set[int] = set()

  def place(self) -> None:
    """Places what it can, and sets the place of each site that gets its gradient from a scan."""
    candidates: dict[int, list[tuple[int, list[int]]]] = {}
    for index, site in enumerate(self.sites):
      found = [self._scan_of(atom) for atom in site.grads]
      scans = {scan for scan, _ in found}
      if scans == {None} or not site.leaves:
        continue
      if len(scans) > 1 or None in scans:
        site.put(Place.AT_END, "its leaves depend on each other, and get their gradients in different places")
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
    length = jax_forms.scan_options(operation)["length"]
    ys = {v: j for j, v in enumerate(operation.outputs[carry:]) if v >= 0}
    accepted: list[tuple[int, list[int], Released, list[int]]] = []
    small = small_stacks([gradient_size(self.program, self.sites[index]) for index, _ in candidates], length)
    for k in small:
      self.sites[candidates[k][0]].put(Place.AFTER_SCAN, "small, so that it is updated whole")
    # A stacked gradient that anything else reads still has to be stacked. Each refusal changes which paths are left, so
    # this is repeated until nothing is refused.
    for index, path in (c for k, c in enumerate(candidates) if k not in small):
      site = self.sites[index]
      try:
        released, used = self._release(index, path, scan, ys, length)
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
    plan = self.make_plan(body, [r.inner for r in released], results)
    self.scans[scan] = ScanPlan(operation, body, plan, released, own, kept, length)
    self.skipped |= {i for _, path, _, _ in accepted for i in path}
    for r in released:
      r.site.put(Place.IN_SCAN_BY_KERNEL if r.layered.backend.kernel else Place.IN_SCAN, r.layered.backend.no_kernel)

  def _release(
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
