"""An update as a list of nodes without shapes: what it computes for one element, for a block of elements, or once.

`elementwise` makes these nodes of the operations of an update, and kernels compute them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_mpo._core.annotations import Values
from optax_mpo._program.program import Operation

Kind = Literal["element", "block", "scalar"]
Operations = Mapping[str, Callable[..., jax.Array]]  # operations[name](node, *arrays) computes a node of that name


class NotElementwiseError(Exception):
  """An update that is not a function of single elements and blocks. The message says why."""


@dataclasses.dataclass(frozen=True)
class Node:
  """A value: an "input", a "literal", or an operation on other nodes.

  Attributes:
    name: "input", "literal" or the name of the operation.
    args: the nodes it is computed from.
    dtype: the dtype of the value.
    kind: per element, per block, or scalar.
    params: the index of the input, or the value of the literal; None for an operation.
  """

  name: str
  args: tuple[int, ...]
  dtype: np.dtype
  kind: Kind
  params: Any = None


@dataclasses.dataclass(frozen=True)
class Source:
  """An input of the nodes: the values of a variable.

  Attributes:
    var: the variable.
    kind: per element, per block, or scalar.
    columns: whether it has entries for one row of the weight only, the same for all rows.
    counted: whether these are their own indices in the row, 0, 1, 2 and so on, so that no array has to be read.
  """

  var: int
  kind: Kind
  columns: bool
  counted: bool = False


@dataclasses.dataclass(frozen=True)
class Elements:
  """An update of one weight.

  Attributes:
    nodes: the nodes, in an order in which they can be computed.
    outputs: the nodes of the new weight and the new states, in their order.
    sources: what the "input" nodes refer to: the gradient, the weight, its states, and other known values.
    block: elements in a block; 0 if there are no blocks.
    length: the length of the weight's last axis.
    hoisted: operations on scalars and on values for one row, to be run before the kernel.
  """

  nodes: tuple[Node, ...]
  outputs: tuple[int, ...]
  sources: tuple[Source, ...]
  block: int
  length: int
  hoisted: tuple[Operation, ...]

  def compute(
    self, values: Values, shapes: dict[Kind, tuple[int, ...]], operations: Operations | None = None
  ) -> list[jax.Array]:
    """Computes the outputs from arrays for the sources, in the given shape for each kind.

    The shapes for elements and for blocks differ in the last axis at most. `operations` compute the nodes.
    """
    env: list[jax.Array] = []
    operations = operations or COMPUTE

    def read(i: int, kind: Kind) -> jax.Array:
      return jnp.broadcast_to(env[i], shapes[kind])

    for node in self.nodes:
      if node.name == "input":
        env.append(values[node.params])
      else:
        kind = "element" if node.name == "reduce_max" else node.kind
        env.append(operations[node.name](node, *(read(i, kind) for i in node.args)))
    return [read(i, "block" if self.nodes[i].kind == "block" else "element") for i in self.outputs]


def _finite(node: Node, x: jax.Array) -> jax.Array:
  return lax.abs(x) < np.array(np.inf, x.dtype)


def _sign(node: Node, x: jax.Array) -> jax.Array:
  one, zero = jnp.ones_like(x), jnp.zeros_like(x)
  return jnp.where(x > zero, one, jnp.where(x < zero, -one, x))


def _plain(operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  return lambda node, *args: operation(*args)


_PLAIN = """abs add ceil div eq exp floor ge gt le log lt max min mul ne neg rsqrt select_n shift_left
  shift_right_arithmetic shift_right_logical sqrt sub""".split()
OPERATIONS: dict[str, Callable[..., jax.Array]] = {
  **{name: _plain(getattr(lax, name)) for name in _PLAIN},
  **{name: _plain(getattr(lax, f"bitwise_{name}")) for name in ("and", "or", "xor", "not")},
  "bitcast_convert_type": lambda node, x: lax.bitcast_convert_type(x, node.dtype),
  "convert_element_type": lambda node, x: lax.convert_element_type(x, node.dtype),
  "is_finite": _finite,
  "sign": _sign,
}
COMPUTE: Operations = {
  **OPERATIONS,
  "literal": lambda node: jnp.full((), node.params, node.dtype),
  "reduce_max": lambda node, x: jnp.max(x, axis=-1, keepdims=True),
}
