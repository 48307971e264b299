"""Programs as data: flat lists of operations on numbered variables, copied from jaxprs by `jax_forms`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
from jax.core import Tracer
from jax.extend import core

from optax_mpo._core.annotations import Shaped

Atom = int | core.Literal
"""The number of a variable of the program, or a literal."""

PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot ragged_dot_general".split())
MOVES = frozenset("transpose reshape squeeze expand_dims convert_element_type".split())
"""Primitives that only move or convert elements."""


def type_of(atom: core.Var | core.Literal) -> Shaped:
  """The shape and dtype of a variable or literal of a jaxpr; JAX declares a type that need not have them."""
  return cast(Shaped, atom.aval)


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
  """One operation of a program: a jaxpr equation, with its variables numbered.

  Attributes:
    eqn: the equation, for its primitive, its params and its line of code.
    inputs: an atom for each operand.
    outputs: a variable for each result; -1 for an unused one.
    caller: the equation of the outermost call it was inlined from, or None.
    bodies: the branches of a `cond`, as programs. If a slice has removed results, bodies, inputs and outputs differ
      from those of the equation.
  """

  eqn: core.JaxprEqn
  inputs: tuple[Atom, ...]
  outputs: tuple[int, ...]
  caller: core.JaxprEqn | None = None
  bodies: tuple["Program", ...] = ()

  @property
  def name(self) -> str:
    """The name of the primitive, such as `dot_general`."""
    return self.eqn.primitive.name


@dataclasses.dataclass
class Program:
  """A flat list of operations.

  Attributes:
    inputs: the input variables.
    outputs: the output atoms.
    operations: the operations, in an order in which they can run.
    constants: the values of variables that are known beforehand.
    avals: the shape and dtype of every variable.
    source: the jaxpr that it was copied from, with the custom derivatives of its calls.
  """

  inputs: list[int] = dataclasses.field(default_factory=list)
  outputs: list[Atom] = dataclasses.field(default_factory=list)
  operations: list[Operation] = dataclasses.field(default_factory=list)
  constants: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
  avals: list[Shaped] = dataclasses.field(default_factory=list)
  source: core.ClosedJaxpr | None = None

  def aval(self, atom: Atom) -> Shaped:
    """The shape and dtype of an atom."""
    return self.avals[atom] if isinstance(atom, int) else type_of(atom)

  def new(self, aval: Shaped) -> int:
    """Adds a variable, and returns its number."""
    self.avals.append(aval)
    return len(self.avals) - 1

  @functools.cached_property
  def makers(self) -> dict[int, int]:
    """The index of the operation that makes each variable."""
    return {v: i for i, operation in enumerate(self.operations) for v in operation.outputs if v >= 0}

  @property
  def traced(self) -> dict[int, jax.Array]:
    """The constants that are tracers, and so may be differentiated or mapped."""
    return {v: x for v, x in self.constants.items() if isinstance(x, Tracer)}

  def replaced(self, constants: dict[int, jax.Array]) -> "Program":
    """The same program with other values for some of its constants."""
    return dataclasses.replace(self, constants=self.constants | constants)


class Slice(NamedTuple):
  """The part of a program that updates one weight, or a stack of layers.

  Attributes:
    program: the program of the update.
    operations: those that make the new weight and states.
    inputs: the variables of the gradient, the weight and the states.
    shared: the variables of the other values that are handed in.
    constants: the values of variables that are known.
    outputs: the new weight, then the new states.
  """

  program: Program
  operations: Sequence[Operation]
  inputs: Sequence[int]
  shared: Sequence[int]
  constants: dict[int, jax.Array]
  outputs: Sequence[Atom]

  @property
  def weight(self) -> Shaped:
    """The shape and dtype of the weight."""
    return self.program.aval(self.inputs[1])
