"""Treats each layer of a stacked leaf as a weight of its own, for transformations that do not work element by element.

Why: scanned models keep the weights of all layers in one leaf, `[layers, ...]`. Muon, LAMB or Adafactor then see one
large array where they mean a matrix: the norm is that of all layers, the wrong axes are factored, and Muon leaves
arrays with three axes to Adam. And a stack whose layers are mixed cannot be updated inside the backward pass of its
scan.

How: a scan over the layers of each leaf, without a carry, whose body is the update of one layer. `layer_rules` knows
that such a scan keeps layers apart and runs its body alone, so gradient release updates a layer as soon as the backward
pass has its gradient. Leaves are scanned one by one: their updates do not depend on each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_mpo._core import trees, wrapping
from optax_mpo._core.annotations import KeyPath, PyTree, PyTreeDef

Where = Callable[[KeyPath, jax.Array], bool | int | None]

_USAGE = "tx, where=lambda path, leaf: 'layers' in jax.tree_util.keystr(path)"
_REMAKE = "Pass the state that this transformation's init made, for these params."


class PerLayerState(NamedTuple):
  """State of `per_layer`.

  Attributes:
    layers: a tree like the params. In place of each stack stands the state of `tx` for its layers, with an
      `optax.MaskedNode()` for every other leaf. Its arrays have an axis of layers: first, or where the stack has it if
      they have as many axes as the stack. In place of other leaves stands an `optax.MaskedNode()`.
    others: the state of `tx` for the leaves that are not stacks, or an `optax.MaskedNode()` if there are none.
  """

  layers: PyTree
  others: optax.OptState


def per_layer(tx: optax.GradientTransformation, where: Where | None = None) -> optax.GradientTransformationExtraArgs:
  """Applies `tx` to each layer of a stacked leaf alone, as if the layers were leaves of their own.

  For transformations that do not treat each element alone, and so give stacks another update than single layers:
  `optax.contrib.muon`, `optax.adafactor`, `optax.lamb`, `optax.lars`, `optax.adaptive_grad_clip`,
  `optax.clip_by_block_rms`. Weights and state equal those of the model with a list of layers. Steps with gradient
  release then update such stacks inside the scan, in one pass.

  Put `compensated` outside, and what counts all leaves too, since `tx` sees one layer of one leaf at a time:
  `compensated(optax.chain(optax.clip_by_global_norm(1.0), per_layer(optax.contrib.muon(1e-2))))`. So a
  `clip_by_global_norm` inside clips each weight alone, and random numbers inside are the same in each layer.
  `quantized_state` may be on either side; its `min_size` is that of a layer if it is inside.

  Args:
    tx: the transformation of one layer. Extra arguments of `update` are handed on, the same to each layer.
    where: `where(path, leaf) -> bool | int` says for each leaf whether it is a stack: True for layers along the first
      axis, their axis as an int, False or None for a leaf that `tx` treats as usual, together with others of its kind.
      The path is JAX's key path; the leaf has a shape and a dtype. None: every leaf is a stack along its first axis,
      all of the same number of layers.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `PerLayerState`. Updates have the shapes of the params
    and the dtypes that `tx` gives them.

  Raises:
    TypeError: if `tx` is not an Optax transformation; in `update`, if the state is not a `PerLayerState`.

    `init` and `update` raise ValueError for a stack without that axis, such as a scalar, for stacks of different
    lengths if `where` is None, and for another result of `where`. All name the leaf.

  Memory: the state of `tx`, for each layer: inside `compensated`, muon with f32 momentum holds 8 bytes per parameter,
    5.06 with 8 bits and 8-bit state, adafactor 4 and a little. A step with gradient release adds that of one layer's
    update: for muon 16 bytes per parameter of one layer's weight. An ordinary step adds copies of one whole leaf, of
    its gradients and updates in f32: up to 24 bytes per parameter of the largest leaf.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> def loss_fn(params, x):
    ...   x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x @ params["embed"], params["layers"])
    ...   return jnp.mean(x.astype(jnp.float32) ** 2)
    >>> tx = mpo.compensated(mpo.per_layer(optax.adafactor(1e-3), lambda path, leaf: leaf.ndim == 3))
    >>> params, opt_state = mpo.init(tx, {"embed": jnp.ones((4, 8)), "layers": jnp.ones((3, 8, 8))})
    >>> mpo.explain(loss_fn, tx, params, opt_state, jnp.ones((2, 4), jnp.bfloat16))
    leaf              shape      stepped  gradient held  why
    params['embed']   [4, 8]     at once  64 B
    params['layers']  [3, 8, 8]  in scan  128 B
    224 parameters; the largest gradient held is 128 B

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; You et al., `Large Batch Optimization for
    Deep Learning <https://arxiv.org/abs/1904.00962>`_, 2019, whose norms are those of layers
  """
  tx = wrapping.as_transformation(tx, "per_layer", "tx", _USAGE)

  def init(params: PyTree) -> PerLayerState:
    leaves, treedef = jax.tree.flatten(params)
    axes = _axes(params, where)

    def layers_of(i: int, axis: int) -> optax.OptState:
      stack = jnp.moveaxis(jnp.asarray(leaves[i]), axis, 0)
      return _placed(lax.map(lambda leaf: tx.init(_only(treedef, {i: leaf})), stack), stack.ndim, axis)

    states = [optax.MaskedNode() if axis is None else layers_of(i, axis) for i, axis in enumerate(axes)]
    rest = _rest(leaves, axes)
    others = tx.init(_only(treedef, rest)) if rest else optax.MaskedNode()
    return PerLayerState(treedef.unflatten(states), others)

  def update(
    updates: optax.Updates, state: optax.OptState, params: PyTree = None, **extra_args: PyTree
  ) -> tuple[optax.Updates, optax.OptState]:
    state = wrapping.own_state(state, PerLayerState, "per_layer")
    tree = updates if params is None else params
    leaves, treedef = jax.tree.flatten(tree)
    grads = trees.flatten_like(tree, updates, "per_layer: the tree of updates", "Pass updates for these params.")
    states = trees.flatten_like(tree, state.layers, "per_layer: the state's layers", _REMAKE)
    axes = _axes(tree, where)
    _check_states(tree, axes, states)

    def run(grads: dict[int, jax.Array], state: PyTree, leaves: dict[int, jax.Array]) -> tuple[list[PyTree], PyTree]:
      seen = None if params is None else _only(treedef, leaves)
      new, state = tx.update(_only(treedef, grads), state, seen, **extra_args)
      return treedef.flatten_up_to(new), state

    for i, axis in enumerate(axes):
      if axis is None:
        continue

      def one(layer: PyTree, i: int = i) -> tuple[PyTree, PyTree]:
        grad, state, leaf = layer
        new, state = run({i: grad}, state, {i: leaf})
        return new[i], state

      rank = jnp.ndim(grads[i])
      grad, leaf = (jnp.moveaxis(jnp.asarray(x), axis, 0) for x in (grads[i], leaves[i]))
      grads[i], new = lax.map(one, (grad, _placed(states[i], rank, axis, back=True), leaf))
      grads[i], states[i] = jnp.moveaxis(grads[i], 0, axis), _placed(new, rank, axis)

    others, rest = state.others, _rest(grads, axes)
    if rest:
      new, others = run(rest, others, _rest(leaves, axes))
      grads = [new[i] if i in rest else grad for i, grad in enumerate(grads)]
    return treedef.unflatten(grads), PerLayerState(treedef.unflatten(states), others)

  return optax.GradientTransformationExtraArgs(init, update)


def _only(treedef: PyTreeDef, leaves: dict[int, jax.Array]) -> PyTree:
  """A tree with some of its leaves, by index, and `optax.MaskedNode` in place of the others."""
  return treedef.unflatten([leaves.get(i, optax.MaskedNode()) for i in range(treedef.num_leaves)])


def _rest(leaves: list[jax.Array], axes: list[int | None]) -> dict[int, jax.Array]:
  """The leaves that are not stacks, by index."""
  return {i: leaf for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True)) if axis is None}


def _placed(state: PyTree, rank: int, axis: int, back: bool = False) -> PyTree:
  """Moves the first axis of arrays with as many axes as the stack to where its layers are, or `back`."""
  start, end = (axis, 0) if back else (0, axis)
  return jax.tree.map(lambda x: jnp.moveaxis(x, start, end) if x.ndim == rank and axis else x, state)


def _axes(params: PyTree, where: Where | None) -> list[int | None]:
  """The axis of the layers of each leaf; None for a leaf that is not a stack."""
  axes, lengths = [], {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name, shape = trees.name(path), jnp.shape(leaf)
    chosen = True if where is None else where(path, leaf)
    if chosen is None or isinstance(chosen, bool | np.bool_):
      axis = 0 if chosen else None
    elif isinstance(chosen, int | np.integer):
      axis = int(chosen)
    else:
      raise ValueError(
        f"per_layer: where returned {chosen!r} for {name}. Return True for a stack of layers along the first axis, "
        "their axis as an int, or False for a leaf without layers."
      )
    if axis is not None and not -len(shape) <= axis < len(shape):
      raise ValueError(
        f"per_layer: {name} has shape {list(shape)}, and so no axis {axis} of layers. Return False for it in "
        f"per_layer({_USAGE}), or leave it out with optax.masked or optax.multi_transform."
      )
    axes.append(None if axis is None else axis % len(shape))
    if axis is not None:
      lengths.setdefault(shape[axis], name)
  if where is None and len(lengths) > 1:
    found = trees.listed(f"{name} has {length}" for length, name in lengths.items())
    raise ValueError(
      f"per_layer: without where, every leaf is a stack of layers along its first axis, but their lengths differ: "
      f"{found}. Say which leaves are stacks: per_layer({_USAGE})."
    )
  return axes


def _check_states(params: PyTree, axes: list[int | None], states: list[PyTree]) -> None:
  """Raises ValueError for a state that was made with other stacks."""
  for (name, _), axis, state in zip(trees.named_leaves(params), axes, states, strict=True):
    if (axis is None) != isinstance(state, optax.MaskedNode):
      was, now = ("not a stack", "a stack") if axis is not None else ("a stack", "not a stack")
      raise ValueError(f"per_layer: {name} was {was} of layers when the state was made, and now is {now}. {_REMAKE}")
