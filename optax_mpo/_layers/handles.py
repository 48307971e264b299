"""Handles: what a loss function gets in place of params when its backward pass updates their weights.

Why: in a fused step the weights are in refs, which the backward pass of a layer writes. An array would be a copy of the
ref's value, could be used anywhere, and its gradient would have to be kept. A handle can only be given to what can
update the weights: `fused_layer`, `fused_scan` and `fused_value`.

How: `Step` holds the refs of one fused step and records who used which leaf. `Handle` points at a part of the tree of
params. Any misuse that shows while the step is traced raises a `FusedError`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax.extend import core

from optax_mpo._core import host, trees
from optax_mpo._core.annotations import PyTree, PyTreeDef, Shaped, Values
from optax_mpo._updates import by_leaf


class FusedError(ValueError):
  """Raised where a fused step would lose or repeat an update. The message says which weight, and what to do."""


class _Leaf:
  """Stands for one leaf of the params in the tree of a handle."""

  __slots__ = ("aval", "index")

  def __init__(self, index: int, aval: Shaped):
    self.index, self.aval = index, aval


class Step:
  """One fused step while its loss function is traced: the refs, and which leaves have been used and updated.

  Attributes:
    update: the update, taken apart.
    shared: the values that all groups of leaves share.
    params: a ref for every leaf of the params.
    states: a ref for every leaf of the state that belongs to leaves of the params, by index.
    params_on_host: which leaves of the params are in host memory.
    states_on_host: likewise, of the state.
    token: f32[], the scalar that is differentiated, so that there is a backward pass.
    stepped: the leaves whose update has been traced.
    values: the arrays that `fused_value` has returned, by leaf.
  """

  def __init__(
    self, update: by_leaf.Update, params: Values, states: dict[int, jax.Array], shared: dict[int, jax.Array]
  ):
    self.update, self.shared = update, shared
    self.params = [jax.new_ref(host.untyped(p)) for p in params]
    self.states = {j: jax.new_ref(host.untyped(s)) for j, s in states.items()}
    self.params_on_host = {i for i, p in enumerate(params) if host.is_on_host(p)}
    self.states_on_host = {j for j, s in states.items() if host.is_on_host(s)}
    self.token: jax.Array | None = None
    self.stepped: set[int] = set()
    self.values: dict[int, jax.Array] = {}
    self._avals = [jax.typeof(p) for p in params]
    self._users: dict[int, str] = {}
    self._trace: object = None
    self._inside: str | None = None

  def enter(self, token: jax.Array) -> None:
    """Called when the loss function starts."""
    self.token, self._trace = token, _trace_state()

  def close(self) -> None:
    """Called when the loss function has ended: its handles cannot be used any more."""
    self._trace = None

  def handle(self, treedef: PyTreeDef) -> "Handle":
    """A handle for all params."""
    return Handle(self, treedef.unflatten([_Leaf(i, a) for i, a in enumerate(self._avals)]), "params")

  def claim(self, who: str, handles: Sequence["Handle"]) -> list[int]:
    """Reserves the leaves of handles for one user, which will update them."""
    self.check_open(who, handles)
    leaves = [leaf for handle in handles for leaf in handle_leaves(handle)]
    for leaf in leaves:
      name = self.update.names[leaf]
      if leaf in self.values:
        raise FusedError(
          f"{who}: {name} was read with fused_value before, and a layer would step it a second time. Pass the array "
          "that fused_value returned to fn as an input."
        )
      if leaf in self._users:
        by = f"by {self._users[leaf]} and {who}" if self._users[leaf] != who else f"by two calls of {who}"
        raise FusedError(
          f"{who}: {name} is used {by}, and each would step it. Read it once with fused_value(handle) and pass the "
          "array to both: its gradients are then added up and it is stepped once."
        )
      self._users[leaf] = who
    return leaves

  def claim_values(self, handle: "Handle") -> list[int]:
    """Checks the leaves of a handle for fused_value, and returns those that it has not read yet."""
    self.check_open("fused_value", [handle])
    leaves = [leaf for leaf in handle_leaves(handle) if leaf not in self.values]
    for leaf in leaves:
      if leaf in self._users:
        raise FusedError(
          f"fused_value: {self.update.names[leaf]} is used by {self._users[leaf]} too, which steps it. Call "
          "fused_value first and pass its array to both."
        )
    return leaves

  def check_open(self, who: str, handles: Sequence["Handle"]) -> None:
    """Raises FusedError where handles cannot be used here."""
    name = handle_name(handles[0])
    if any(handle_step(h) is not self for h in handles):
      raise FusedError(f"{who}: the handles are of two different steps. Use the one that this call of the loss got.")
    if self._trace is None:
      raise FusedError(
        f"{who}: the handle of {name} is used after the loss function it was made for has returned. Handles live as "
        "long as one call of the loss: do not return or store them; the new params are what the step returns."
      )
    if self._inside is not None:
      raise FusedError(
        f"{who}: the handle of {name} is used inside the function of a {self._inside}. Pass it as (part of) the first "
        f"argument of that {self._inside}, or read it outside with fused_value and pass the array."
      )
    if _trace_state() != self._trace:
      raise FusedError(
        f"{who}: the handle of {name} is used inside a transformation in the loss function (grad, jvp, vmap, remat, "
        "jit, scan, cond, ...), where a step could be lost, repeated or undone. Call it directly in the loss function: "
        "for rematerialisation pass remat=True to fused_layer, for a loop over layers use fused_scan, for vmap map fn "
        "itself, and read weights for other transformations outside of them with fused_value(handle)."
      )

  def inside(self, who: str | None) -> str | None:
    """Sets whose function is being traced, and returns whose was traced before."""
    before, self._inside = self._inside, who
    return before

  def results(self) -> tuple[list[jax.Array], dict[int, jax.Array]]:
    """Takes the new params out of the refs, and the new leaves of the state by index."""
    params = [host.typed(jax.freeze(ref), i in self.params_on_host) for i, ref in enumerate(self.params)]
    return params, {j: host.typed(jax.freeze(ref), j in self.states_on_host) for j, ref in self.states.items()}

  def unused(self) -> list[int]:
    """The leaves that no layer and no `fused_value` uses."""
    return [i for i in range(len(self.params)) if i not in self._users and i not in self.values]


def _trace_state() -> object:
  return core.get_opaque_trace_state(convention="optax_mpo")


_MAPPING_METHODS = ("keys", "values", "items", "get")


class Handle:
  """Points at a part of the params in a fused step. It is indexed like the params, but it is not an array.

  `handle["blocks"][3]`, `handle.blocks` where the tree has attributes, `keys`, `values`, `items`, `get`, `len`, `in`
  and iteration work as on the tree, with handles of smaller parts as its values. The handle of a single leaf has its
  `shape`, `dtype`, `ndim` and `size`.
  """

  __slots__ = ("_name", "_node", "_step")

  def __init__(self, step: Step, node: PyTree, name: str):
    self._step, self._node, self._name = step, node, name

  def _child(self, node: PyTree, name: str) -> PyTree:
    leaves = jax.tree.leaves(node)
    if not leaves and not isinstance(node, Sequence | Mapping):
      return node
    if not all(isinstance(leaf, _Leaf) for leaf in leaves):
      raise AttributeError(f"{name} is no part of the params. Handles lead to params only.")
    return Handle(self._step, node, name)

  def __getitem__(self, key: object) -> PyTree:
    if isinstance(self._node, _Leaf):
      raise TypeError(f"{self._name} is the handle of an array, which cannot be indexed. {_READ}")
    return self._child(self._node[key], f"{self._name}[{key!r}]")

  def __getattr__(self, name: str) -> Any:
    node = self._node
    if isinstance(node, _Leaf):
      if name in ("shape", "dtype", "ndim", "size"):
        return getattr(node.aval, name)
      raise AttributeError(f"{self._name} is the handle of an array and has no {name!r}. {_READ}")
    if name in _MAPPING_METHODS and hasattr(node, "keys") and hasattr(node, "__getitem__"):
      return {"keys": node.keys, "values": self._values, "items": self._items, "get": self._get}[name]
    if name.startswith("__") or not hasattr(node, name):
      raise AttributeError(f"{self._name} is a {type(node).__name__} without {name!r}.")
    return self._child(getattr(node, name), f"{self._name}.{name}")

  def _values(self) -> list[PyTree]:
    return [self[key] for key in self.keys()]

  def _items(self) -> list[tuple[object, PyTree]]:
    return [(key, self[key]) for key in self.keys()]

  def _get(self, key: object, default: PyTree = None) -> PyTree:
    return self[key] if key in self._node else default

  def __iter__(self) -> Iterator[PyTree]:
    if isinstance(self._node, _Leaf):
      raise TypeError(f"{self._name} is the handle of an array. {_READ}")
    if hasattr(self._node, "keys"):
      return iter(self._node)
    return iter([self._child(node, f"{self._name}[{i}]") for i, node in enumerate(self._node)])

  def __len__(self) -> int:
    return self._node.aval.shape[0] if isinstance(self._node, _Leaf) else len(self._node)

  def __contains__(self, key: object) -> bool:
    return not isinstance(self._node, _Leaf) and key in self._node

  def __bool__(self) -> bool:
    return True

  def __jax_array__(self) -> NoReturn:
    raise FusedError(f"{self._name} is a handle and no array. {_READ}")

  __array__ = __jax_array__

  def __repr__(self) -> str:
    return f"Handle({self._name})"


_READ = (
  "Pass it to a fused_layer or fused_scan, whose function gets the array, or read it with "
  "optax_mpo.fused_value(handle)."
)


def is_handle(x: object) -> bool:
  """Whether `x` is a handle."""
  return isinstance(x, Handle)


def handle_leaves(handle: Handle) -> list[int]:
  """The indices of the leaves that a handle points at."""
  return [leaf.index for leaf in jax.tree.leaves(handle._node)]


def handle_treedef(handle: Handle) -> PyTreeDef:
  """The structure of the part of the params that a handle points at."""
  return jax.tree.structure(handle._node)


def handle_step(handle: Handle) -> Step:
  """The step that a handle belongs to."""
  return handle._step


def handle_name(handle: Handle) -> str:
  """A handle's name, such as `params['blocks'][3]`."""
  return handle._name


def check_no_handles(tree: PyTree, what: str) -> None:
  """Raises FusedError where a tree that leaves the loss function contains a handle."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_handle):
    if is_handle(leaf):
      raise FusedError(
        f"fused_value_and_update: {trees.name(path, what)} is the handle of {handle_name(leaf)}. Handles mean nothing "
        "outside of the loss function; the new params are what the step returns."
      )
