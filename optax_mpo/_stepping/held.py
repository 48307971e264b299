"""How much of a weight's gradient is in memory at a time, and why, told from a plan.

Why: a gradient may take more memory than its own bytes. Parts of it are held until they are added up, and a stack that
two scans read is updated in one of them, but gets a gradient from both.

How: by the life of arrays. From where a gradient is read (by its update, or by the scan that updates its layers), it is
followed back to the operations that made it. What XLA stores on this way we found by compiling for a GPU and reading
the buffers (`tests/memory/test_explain_bytes.py`):

- Elementwise operations, padding and slices are fused with what reads them. So not their results are stored, but the
  arrays that they begin with, until the gradient is complete. Views, and casts of products, cost nothing.
- The complete gradient takes the place of an array of its size that is needed no more, if no loop made that.
- A loop adds a product to the gradient in its carry in place. A scatter into zeros writes to what it is added to.

Where XLA has a choice, this is the most that we saw: that of JAX 0.12 adds a second product to a first one in place,
that of JAX 0.10 stores both.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from optax_mpo._program import jax_forms
from optax_mpo._program.layer_rules import ELEMENTWISE
from optax_mpo._program.program import PRODUCTS, Atom, Operation, Program
from optax_mpo._stepping.plan import FOLLOWED, Plan, Released, constant, final_bytes
from optax_mpo._stepping.site import Place

_VIEWS = frozenset("transpose reshape squeeze expand_dims copy copy_p sharding_constraint optimization_barrier".split())
_FUSED = ELEMENTWISE | FOLLOWED | frozenset(["dynamic_slice", "expand_dims", "sharding_constraint"])
_IN_PLACE = frozenset(["scatter-add", "scatter_add", "scatter", "dynamic_update_slice"])
_LOOPS = ("scan", "while")


@dataclasses.dataclass
class _Array:
  """An array that is stored from one moment to another; an operation has two moments, at its work and after it."""

  bytes: int
  first: int
  last: int


@dataclasses.dataclass
class _Sources:
  """What an array is made of.

  Attributes:
    stored: the variables that XLA stores.
    is_view: whether the array is the stored one.
    is_elementwise: whether each of its elements is made from those at the same place.
    is_scattered: whether something is written into zeros.
  """

  stored: set[int] = dataclasses.field(default_factory=set)
  is_view: bool = True
  is_elementwise: bool = True
  is_scattered: bool = False


class _Memory:
  """The gradients of a site in one program, and how long each array of them is stored."""

  def __init__(self, program: Program):
    self.program = program
    self.arrays: dict[int, _Array] = {}
    self.inside: dict[int, int] = {}  # by loop: the bytes that its body holds besides

  def peak(self) -> int:
    """The most bytes that are stored at a time."""
    moments = {x.first for x in self.arrays.values()} | {2 * i for i in self.inside}
    return max((self._at(m) for m in moments), default=0)

  def _at(self, moment: int) -> int:
    stored = sum(x.bytes for x in self.arrays.values() if x.first <= moment <= x.last)
    return stored + (0 if moment % 2 else self.inside.get(moment // 2, 0))

  def sources(self, atom: Atom) -> _Sources:
    """Follows an array back to the stored arrays that XLA makes it from in one go."""
    found, queue, seen = _Sources(), [atom], set[int]()
    while queue:
      var = queue.pop()
      if not isinstance(var, int) or var in seen or (made := self._made(var)) is None or self._is_no_gradient(var):
        continue
      seen.add(var)
      operation = self.program.operations[made]
      name, inputs = operation.name, operation.inputs
      if name == "optimization_barrier":
        queue.append(inputs[operation.outputs.index(var)])
      elif name in _VIEWS:
        queue.append(inputs[0])
      elif name in _FUSED and not self._is_cast_product(operation):
        found.is_view = False
        found.is_elementwise &= name in ELEMENTWISE
        queue += [a for a in inputs if self.program.aval(a).shape]
      elif name in _IN_PLACE and constant(self.program, inputs[0]) is not None:
        found.is_view, found.is_scattered = False, True
        found.stored |= {v for a in inputs[1:] for v in stacks(self.program, a)}
      else:
        found.stored.add(var)
    return found

  def store(self, atom: Atom, until: int) -> None:
    """Stores a gradient from when it is complete until an operation reads it."""
    made = self._made(atom)
    found = self.sources(atom)
    if not isinstance(atom, int) or made is None or not (found.stored or found.is_scattered):
      return
    now = min(made, until)
    for var in found.stored:
      self.keep(var, until if found.is_view else now)
    if found.is_view:
      return
    size = self.size(atom)
    reused = found.is_elementwise and any(
      self.size(v) == size and self.arrays[v].last <= 2 * now and self.maker(v).name not in _LOOPS for v in found.stored
    )
    old = self.arrays.get(atom)
    self.arrays[atom] = _Array(size, 2 * now + reused, max(2 * until, old.last if old else -2))

  def add_inside(self, loop: int, size: int) -> None:
    self.inside[loop] = max(size, self.inside.get(loop, 0))

  def keep(self, var: int, until: int) -> None:
    """Keeps a stored array until an operation is done."""
    made = self.program.makers[var]
    old = self.arrays.get(var)
    self.arrays[var] = _Array(self.size(var), 2 * min(made, until), max(2 * until, old.last if old else -2))
    operation = self.program.operations[made]
    if operation.name == "scan":
      if old is None:
        self.add_inside(made, _inside_scan(operation, operation.outputs.index(var)))
    elif not self.is_product(var):
      for part in {v for a in operation.inputs for v in stacks(self.program, a)} - {var}:
        self.keep(part, made)

  def is_product(self, var: int) -> bool:
    """Whether a stored array is a product, or the cast of one."""
    operation = self.maker(var)
    return operation.name in PRODUCTS or self._is_cast_product(operation)

  def _is_cast_product(self, operation: Operation) -> bool:
    """Whether this casts a product or a sum, which then is stored as the result of the cast alone."""
    if operation.name != "convert_element_type":
      return False
    made = self._made(operation.inputs[0])
    while made is not None and self.program.operations[made].name in _VIEWS:
      made = self._made(self.program.operations[made].inputs[0])
    if made is None:
      return False
    name = self.program.operations[made].name
    return name in PRODUCTS or name.startswith("reduce_")

  def _is_no_gradient(self, var: int) -> bool:
    """Whether this is a mask, a count or a fill."""
    return not jnp.issubdtype(self.program.aval(var).dtype, jnp.inexact) or constant(self.program, var) is not None

  def _made(self, atom: Atom) -> int | None:
    return self.program.makers.get(atom) if isinstance(atom, int) else None

  def maker(self, atom: Atom) -> Operation:
    made = self._made(atom)
    assert made is not None
    return self.program.operations[made]

  def size(self, atom: Atom) -> int:
    aval = self.program.aval(atom)
    return math.prod(aval.shape) * aval.dtype.itemsize


def _inside_scan(operation: Operation, position: int) -> int:
  """The bytes that the body of a scan holds to make one of its results, besides the result itself."""
  body = jax_forms.flatten(jax_forms.scan_body(operation))
  root, end, memory = body.outputs[position], len(body.operations), _Memory(body)
  if position >= jax_forms.scan_counts(operation)[1]:
    memory.store(root, end)
    return memory.peak()
  found = memory.sources(root)
  if not isinstance(root, int) or found.is_view:
    return 0  # it is handed on as it is
  if found.is_elementwise and len(found.stored) == 1 and memory.is_product(*found.stored):
    return 0  # XLA adds the only product to the carry in place
  for var in found.stored:
    memory.keep(var, body.makers[root])
  return memory.peak()


def stacks(program: Program, atom: Atom) -> set[int]:
  """The stacked results of scans that an array is made of, by operations that only move or combine elements."""
  found, queue, seen = set(), [atom], set()
  while queue:
    var = queue.pop()
    made = program.makers.get(var) if isinstance(var, int) else None
    if made is None or var in seen:
      continue
    seen.add(var)
    operation = program.operations[made]
    if operation.name == "scan":
      if operation.outputs.index(var) >= jax_forms.scan_counts(operation)[1]:
        found.add(var)
    elif operation.name not in PRODUCTS and not _is_call(operation) and not operation.name.startswith("reduce"):
      queue += operation.inputs
  return found


def _is_call(operation: Operation) -> bool:
  """Whether an operation runs a program of its own, other than to combine two elements."""
  if operation.name.startswith(("scatter", "reduce", "select_and", "cum", "sort")):
    return False
  return next(jax_forms.bodies(operation), None) is not None


def gradient_bytes(plan: Plan, index: int) -> int:
  """The most bytes of gradient that are held for a site at a time."""
  return _memory(plan, index).peak()


def reason(plan: Plan, index: int, batch_parts: int = 0) -> str:
  """Why the gradient of a site is held whole, or more than that, and what to change.

  `batch_parts`: into how many parts a loop of the loss that reads the weight cuts the batch, as `batch_loops` says.
  """
  program, site, releases = plan.program, plan.sites[index], list(_releases(plan, index))
  if not releases:
    memory = _memory(plan, index)
    atoms = [] if site.place is Place.TOGETHER else [a for a in site.grads if constant(program, a) is None]
    found = (_summed(program, a, batch_parts) or _unfollowed(program, a) for a in atoms)
    first = "" if site.why else next(filter(None, found), "")
    known = bool(site.why or first)
    more = memory.peak() > final_bytes(program, site)
    parts = next(filter(None, (_parts(memory, a, known) for a in atoms)), "") if more else ""
    return "; ".join(filter(None, (first, parts)))
  memory = _memory(plan, index, with_rests=False)
  if not memory.arrays:
    return next(filter(None, (reason(inner, k) for _, inner, k, _ in releases)), "")
  first = jax_forms.where(memory.maker(min(memory.arrays)))
  return (
    f"the gradient that it gets elsewhere, from {first}, is held until then: use its layers in one scan only, or give "
    "each use layers of its own"
  )


def _parts(memory: _Memory, atom: Atom, known: bool) -> str:
  """Why parts of a gradient are held, and what to change if that is not `known`."""
  found = memory.sources(atom)
  if found.is_view or not found.stored:
    return ""
  while memory.maker(atom).name in _VIEWS:
    atom = memory.maker(atom).inputs[0]
  last, count = jax_forms.where(memory.maker(atom)), len(found.stored)
  if count > 1 and found.is_elementwise:
    why, advice = f"{count} gradients are held until {last} adds them", "use the weight once, on all inputs together"
  elif count > 1:
    why, advice = f"{count} parts are held until {last} joins them", "make each part a leaf, or scan the layers"
  else:
    first = jax_forms.where(memory.maker(min(found.stored)))
    why, advice = (
      f"the result of {first} is held until {last}",
      "do that in the body of the scan, or where the leaf is made",
    )
  return why if known else f"{why}: {advice}"


def _unfollowed(program: Program, atom: Atom) -> str:
  """Why a gradient is not updated in the scan that stacks what it is made from, and what to change; or nothing."""
  size = math.prod(program.aval(atom).shape)
  user: dict[int, Operation | None] = {atom: None} if isinstance(atom, int) else {}  # what reads a variable
  queue = list(user)
  while queue:
    var = queue.pop(0)
    made = program.makers.get(var)
    if made is None:
      continue
    operation = program.operations[made]
    if operation.name == "scan":
      stacked = operation.outputs.index(var) >= jax_forms.scan_counts(operation)[1]
      if stacked and 2 * math.prod(program.aval(var).shape) >= size and (reader := _not_followed(user, var)):
        return (
          f"{jax_forms.where(reader)} makes its gradient from what a scan stacks, and is not known to keep layers "
          "apart: do the same to one layer in the body of the scan, or to the leaf before training"
        )
    elif _is_call(operation):
      if any(_has_scan(body) for body in jax_forms.bodies(operation)):
        return (
          f"its gradient is made inside of {jax_forms.where(operation)}, where no layers are updated: move the scan "
          "out of it"
        )
    elif _keeps_axis(program, operation):
      for a in operation.inputs:
        if isinstance(a, int) and a not in user:
          user[a] = operation
          queue.append(a)
  return ""


def _not_followed(user: dict[int, Operation | None], var: int) -> Operation | None:
  """The first operation after a scan that planning does not follow."""
  operation = user[var]
  while operation is not None and operation.name in FOLLOWED:
    operation = next((user[v] for v in operation.outputs if v in user), None)
  return operation


def _keeps_axis(program: Program, operation: Operation) -> bool:
  """Whether an operation may keep the layers along the first axis apart."""
  if operation.name == "dot_general":
    _, (batch, _) = operation.eqn.params["dimension_numbers"]
    return 0 in batch
  if operation.name.startswith("reduce_"):
    return 0 not in operation.eqn.params.get("axes", (0,))
  return operation.name not in PRODUCTS


def _has_scan(program: Program) -> bool:
  return any(o.name == "scan" or any(_has_scan(body) for body in jax_forms.bodies(o)) for o in program.operations)


def _summed(program: Program, atom: Atom, batch_parts: int) -> str:
  """Says that a loop sums a gradient in its carry, and what to change; or nothing."""
  for var in _Memory(program).sources(atom).stored:
    operation = program.operations[program.makers[var]]
    carry = jax_forms.scan_counts(operation)[1] if operation.name == "scan" else len(operation.outputs)
    if operation.name in _LOOPS and operation.outputs.index(var) < carry:
      why = f"its gradient is summed in {jax_forms.where(operation)}, which takes the whole weight"
      if operation.name == "scan" and jax_forms.scan_options(operation)["length"] == batch_parts:
        return (
          f"{why} for each of {batch_parts} parts of the batch: take this loop out of the loss, so that it is that of "
          f"one part, and pass microbatches={batch_parts} to value_and_update (see Microbatches for sums and weights)"
        )
      return f"{why}: if an iteration needs only a part of it, scan over the parts"
  return ""


def _memory(plan: Plan, index: int, with_rests: bool = True) -> _Memory:
  memory, site, releases = _Memory(plan.program), plan.sites[index], list(_releases(plan, index))
  for scan, inner, k, r in releases:
    layer = gradient_bytes(inner, k)
    memory.add_inside(scan, layer)
    for v in r.given:
      if memory.size(v) >= layer:
        memory.store(v, scan)
  for due, rest in ((due, rest) for due, rests in plan.rests.items() for rest in rests):
    for v in rest.sources if with_rests and rest.released.index == index else ():
      for var in memory.sources(v).stored:
        memory.keep(var, due)
  if not releases:
    until = next((due for due, indices in plan.due.items() if index in indices), len(plan.program.operations))
    for atom in site.grads:
      if constant(plan.program, atom) is None:
        memory.store(atom, max(until, 0))
  return memory


def _releases(plan: Plan, index: int) -> Iterator[tuple[int, Plan, int, Released]]:
  """The scans that update layers of a site: each with the plan of its body, the site's index there, and its release."""
  for i, scan in plan.scans.items():
    for k, r in enumerate(scan.released):
      if r.index == index:
        yield i, scan.plan, k, r
