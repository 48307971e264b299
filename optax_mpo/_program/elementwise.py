"""Describes an update by what it computes for one element, for a kernel that updates a weight in one pass.

Why: XLA:GPU makes one kernel of an elementwise update, except where it writes the results into stacks of layers, or
where blocks of state get a scale from their largest element. There it reads and writes everything twice.

How: follow the operations of an update from its inputs. Each value is per *element* of the weight, per *block* of
elements along the last axis, or a *scalar* for the whole weight. Reshapes that keep the kind do nothing. The result is
a list of nodes without shapes. Anything else is refused by name.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from optax_mpo._core import types
from optax_mpo._core.annotations import Shaped
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.elements import OPERATIONS, Elements, Kind, NotElementwiseError, Source
from optax_mpo._program.program import Atom, Operation, Program
from optax_mpo._program.simplified import Nodes

_NOTHING = frozenset("copy copy_p held laid_out optimization_barrier stop_gradient squeeze reshape expand_dims".split())


def take_apart(
  program: Program,
  operations: Sequence[Operation],
  inputs: Sequence[int],
  given: Sequence[int],
  outputs: Sequence[Atom],
  shape: tuple[int, ...],
) -> Elements:
  """Takes the update of one weight apart.

  Args:
    program: the program of the operations.
    operations: the update.
    inputs: the variables of the gradient, the weight and its states.
    given: the other variables that are known.
    outputs: the new weight and states.
    shape: the shape of the weight.

  Raises:
    NotElementwiseError: if it is not a function of single elements and blocks.
  """
  return _Builder(program, shape, inputs).build(operations, inputs, given, outputs)


class _Builder:
  """Turns operations into nodes."""

  def __init__(self, program: Program, shape: tuple[int, ...], inputs: Sequence[int]):
    self.program, self.shape, self.size = program, shape, math.prod(shape)
    if not shape or self.size == 0:
      raise NotElementwiseError("it is a scalar, or empty")
    self.length = shape[-1]
    counts = {program.aval(v).shape[-1] for v in inputs if self._is_by_block(program.aval(v).shape)}
    if len(counts) > 1 or any(self.length % count for count in counts):
      raise NotElementwiseError("its state has blocks of several sizes, or ones that are not full")
    self.block = self.length // counts.pop() if counts else 0
    self.nodes = Nodes()
    self.env: dict[int, int] = {}  # variable -> node

  def _is_by_block(self, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(self.shape) and shape[:-1] == self.shape[:-1] and shape != self.shape

  def kind(self, shape: tuple[int, ...]) -> tuple[Kind, bool] | None:
    """The kind of an array of this shape, and whether it holds one row only; None for any other shape."""
    size = math.prod(shape)
    if size == 1 and self.size > 1 and shape != self.shape:
      return "scalar", False
    if size == self.size:
      return "element", False
    if self.block and size * self.block == self.size:
      return "block", False
    if size == self.length:
      return "element", True
    if self.block and size * self.block == self.length:
      return "block", True
    return None

  def build(
    self,
    operations: Sequence[Operation],
    inputs: Sequence[int],
    given: Sequence[int],
    outputs: Sequence[Atom],
  ) -> Elements:
    if (scan := next((o for o in operations if o.name == "scan"), None)) is not None:
      raise NotElementwiseError(f"{jax_forms.where(scan)} is not known to the kernel")
    read = dataflow.read_by(operations, outputs)
    hoisted: list[Operation] = []
    sources: list[Source] = []
    for var in inputs:
      if self.program.aval(var).shape != self.shape and not self._is_by_block(self.program.aval(var).shape):
        raise NotElementwiseError(_other_shape(self.program.aval(var)))
      self._add_source(sources, var)
    known = {v for v in given if v in read}  # before the kernel runs
    for operation in operations:
      reads = {a for a in operation.inputs if isinstance(a, int)}
      if operation.name == "iota":
        self._add_counted(sources, operation)
        hoisted.append(operation)
        continue
      if (
        not self._is_inside(operation)
        and reads <= known
        and all(self._is_small(v) for v in operation.outputs if v >= 0)
      ):
        hoisted.append(operation)
        known |= {v for v in operation.outputs if v >= 0}
        continue
      for var in sorted(reads & known - set(self.env)):
        self._add_source(sources, var)
      self._operation(operation)
    results = [self._atom(a) for a in outputs]
    found = Elements(tuple(self.nodes.listed), tuple(results), tuple(sources), self.block, self.length, tuple(hoisted))
    return self._without_unused(found, len(inputs))

  def _without_unused(self, elements: Elements, inputs: int) -> Elements:
    """Drops the nodes that nothing needs and renumbers the others; sources that are inputs stay in any case."""
    needed = set(elements.outputs)
    for i in range(len(elements.nodes) - 1, -1, -1):
      if i in needed:
        needed.update(elements.nodes[i].args)
    if needed & self.nodes.joined:
      # The XLA of JAX 0.10 joins them even so, that of JAX 0.12 does not.
      raise NotElementwiseError("XLA would join a product or quotient that is used twice with others, or would not")
    number: dict[int, int] = {}
    sources, nodes = list(elements.sources[:inputs]), []
    for i, node in enumerate(elements.nodes):
      if i not in needed:
        continue
      if node.name == "input" and node.params >= inputs:
        sources.append(elements.sources[node.params])
        node = dataclasses.replace(node, params=len(sources) - 1)
      number[i] = len(nodes)
      nodes.append(dataclasses.replace(node, args=tuple(number[a] for a in node.args)))
    outputs = tuple(number[i] for i in elements.outputs)
    return dataclasses.replace(elements, nodes=tuple(nodes), outputs=outputs, sources=tuple(sources))

  def _is_inside(self, operation: Operation) -> bool:
    """Whether the kernel runs an operation that could run before it, where XLA would need a launch for it."""
    if operation.name == "broadcast_in_dim":
      return math.prod(self.program.aval(operation.inputs[0]).shape) == 1
    whole = all(jnp.issubdtype(self.program.aval(v).dtype, jnp.integer) for v in operation.outputs if v >= 0)
    return whole and operation.name in OPERATIONS

  def _add_counted(self, sources: list[Source], operation: Operation) -> None:
    """Adds the indices of the elements of a row, or of its blocks, as a source."""
    (var,) = operation.outputs
    shape, dimension = self.program.aval(var).shape, operation.eqn.params["dimension"]
    kind = self.kind(shape)
    if kind is None or shape[dimension] != math.prod(shape) or kind[0] == "scalar" or not self._is_small(var):
      raise NotElementwiseError(f"{jax_forms.where(operation)} counts something else than columns")
    sources.append(Source(var, kind[0], True, True))
    self.env[var] = self.nodes.make("input", (), self.program.aval(var).dtype, len(sources) - 1, kind[0])

  def _is_small(self, var: int) -> bool:
    """Whether a variable is a scalar, or has values for one row only."""
    shape = self.program.aval(var).shape
    return self.kind(shape) is not None and math.prod(shape) <= self.length

  def _add_source(self, sources: list[Source], var: int) -> None:
    aval = self.program.aval(var)
    kind = self.kind(aval.shape)
    if kind is None:
      raise NotElementwiseError(_other_shape(aval))
    sources.append(Source(var, *kind))
    self.env[var] = self.nodes.make("input", (), aval.dtype, len(sources) - 1, kind[0])

  def _atom(self, atom: Atom) -> int:
    if isinstance(atom, int):
      if atom not in self.env:
        raise NotElementwiseError("a result is a scalar")
      return self.env[atom]
    if np.ndim(atom.val):
      raise NotElementwiseError("a constant array is a part of it")
    return self.nodes.literal(atom.val, self.program.aval(atom).dtype)

  def _operation(self, operation: Operation) -> None:
    name, eqn = operation.name, operation.eqn
    args = [self._atom(a) for a in operation.inputs]
    avals = [self.program.aval(a) for a in operation.inputs]
    if name in _NOTHING:
      results = args[: len(operation.outputs)]
    elif name == "broadcast_in_dim":
      self._check_broadcast(operation, avals[0].shape, eqn.params["shape"], eqn.params["broadcast_dimensions"])
      results = args
    elif name == "reduce_max":
      if not self.block or avals[0].shape[-1] != self.block or eqn.params["axes"] != (len(avals[0].shape) - 1,):
        raise NotElementwiseError(f"{jax_forms.where(operation)} is no maximum of a block")
      results = [self.nodes.make("reduce_max", tuple(args), avals[0].dtype, None, "block")]
    else:
      results = [self._elementwise(operation, args)]
    for var, node in zip(operation.outputs, results, strict=True):
      if var >= 0:
        if self.kind(self.program.aval(var).shape) is None:
          raise NotElementwiseError(f"{jax_forms.where(operation)} makes an array of another shape")
        self.env[var] = node

  def _check_broadcast(
    self, operation: Operation, old: tuple[int, ...], new: tuple[int, ...], dimensions: tuple[int, ...]
  ) -> None:
    """Raises unless a broadcast repeats scalars, blocks over their elements, or rows."""
    kind, size = self.kind(old), math.prod(new)
    if kind is not None and (kind[0] == "scalar" or math.prod(old) == size):
      return
    # These axes may grow: the last one, from a block to its elements; or those before the row.
    grows = [axis for axis in range(len(new)) if axis not in dimensions or old[dimensions.index(axis)] != new[axis]]
    if kind is not None and kind[0] == "block" and grows == [len(new) - 1] and new[-1] == self.block:
      return
    first = len(new) - (1 if new[-1] in (self.length, self.length // max(self.block, 1)) else 2)
    if kind is not None and kind[1] and all(axis < first for axis in grows):
      return
    raise NotElementwiseError(f"{jax_forms.where(operation)} repeats an array in another way")

  def _elementwise(self, operation: Operation, args: list[int]) -> int:
    name, params, dtype = operation.name, operation.eqn.params, self.program.aval(operation.outputs[0]).dtype
    if name == "integer_pow":
      if not 1 <= params["y"] <= 3:
        raise NotElementwiseError(f"{jax_forms.where(operation)} is not known to the kernel")
      power = args[0]
      for _ in range(params["y"] - 1):
        power = self.nodes.simplified("mul", (power, args[0]), dtype)
      return power
    if name == "square":
      return self.nodes.simplified("mul", (args[0], args[0]), dtype)
    if name == "clamp":
      return self.nodes.simplified("min", (self.nodes.simplified("max", (args[1], args[0]), dtype), args[2]), dtype)
    wide = name == "bitcast_convert_type" and dtype.itemsize != self.nodes.listed[args[0]].dtype.itemsize
    if name not in OPERATIONS or wide or dtype == np.dtype("float64") or types.is_packed(dtype):
      raise NotElementwiseError(f"{jax_forms.where(operation)} is not known to the kernel")
    return self.nodes.simplified(name, tuple(args), dtype)


def _other_shape(aval: Shaped) -> str:
  return f"an array of shape {list(aval.shape)} goes into it, such as a part of a recorded norm"
