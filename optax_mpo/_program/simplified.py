"""A list of nodes as XLA's algebraic simplifier leaves them.

XLA rewrites divisions and constants before it compiles, for example (a / b) / c to a / (b * c). The nodes are rewritten
the same way, so that a kernel computes the same bits. Tests compare them with XLA's own program.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_mpo._program.elements import Kind, Node


class Nodes:
  """Nodes, each of which is listed once.

  Attributes:
    listed: the nodes, in an order in which they can be computed.
    joined: those that XLA joins with another one.
  """

  def __init__(self) -> None:
    self.listed: list[Node] = []
    self.joined: set[int] = set()
    self._known: dict[Node, int] = {}

  def make(
    self, name: str, args: tuple[int, ...], dtype: np.dtype, params: object = None, kind: Kind | None = None
  ) -> int:
    """Adds a node, or finds an equal one."""
    if kind is None:
      kinds = {self.listed[a].kind for a in args}
      kind = "element" if "element" in kinds else "block" if "block" in kinds else "scalar"
    key = node = Node(name, args, jnp.dtype(dtype), kind, params)
    if name == "literal":
      key = dataclasses.replace(node, params=np.asarray(params, node.dtype).tobytes())
    if key not in self._known:
      self.listed.append(node)
      self._known[key] = len(self.listed) - 1
    return self._known[key]

  def literal(self, value: ArrayLike, dtype: np.dtype) -> int:
    """Adds a number."""
    return self.make("literal", (), dtype, np.asarray(value, dtype).item(), "scalar")

  def _number(self, i: int) -> float | None:
    """The value of a literal, or None."""
    return self.listed[i].params if self.listed[i].name == "literal" else None

  def simplified(self, name: str, args: tuple[int, ...], dtype: np.dtype) -> int:
    """Adds a node as XLA's algebraic simplifier leaves it."""
    rule = getattr(self, f"_simplified_{name}", None) if jnp.issubdtype(dtype, jnp.floating) else None
    found = rule(args, dtype) if rule is not None else None
    if found is None and name == "convert_element_type" and self.listed[args[0]].dtype == dtype:
      found = args[0]
    return self.make(name, args, dtype) if found is None else found

  def _simplified_add(self, args: tuple[int, ...], dtype: np.dtype) -> int | None:
    for one, other in (args, args[::-1]):
      if self._number(other) == 0:
        return one
    return self._joined("add", args, dtype)

  def _simplified_sub(self, args: tuple[int, ...], dtype: np.dtype) -> int | None:
    return args[0] if self._number(args[1]) == 0 else None

  def _simplified_mul(self, args: tuple[int, ...], dtype: np.dtype) -> int | None:
    for one, other in (args, args[::-1]):
      if self._number(other) == 1:
        return one
      if self._number(other) == -1:
        return self.simplified("neg", (one,), dtype)
    return self._joined("mul", args, dtype)

  def _joined(self, name: str, args: tuple[int, ...], dtype: np.dtype) -> int | None:
    """Rewrites (a op c) op d, with literals c and d, to a op (c op d)."""
    for one, other in (args, args[::-1]):
      inner = self.listed[one]
      if self._number(other) is None or inner.name != name:
        continue
      for a, c in (inner.args, inner.args[::-1]):
        if self._number(c) is not None:
          # Exact either way: a sum of whole numbers, and a product of normal numbers with a power of two.
          if not (self.listed[a].name in ("floor", "min") if name == "add" else self._is_power_of_two(c)):
            self.joined.add(one)
          c, d = np.asarray(self._number(c), dtype), np.asarray(self._number(other), dtype)
          return self.simplified(name, (a, self.literal(c * d if name == "mul" else c + d, dtype)), dtype)
    return None

  def _is_power_of_two(self, i: int) -> bool:
    return math.frexp(abs(self.listed[i].params))[0] == 0.5

  def _simplified_div(self, args: tuple[int, ...], dtype: np.dtype) -> int | None:
    above, below = (self.listed[a] for a in args)
    number = self._number(args[1])
    if number == 1:
      return args[0]
    if below.name == "sqrt":
      return self.simplified("mul", (args[0], self.simplified("rsqrt", below.args, dtype)), dtype)
    if number:
      inverse = self.literal(np.asarray(1, dtype) / np.asarray(number, dtype), dtype)
      return self.simplified("mul", (args[0], inverse), dtype)
    self.joined |= {a for a in args if self.listed[a].name == "div"}
    if above.name == "div" and below.name == "div":
      top = self.simplified("mul", (above.args[0], below.args[1]), dtype)
      return self.simplified("div", (top, self.simplified("mul", (above.args[1], below.args[0]), dtype)), dtype)
    if above.name == "div":
      return self.simplified("div", (above.args[0], self.simplified("mul", (above.args[1], args[1]), dtype)), dtype)
    if below.name == "div":
      return self.simplified("div", (self.simplified("mul", (args[0], below.args[1]), dtype), below.args[0]), dtype)
    return None

  def _simplified_neg(self, args: tuple[int, ...], dtype: np.dtype) -> int | None:
    inner = self.listed[args[0]]
    return inner.args[0] if inner.name == "neg" else None
