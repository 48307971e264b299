"""What the fused layers share: a call taken apart, the refs it steps, and how they are written.

Why: a layer, a stack of layers and a read of shared weights differ in where their gradients come from, and in nothing
else. How weights are found among the arguments, read, updated by the optimizer's slices and written, so that XLA can
put nothing off, is here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from optax_mpo._backends import cpu_rows, step_weight
from optax_mpo._core import order, trees, types
from optax_mpo._layers import handles
from optax_mpo._stepping.site import apply_all, of_group, of_groups, small_stacks
from optax_mpo._updates import by_leaf

PyTree = Any
Remat = bool | Callable[..., Any]


@dataclasses.dataclass
class Call:
  """A call of a fused layer: whose weights, and which arrays go in.

  Attributes:
    who: the public function's name.
    step: the step that the handles belong to.
    leaves: the leaves of the params, one for each weight.
    arrays: the arrays among the inputs.
    arguments: what the layer was called with.
    apply: `apply(weights, arrays)` calls the user's function.
  """

  who: str
  step: handles.Step
  leaves: list[int]
  arrays: list[Any]
  arguments: tuple[Any, ...]
  apply: Callable[[Sequence[Any], Sequence[Any]], PyTree]
  _places: list[int]  # the argument that each array is in

  @classmethod
  def take(
    cls, fn: Callable[..., Any], who: str, arguments: tuple[Any, ...], parts: tuple[int, ...] = ()
  ) -> "Call | None":
    """Takes arguments apart; None where there is no handle.

    Args:
      fn: the user's function.
      who: the public function's name.
      arguments: (params, inputs, kwargs), or (params, carry, xs) with parts=(1, 2).
      parts: the arguments in which numbers are arrays too.
    """
    leaves, treedef = jax.tree.flatten(arguments, is_leaf=handles.is_handle)
    found = [leaf for leaf in leaves if handles.is_handle(leaf)]
    if not found:
      return None
    step = handles.handle_step(found[0])
    claimed = step.claim(who, found)
    places = [i for i, argument in enumerate(arguments) for _ in jax.tree.leaves(argument, is_leaf=handles.is_handle)]
    arrays = {
      i: jnp.asarray(leaf)
      for i, (leaf, place) in enumerate(zip(leaves, places, strict=True))
      if not handles.is_handle(leaf) and (trees.is_array(leaf) or place in parts)
    }

    def apply(weights: Sequence[Any], values: Sequence[Any]) -> PyTree:
      weights_left, values_left = iter(weights), iter(values)
      merged = []
      for i, leaf in enumerate(leaves):
        if handles.is_handle(leaf):
          inner = handles.handle_treedef(leaf)
          leaf = inner.unflatten([next(weights_left) for _ in range(inner.num_leaves)])
        merged.append(next(values_left) if i in arrays else leaf)
      first, second, third = treedef.unflatten(merged)
      before = step.inside(who)
      try:
        return fn(first, second, third) if parts else fn(first, *second, **third)
      finally:
        step.inside(before)

    return cls(who, step, claimed, list(arrays.values()), arguments, apply, [places[i] for i in arrays])

  def weights(self, without: int | None = None) -> list[jax.ShapeDtypeStruct]:
    """The types of the weights, or without one of their axes."""
    return [types.struct(self.step.params[i], without) for i in self.leaves]

  def arrays_of(self, argument: int) -> list[Any]:
    """The arrays in one of the arguments."""
    return [a for a, place in zip(self.arrays, self._places, strict=True) if place == argument]

  def treedef_of(self, argument: int) -> Any:
    """The structure of one of the arguments."""
    return jax.tree.structure(self.arguments[argument])

  def refs(self) -> "Refs":
    """The refs of the weights and their states, with the groups in which they are stepped."""
    update = self.step.update
    groups = [update.group(leaves, self.who) for leaves in update.components(self.leaves)]
    return Refs(self.step, self.leaves, groups)

  def trained(self) -> list[bool]:
    """Which weights need a gradient."""
    return [self.step.update.needs_gradient(leaf) for leaf in self.leaves]

  def count_layers(self) -> int:
    """The number of layers in stacked weights.

    Raises:
      ValueError: where weights or `xs` disagree about it, or have no axis for it.
    """
    lengths = {self.step.update.names[i]: self.step.params[i].shape[:1] for i in self.leaves}
    if len(set(lengths.values())) != 1 or () in lengths.values():
      found = trees.listed(f"{name} {list(shape)}" for name, shape in lengths.items())
      raise ValueError(
        f"{self.who}: the weights have to be stacked, [layers, ...], with the same number of layers. Their first axes "
        f"are: {found}. Stack the layers' trees with jax.tree.map(lambda *w: jnp.stack(w), *layers)."
      )
    layers = next(iter(lengths.values()))[0]
    for x in self.arrays_of(2):
      if x.shape[:1] != (layers,):
        raise ValueError(f"{self.who}: xs has an array of shape {list(x.shape)}, but there are {layers} layers.")
    return layers


def is_float(x: Any) -> bool:
  """Whether `x` is of a dtype that can be differentiated."""
  return jnp.issubdtype(x.dtype, jnp.inexact)


class Refs:
  """The refs that a call reads and writes, and the slices of the update that step them.

  Attributes:
    leaves: which leaves of the params.
    groups: the groups in which they are stepped.
    kernels: whether kernels of our own may step them.
    arguments: the refs of weights and of states, and the values that all groups share. All of this goes through the
      custom_vjp as an argument and no other way, since its backward rule may run in another trace.
  """

  def __init__(self, step: handles.Step, leaves: Sequence[int], groups: Sequence[by_leaf.Group]):
    self.leaves, self.groups, self.kernels = leaves, groups, step.update.kernels
    self._states = [j for group in groups for j in group.states]
    self._shared = sorted({v for group in groups for v in group.shared})
    self.arguments = (
      [step.params[i] for i in leaves],
      [step.states[j] for j in self._states],
      [step.shared[v] for v in self._shared],
    )

  def weights(self, arguments: Any, index: Any = ...) -> list[Any]:
    """Reads the weights."""
    return [_layer_of(ref, index) for ref in arguments[0]]

  def _of(self, group: by_leaf.Group, arguments: Any) -> tuple[list[Any], list[Any]]:
    """The refs of a group's weights and then states, and its shared values."""
    params, states, shared = (
      dict(zip(keys, part, strict=True))
      for keys, part in zip((self.leaves, self._states, self._shared), arguments, strict=True)
    )
    refs = [*(params[i] for i in group.leaves), *(states[j] for j in group.states)]
    return refs, [shared[v] for v in group.shared]

  def values(self, arguments: Any) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """Reads weights, states and shared values, each by its index."""
    params, states, shared = arguments
    return (
      dict(zip(self.leaves, (ref[...] for ref in params), strict=True)),
      dict(zip(self._states, (ref[...] for ref in states), strict=True)),
      dict(zip(self._shared, shared, strict=True)),
    )

  def write(self, arguments: Any, params: dict[int, Any], states: dict[int, Any], onward: PyTree) -> PyTree:
    """Writes weights and states, and returns `onward`, which XLA cannot have before that is done."""
    refs = [*arguments[0], *arguments[1]]
    new = [*(params[i] for i in self.leaves), *(states[j] for j in self._states)]
    new, onward = order.barrier((new, onward))
    for ref, value in zip(refs, new, strict=True):
      ref[...] = value
    return onward

  def small_stacks(self, layers: int) -> list[by_leaf.Group]:
    """The groups that are stepped after a scan over their layers, and not in it."""
    sizes = [sum(ref.size for ref in self._of(group, self.arguments)[0][: len(group.leaves)]) for group in self.groups]
    return [self.groups[k] for k in sorted(small_stacks(sizes, layers))]

  def update(
    self,
    arguments: Any,
    grads: dict[int, Any],
    onward: PyTree,
    groups: Sequence[by_leaf.Group] | None = None,
  ) -> PyTree:
    """Steps groups, and returns `onward`, which XLA cannot have before that is done.

    Args:
      arguments: what came of `self.arguments` in this trace.
      grads: the gradients by leaf; missing ones are zero.
      onward: what the backward pass goes on with.
      groups: which ones; None: all.
    """
    refs, taken = [], []
    groups = self.groups if groups is None else groups
    for group in groups:
      own, shared = self._of(group, arguments)
      values, count = [ref[...] for ref in own], len(group.leaves)
      gradients = [grads[i] if i in grads else jnp.zeros_like(v) for i, v in zip(group.leaves, values, strict=False)]
      refs += own
      taken.append((gradients, values[:count], values[count:], shared))
    none = dict.fromkeys(self.leaves)
    steps = [site.step for site in of_groups(groups, none, none, self.kernels)]
    values = [x for params, states in apply_all(steps, taken) for x in (*params, *states)]
    new, onward = order.barrier((values, onward))
    for ref, value in zip(refs, new, strict=True):
      ref[...] = value
    return onward

  def update_layer(
    self,
    arguments: Any,
    grads: dict[int, Any],
    onward: Sequence[Any],
    index: Any,
    layers: int,
    without: Sequence[by_leaf.Group] = (),
  ) -> None:
    """Steps one layer of stacks: writes its slices into their refs, one part of the update after the other.

    XLA would make all new values of the layer before it writes the first, and together they are six times as large as
    the gradients. So each part is read and written at an index that depends on what the part before has written, and
    the first on what the layer hands on (else XLA reads new moments and weights in one kernel, and keeps both).
    The groups `without` are left alone.
    """
    count = 0
    done = order.first_elements([*onward, *grads.values()])
    for group in (g for g in self.groups if g not in without):
      refs, shared = self._of(group, arguments)
      gradients = [
        grads[i] if i in grads else types.zeros(types.struct(ref, 0))
        for i, ref in zip(group.leaves, refs, strict=False)
      ]
      kernel = of_group(group, stacked=True) if self.kernels else None
      rows = _rows_of(group, gradients[0], refs, shared, layers)
      if kernel is not None or rows is not None:
        in_parts = functools.partial(_write_layer_of, group.parts(), layers, count)
        stacks = [ref[...] for ref in refs]
        new = step_weight.step(in_parts, gradients[0], stacks, shared, index, done, kernel=kernel, rows=rows)
        for ref, value in zip(refs, new, strict=True):
          ref[...] = value
        count += len(group.states) + 1
        done = order.first_elements(refs)
        continue
      for part, outputs in group.parts():
        count += 1
        at = order.after(index, done, count)
        new = part.run_layer([*gradients, *(_layer_of(ref, at) for ref in refs)], shared, at, layers)
        for k, value in zip(outputs, new, strict=True):
          _write_layer(refs[k], at, value)
        done = order.first_elements([refs[k] for k in outputs])


def _rows_of(
  group: by_leaf.Group, grad: Any, refs: Sequence[Any], shared: Sequence[Any], layers: int
) -> cpu_rows.Rows | None:
  """The update of one layer of stacks by rows, if they are of one weight with 8-bit state."""
  if len(group.leaves) != 1:
    return None

  def run(*values: Any) -> list[Any]:
    inputs, (*known, index) = values[: len(refs) + 1], values[len(refs) + 1 :]
    return group.run_layer(inputs, known, index, layers)

  avals = [types.struct(grad), *(types.struct(ref, 0) for ref in refs)]
  return cpu_rows.of_layer(run, avals, [*(types.struct(x) for x in shared), jax.ShapeDtypeStruct((), jnp.int32)])


def _write_layer_of(
  parts: Sequence[tuple[by_leaf.Group, list[int]]],
  layers: int,
  count: int,
  grad: Any,
  stacks: Sequence[Any],
  shared: Sequence[Any],
  index: Any,
  done: Sequence[Any],
) -> list[Any]:
  """Steps one layer of stacks as `Refs.update_layer` does, in parts."""
  stacks = list(stacks)
  for k, (part, outputs) in enumerate(parts, start=1):
    at = order.after(index, done, count + k)
    layer = [lax.dynamic_index_in_dim(s, at, 0, False) for s in stacks]
    for i, value in zip(outputs, part.run_layer([grad, *layer], shared, at, layers), strict=True):
      stacks[i] = lax.dynamic_update_index_in_dim(stacks[i], value, at, 0)
    done = order.first_elements([stacks[i] for i in outputs])
  return stacks


def _layer_of(ref: Any, index: Any) -> jax.Array:
  """Reads a layer of a stack, or all of it where the index is an ellipsis."""
  if index is Ellipsis or not types.is_split(ref):
    return ref[index]
  return lax.dynamic_index_in_dim(ref[...], index, 0, False)  # JAX does not index refs that lie on several devices


def _write_layer(ref: Any, index: Any, value: jax.Array) -> None:
  """Writes a layer of a stack."""
  if types.is_split(ref):
    ref[...] = lax.dynamic_update_index_in_dim(ref[...], value, index, 0)
  else:
    ref[index] = value


def checkpointed(fun: Callable[..., Any], remat: Remat, prevent_cse: bool) -> Callable[..., Any]:
  """Puts `jax.checkpoint` around a function where rematerialisation is asked for."""
  if remat is False:
    return fun
  return jax.checkpoint(fun, policy=None if remat is True else remat, prevent_cse=prevent_cse)


def grads_by_leaf(leaves: Sequence[int], trained: Sequence[bool], grads: Sequence[Any]) -> dict[int, Any]:
  """The gradients by the leaves of the params that they belong to."""
  return dict(zip([i for i, flag in zip(leaves, trained, strict=True) if flag], grads, strict=True))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
  """Something hashable among residuals."""

  value: Any


# --- What a custom_vjp with symbolic zeros is given -------------------------------------------------------------------


def values(tree: PyTree) -> PyTree:
  """The values of the arguments of a forward rule."""
  return jax.tree.map(lambda p: p.value, tree, is_leaf=lambda p: hasattr(p, "perturbed"))


def perturbed(primals: Sequence[Any]) -> tuple[list[Any], list[bool]]:
  """The values of the arguments of a forward rule, and whether they are differentiated."""
  return [p.value for p in primals], [p.perturbed and is_float(p.value) for p in primals]


def is_zero(ct: Any) -> bool:
  """Whether a cotangent is a symbolic zero."""
  return isinstance(ct, SymbolicZero)


def real_cotangents(cotangents: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
  """The cotangents of floating-point results, as arrays."""
  pairs = [(ct, a) for ct, a in zip(cotangents, avals, strict=True) if is_float(a)]
  return [types.zeros(a) if is_zero(ct) else ct for ct, a in pairs]


def all_cotangents(real: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
  """The cotangents of all results as `jax.vjp` takes them: float0 for integers."""
  rest = iter(real)
  return [next(rest) if is_float(a) else np.zeros(a.shape, jax.dtypes.float0) for a in avals]


def spread(cotangents: Sequence[Any], active: Sequence[bool]) -> list[Any]:
  """Puts None where nothing was differentiated."""
  rest = iter(cotangents)
  return [next(rest) if flag else None for flag in active]


def step_unreached(step: handles.Step, leaves: Sequence[int]) -> None:
  """Steps leaves whose gradient is zero, since the loss does not depend on them."""
  for component in step.update.components(leaves):
    refs = Refs(step, component, [step.update.group(component, "fused_value_and_update")])
    refs.update(refs.arguments, {}, ())
