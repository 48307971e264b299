"""A plan: after which operation of a program each weight is updated, and which scans update stacks in their carry."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_mpo._core import types
from optax_mpo._core.annotations import Index
from optax_mpo._program import by_layer
from optax_mpo._program.entries import Entries, NotSeparableError
from optax_mpo._program.layer_rules import ELEMENTWISE
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._stepping.layered import Layered, type_of_layer
from optax_mpo._stepping.site import Site

FOLLOWED = ELEMENTWISE | frozenset(
  "transpose reshape squeeze broadcast_in_dim optimization_barrier pad rev slice split concatenate".split()
)
"""Operations that a gradient is followed through, back to the scan that stacks it."""

_VIEWS = frozenset("reshape squeeze slice stop_gradient copy copy_p sharding_constraint optimization_barrier".split())
"""Operations that keep the elements of a layer and their order, if they keep their number."""


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
class Rest:
  """Layers of a site whose gradients no scan makes. They are updated one by one, once these are complete.

  Attributes:
    released: how they are updated.
    sources: the variables that their gradients are made from, and where a layer lies in each.
    fill: the scalar that fills the gradients of all these layers; None where there are sources.
  """

  released: Released
  sources: dict[int, Entries]
  fill: ArrayLike | None


class Source(NamedTuple):
  """A weight, or its scales, that a scan reads where it lies.

  Attributes:
    released: the released site whose stacks the scan carries, and that has the weight; None for a weight that the scan
      does not update.
    leaf: which of the site's weights; -1 for scales.
    entries: where a layer lies in the weight.
    in_place: whether the weight is itself a layer that is read from its stack, not from a copy.
  """

  released: int | None
  leaf: int
  entries: Entries
  in_place: bool = False


@dataclasses.dataclass
class Own:
  """A scanned operand that is made from weights: the body makes it from its layer of each.

  Attributes:
    sources: the weights, by variable.
    given: the variables of whole arrays that other layers come from.
    operations: those that make the operand from these.
    result: the variable of the operand.
  """

  sources: dict[int, Source]
  given: tuple[int, ...]
  operations: tuple[Operation, ...]
  result: int

  def layer_of(self, program: Program) -> Source | None:
    """The weight of which the operand is a layer, as it lies there, in each iteration."""
    (var, source), *others = self.sources.items()
    layer, operand = type_of_layer(program.aval(var), source.entries), types.struct(program.aval(self.result), 0)
    same = not others and source.leaf >= 0 and source.entries.without == (0, 0) and layer == operand
    return source if same and all(operation.name in _VIEWS for operation in self.operations) else None


@dataclasses.dataclass
class ScanPlan:
  """A scan that updates stacks in its carry, or reads weights where they lie."""

  operation: Operation
  body: Program
  plan: "Plan"
  released: list[Released]
  own: dict[int, Own]  # by the position of the scanned operand
  layers: dict[int, int]  # by variable of the body that is a layer of a weight, the position
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
    rests: the layers of released sites to update after an operation, because no scan makes their gradients.
    scans: the scans that run with stacks in their carry.
    skipped: the operations that are done inside such a scan, or before it.
    ties: the variables that make the rest of the program wait for the updates after an operation.
    last_use: the last operation that reads a variable.
    pairs: what XLA makes before it uses either, after an operation.
  """

  program: Program
  sites: list[Site]
  due: dict[int, list[int]] = dataclasses.field(default_factory=dict)
  rests: dict[int, list[Rest]] = dataclasses.field(default_factory=dict)
  scans: dict[int, ScanPlan] = dataclasses.field(default_factory=dict)
  skipped: set[int] = dataclasses.field(default_factory=set)
  ties: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  last_use: dict[int, int] = dataclasses.field(default_factory=dict)
  pairs: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

  def grads_due(self, i: int) -> list[Atom]:
    """What the updates after an operation read."""
    rests = self.rests.get(i, ())
    return [a for index in self.due.get(i, ()) for a in self.sites[index].grads] + [
      v for rest in rests for v in (*rest.sources, *rest.released.given)
    ]


def final_bytes(program: Program, site: Site) -> int:
  """The bytes of the complete gradients of a site."""
  atoms = [a for a in site.grads if constant(program, a) is None]
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in map(program.aval, atoms))


def constant(program: Program, atom: Atom) -> ArrayLike | None:
  """The scalar that fills a gradient, such as the zeros of a leaf that nothing depends on; or None."""
  while isinstance(atom, int):
    made = program.makers.get(atom)
    if made is None or program.operations[made].name not in ("broadcast_in_dim", "convert_element_type"):
      return None
    atom = program.operations[made].inputs[0]
  return atom.val


def run_own(own: Own, program: Program, values: dict[int, jax.Array], index: Index, count: int) -> jax.Array:
  """Makes one entry of a scanned operand from one layer of each weight, and from the values that are given."""
  env, where = dict(values), dict.fromkeys(values, None) | {v: s.entries for v, s in own.sources.items()}
  for v, source in own.sources.items():
    env[v] = jnp.expand_dims(values[v], source.entries.axis) if source.entries.size == 1 else values[v]
  by_layer.run(own.operations, program, env, where, index, count)
  if where[own.result] != Entries(0):
    raise NotSeparableError("the operand is not scanned along the layers")
  return env[own.result][0]
