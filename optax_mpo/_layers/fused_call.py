"""What the fused layers share: taking a call apart, and reading, updating and writing its refs.

Why: a layer, a stack of layers and a read of shared weights differ only in where their gradients come from.

How: `Call` finds the weights among the arguments. `Refs` reads them, updates them with the optimizer's slices and
writes them, in such a way that XLA cannot delay an update.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from optax_mpo._core import host, order, trees, types
from optax_mpo._core.annotations import PyTree, PyTreeDef, Shaped, Values
from optax_mpo._layers import handles
from optax_mpo._program import jax_forms, recompute
from optax_mpo._program.program import Atom, Program
from optax_mpo._stepping import evaluate, stores
from optax_mpo._stepping.plan import FOLLOWED
from optax_mpo._stepping.site import Place, Site, of_groups
from optax_mpo._updates import by_leaf

Remat = bool | Callable[..., bool]
"""Whether a layer recomputes its activations, or a policy of `jax.checkpoint_policies`."""

Gradients = dict[int, jax.Array]
"""Gradients by leaf of the params."""

RefArguments = tuple[list[jax.Ref], list[jax.Ref], list[jax.Array]]
"""The refs of weights and of states, and the values that groups share."""


@dataclasses.dataclass
class Call:
  """A call of a fused layer: its weights, and the arrays that go in.

  Attributes:
    who: the public function's name.
    step: the fused step that the handles belong to.
    leaves: the leaf of the params for each weight.
    arrays: the arrays among the inputs.
    arguments: what the layer was called with.
    apply: `apply(weights, arrays)` calls the user's function.
  """

  who: str
  step: handles.Step
  leaves: list[int]
  arrays: list[jax.Array]
  arguments: tuple[PyTree, ...]
  apply: Callable[[Values, Values], PyTree]
  _places: list[int]  # the argument that each array is in

  @classmethod
  def take(
    cls, fn: Callable[..., PyTree], who: str, arguments: tuple[PyTree, ...], parts: tuple[int, ...] = ()
  ) -> "Call | None":
    """Takes arguments apart. Returns None where there is no handle.

    Args:
      fn: the user's function.
      who: the public function's name.
      arguments: (params, inputs, kwargs), or (params, carry, xs) with parts=(1, 2).
      parts: the arguments in which Python scalars are arrays too. With it, `fn` takes the three arguments as they are.
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

    def apply(weights: Values, values: Values) -> PyTree:
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
    """The types of the weights, with one axis left out if `without` names it."""
    return [types.struct(self.step.params[i], without) for i in self.leaves]

  def arrays_of(self, argument: int) -> list[jax.Array]:
    """The arrays in one of the arguments."""
    return [a for a, place in zip(self.arrays, self._places, strict=True) if place == argument]

  def treedef_of(self, argument: int) -> PyTreeDef:
    """The structure of one of the arguments."""
    return jax.tree.structure(self.arguments[argument])

  def refs(self) -> "Refs":
    """The refs of the weights and their states, with the groups that are updated together."""
    update = self.step.update
    groups = [update.group(leaves, self.who) for leaves in update.components(self.leaves)]
    return Refs(self.step, self.leaves, groups)

  def trained(self) -> list[bool]:
    """Which weights need a gradient."""
    return [self.step.update.needs_gradient(leaf) for leaf in self.leaves]

  def count_layers(self) -> int:
    """The number of layers in stacked weights.

    Raises:
      ValueError: where weights or `xs` have different numbers of layers, or no axis of layers.
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


def is_float(x: Shaped) -> bool:
  """Whether the dtype of `x` can be differentiated."""
  return jnp.issubdtype(x.dtype, jnp.inexact)


WORTH_A_BARRIER = 2**20
"""The backward pass of a layer waits for updates with at least this many bytes of gradient.

Waiting for fewer would save no visible memory, and XLA does not fuse across a wait.
"""


class Refs:
  """The refs of weights and states that a call reads and updates.

  Attributes:
    leaves: which leaves of the params.
    groups: the groups that are updated together.
    arguments: the refs of weights and of states, and the values that groups share. They enter the custom_vjp only as
      arguments, since its backward rule may run in another trace.
  """

  def __init__(self, step: handles.Step, leaves: Sequence[int], groups: Sequence[by_leaf.Group]):
    self.leaves, self.groups, self._kernels = leaves, groups, step.update.kernels
    self._states = [j for group in groups for j in group.states]
    self._on_host = [i in step.params_on_host for i in leaves], [j in step.states_on_host for j in self._states]
    self._shared = sorted({v for group in groups for v in group.shared})
    self.arguments: RefArguments = (
      [step.params[i] for i in leaves],
      [step.states[j] for j in self._states],
      [step.shared[v] for v in self._shared],
    )

  def weights(self, arguments: RefArguments) -> list[jax.Array]:
    """Reads the weights, of which some may be in host memory."""
    return [host.typed(ref[...], flag) for ref, flag in zip(arguments[0], self._on_host[0], strict=True)]

  def update(self, arguments: RefArguments, grads: Gradients, onward: PyTree) -> PyTree:
    """Updates all weights. Returns `onward`, which XLA cannot use before that is done.

    Args:
      arguments: `self.arguments`, as this trace has them.
      grads: the gradients by leaf; missing ones are zero.
      onward: what the backward pass goes on with.
    """
    store, shared = self._read(arguments)
    weights = [store.leaves[i] for i in self.leaves]
    gradients = [_or_zeros(grads.get(i), w) for i, w in zip(self.leaves, weights, strict=True)]
    program = Program()
    program.inputs += [program.new(jax.typeof(x)) for x in (*weights, *gradients)]
    count = len(self.leaves)
    old, made = program.inputs[:count], program.inputs[count:]
    sites = self._sites(dict(zip(self.leaves, made, strict=True)), dict(zip(self.leaves, old, strict=True)))
    evaluate.run(program, sites, [*weights, *gradients], [], store, shared)
    return self._write(arguments, store, onward)

  def update_within(
    self,
    arguments: RefArguments,
    backward: Callable[[list[jax.Array], PyTree, PyTree], tuple[list[jax.Array], Gradients]],
    kept: PyTree,
    cotangents: PyTree,
    at_least: int = 0,
  ) -> list[jax.Array]:
    """Runs a backward pass and updates each weight as soon as its gradient is complete.

    Args:
      arguments: `self.arguments`, as this trace has them.
      backward: `backward(weights, kept, cotangents)` returns what the backward pass goes on with, and the gradients by
        leaf.
      kept: what it needs from the forward pass, a tree of arrays.
      cotangents: what it starts from, a tree of arrays.
      at_least: the backward pass waits only for updates with this many bytes of gradient together. If all weights have
        fewer, or this JAX writes programs that cannot be taken apart, all weights are updated at its end.

    Returns:
      What the backward pass goes on with.

    Raises:
      ValueError: where layers are scanned and their stack cannot be updated one layer at a time.
    """
    store, shared = self._read(arguments)
    # XLA must not merge recomputed values with those of the forward pass, which would then be kept until here.
    weights, cotangents = order.barrier(([store.leaves[i] for i in self.leaves], cotangents))
    if sum(w.size * w.dtype.itemsize for w in weights) < at_least or jax_forms.misread_scan():
      onward, grads = backward(weights, kept, cotangents)
      return self.update(arguments, grads, onward)
    store.leaves.update(zip(self.leaves, weights, strict=True))

    def flat(weights: list[jax.Array], kept: PyTree, cotangents: PyTree) -> tuple[list[jax.Array], list[jax.Array]]:
      onward, grads = backward(weights, kept, cotangents)
      return onward, [_or_zeros(grads.get(i), w) for i, w in zip(self.leaves, weights, strict=True)]

    inputs = (weights, kept, cotangents)
    closed, (onward, _) = jax.make_jaxpr(flat, return_shape=True)(*inputs)
    count = len(onward)
    wanted = [i >= count for i in range(count + len(self.leaves))]
    program = jax_forms.flatten_towards(closed, wanted, FOLLOWED)
    program = recompute.fetched_for_each_use(program, program.inputs[: len(self.leaves)])
    gradients = dict(zip(self.leaves, program.outputs[count:], strict=True))
    sites = self._sites(gradients, dict(zip(self.leaves, program.inputs, strict=False)))
    out = evaluate.run(program, sites, jax.tree.leaves(inputs), program.outputs[:count], store, shared, at_least)
    for group, site in zip(self.groups, sites, strict=True):
      if site.place is Place.AT_END:
        group.raise_mixed(site.why)
    return self._write(arguments, store, out)

  def _sites(self, grads: Mapping[int, Atom], weights: Mapping[int, int]) -> list[Site]:
    return of_groups(self.groups, grads, weights, self._kernels)

  def _read(self, arguments: RefArguments) -> tuple[stores.Whole, list[list[jax.Array]]]:
    """Reads weights and states. Returns them, and the values that each group shares with others."""
    pairs = zip(arguments[:2], self._on_host, strict=True)
    params, states = ([host.typed(r[...], f) for r, f in zip(refs, flags, strict=True)] for refs, flags in pairs)
    shared = dict(zip(self._shared, arguments[2], strict=True))
    leaves, states = dict(zip(self.leaves, params, strict=True)), dict(zip(self._states, states, strict=True))
    return stores.Whole(leaves, states, self.groups), [[shared[v] for v in group.shared] for group in self.groups]

  def _write(self, arguments: RefArguments, store: stores.Whole, onward: PyTree) -> PyTree:
    """Writes weights and states. Returns `onward`, which XLA cannot use before that is done."""
    new = [*(store.leaves[i] for i in self.leaves), *(store.states[j] for j in self._states)]
    new, onward = order.barrier((new, onward))
    for ref, value in zip([*arguments[0], *arguments[1]], new, strict=True):
      ref[...] = host.untyped(value)
    return onward


def _or_zeros(grad: jax.Array | None, weight: jax.Array) -> jax.Array:
  return types.zeros(types.struct(weight)) if grad is None else grad


def checkpointed(fun: Callable[..., PyTree], remat: Remat, prevent_cse: bool) -> Callable[..., PyTree]:
  """Puts `jax.checkpoint` around a function, unless `remat` is False."""
  if remat is False:
    return fun
  return jax.checkpoint(fun, policy=None if remat is True else remat, prevent_cse=prevent_cse)


def grads_by_leaf(leaves: Sequence[int], trained: Sequence[bool], grads: Values) -> Gradients:
  """The gradients of the trained weights, by leaf of the params."""
  return dict(zip([i for i, flag in zip(leaves, trained, strict=True) if flag], grads, strict=True))


# --- What a custom_vjp with symbolic zeros is given -------------------------------------------------------------------


def values(tree: PyTree) -> PyTree:
  """The values of a forward rule's arguments."""
  return jax.tree.map(lambda p: p.value, tree, is_leaf=lambda p: hasattr(p, "perturbed"))


def perturbed(primals: Sequence[CustomVJPPrimal]) -> tuple[list[jax.Array], list[bool]]:
  """The values of a forward rule's arguments, and whether they are differentiated."""
  return [p.value for p in primals], [p.perturbed and is_float(p.value) for p in primals]


def is_zero(ct: object) -> bool:
  """Whether a cotangent is a symbolic zero."""
  return isinstance(ct, SymbolicZero)


def real_cotangents(cotangents: Sequence[jax.Array | SymbolicZero], avals: Sequence[Shaped]) -> list[jax.Array]:
  """The cotangents of floating-point results, as arrays."""
  pairs = [(ct, a) for ct, a in zip(cotangents, avals, strict=True) if is_float(a)]
  return [types.zeros(a) if isinstance(ct, SymbolicZero) else ct for ct, a in pairs]


def all_cotangents(real: Values, avals: Sequence[Shaped]) -> list[jax.Array | np.ndarray]:
  """The cotangents of all results as `jax.vjp` takes them: float0 for integers."""
  rest = iter(real)
  return [next(rest) if is_float(a) else np.zeros(a.shape, jax.dtypes.float0) for a in avals]


def spread(cotangents: Values, active: Sequence[bool]) -> list[jax.Array | None]:
  """Puts None where nothing was differentiated."""
  rest = iter(cotangents)
  return [next(rest) if flag else None for flag in active]


def step_unreached(step: handles.Step, leaves: Sequence[int]) -> None:
  """Updates leaves with a gradient of zero, since the loss does not depend on them."""
  for component in step.update.components(leaves):
    refs = Refs(step, component, [step.update.group(component, "fused_value_and_update")])
    refs.update(refs.arguments, {}, ())
