"""A plan: after which operation of a program each weight is updated, and which scans update stacks in their carry."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optax_mpo._program import by_layer
from optax_mpo._program.layer_rules import ELEMENTWISE, Entries, NotSeparableError
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._stepping.layered import Layered
from optax_mpo._stepping.site import Site

FOLLOWED = ELEMENTWISE | frozenset(
  "transpose reshape squeeze broadcast_in_dim optimization_barrier pad rev slice split concatenate".split()
)
"""Operations that a gradient is followed through, back to the scan that stacks it."""


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
  """A scanned operand that is made from one weight: the body makes it from its layer of the weight.

  Attributes:
    released: the released site whose stacks the scan carries, and that has the weight; None for a weight that the scan
      does not update.
    leaf: which of the site's weights.
    operations: those that make the operand from the weight.
    source: the variable of the weight.
    result: the variable of the operand.
    entries: where a layer lies in the weight.
    beside: other inputs of the program that the operations read, with their layers at the same entries.
  """

  released: int | None
  leaf: int
  operations: tuple[Operation, ...]
  source: int
  result: int
  entries: Entries
  beside: tuple[int, ...] = ()


@dataclasses.dataclass
class ScanPlan:
  """A scan that updates stacks in its carry, or reads weights where they lie."""

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


def final_bytes(program: Program, site: Site) -> int:
  """The bytes of the complete gradients of a site."""
  atoms = [a for a in site.grads if constant(program, a) is None]
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in map(program.aval, atoms))


def constant(program: Program, atom: Atom) -> Any:
  """The scalar that fills a gradient, such as the zeros of a leaf that nothing depends on; or None."""
  while isinstance(atom, int):
    made = program.makers.get(atom)
    if made is None or program.operations[made].name not in ("broadcast_in_dim", "convert_element_type"):
      return None
    atom = program.operations[made].inputs[0]
  return atom.val


def run_own(own: Own, program: Program, values: Sequence[Any], index: Any, count: int) -> Any:
  """Makes one entry of a scanned operand from one layer of a weight, and of what is beside it."""
  names, axis = (own.source, *own.beside), own.entries.axis
  layers = [jnp.expand_dims(x, axis) if own.entries.size == 1 else x for x in values]
  env: dict[int, Any] = dict(zip(names, layers, strict=True))
  where: dict[int, Entries | None] = dict.fromkeys(names, own.entries)
  by_layer.run(own.operations, program, env, where, index, count)
  if where[own.result] != Entries(0):
    raise NotSeparableError("the operand is not scanned along the layers")
  return env[own.result][0]
