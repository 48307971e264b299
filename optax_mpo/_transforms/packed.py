"""Keeps the small arrays of an optimizer state in one array for each dtype.

Why: a model of unrolled layers has hundreds of biases and norms, and each of them has moments and compensation bits.
Python and XLA handle each array of a step's arguments and results one by one.

How: `update` unpacks the state by slices, and packs the new one by a concatenation. XLA:GPU then writes the small
leaves of a dtype with a few kernels. What is computed does not change.
"""

import jax
import optax

from optax_mpo._core import packing, wrapping
from optax_mpo._core.annotations import PyTree
from optax_mpo._core.packing import PackedState


def packed(inner: optax.GradientTransformation, at_most: int = 2**12) -> optax.GradientTransformationExtraArgs:
  """Stores the state of `inner` with its small arrays packed into one for each dtype.

  For models with hundreds of leaves, where a step is sent faster with fewer arrays (docs/performance.md). Wrap
  everything, `packed(exact(optax.adamw(3e-4)))`: compensation bits are packed as well. Weights and state have the bits
  that they have without, in ordinary steps and with gradient release.

  `optax_mpo.unpacked(opt_state)` returns the state of `inner`. The functions of this library take a packed state as it
  is, and `convert` packs and unpacks.

  Args:
    inner: the transformation to wrap.
    at_most: leaves of the state with this many elements or fewer are packed, where there are several of a dtype. Leaves
      in host memory, keys of random numbers and 4-bit integers stay as they are. Over several devices, packed arrays
      are replicated (`state_sharding`).

  Returns:
    An `optax.GradientTransformationExtraArgs` whose state is a `PackedState`.

  Raises:
    TypeError: if `inner` is not an Optax transformation; in `update`, if the state is not a `PackedState`.
    ValueError: if `at_most` is not a positive int.

  Memory: between steps as without. In a step, the packed arrays once more, unpacked.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> params = {"w": jnp.ones((64, 128)), "b": jnp.zeros(128), "norm": jnp.ones(64)}
    >>> tx = mpo.packed(mpo.exact(optax.adamw(1e-3)))
    >>> params, opt_state = mpo.init(tx, params)
    >>> [f"{x.dtype}{list(x.shape)}" for x in opt_state.arrays]
    ['uint16[192]', 'float32[384]']
    >>> mpo.unpacked(opt_state).compensation["norm"].shape
    (64,)
  """
  inner = wrapping.as_transformation(inner, "packed")
  if not isinstance(at_most, int) or isinstance(at_most, bool) or at_most < 1:
    raise ValueError(f"packed: at_most has to be a number of elements, 1 or more, but it is {at_most!r}.")

  def init(params: PyTree) -> PyTree:  # a PackedState; Optax's types know no dataclasses
    return packing.pack(inner.init(params), at_most)

  def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: PyTree) -> tuple[PyTree, PyTree]:
    state = wrapping.own_state(state, PackedState, "packed")
    updates, new = wrapping.update(inner, updates, packing.unpack(state), params, extra_args)
    return updates, packing.packed_again(state.layout.treedef.flatten_up_to(new), state.layout)

  return optax.GradientTransformationExtraArgs(init, update)


def unpacked(opt_state: PyTree) -> PyTree:
  """Returns an optimizer state with each `PackedState` in it replaced by the state that it packs.

  Args:
    opt_state: the state of `packed`, or of transformations around it.

  Returns:
    The state that the transformation has without `packed`. Its small leaves are copies.

  Raises:
    ValueError: if nothing in it is packed.

  Memory: the small leaves once more.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), mpo.packed(optax.adam(1e-3)))
    >>> mpo.unpacked(tx.init({"w": jnp.ones(3), "b": jnp.ones(2)}))[1][0].mu["w"]
    Array([0., 0., 0.], dtype=float32)
  """
  if not any(map(packing.is_state, jax.tree.leaves(opt_state, is_leaf=packing.is_state))):
    raise ValueError(
      "unpacked: nothing in opt_state is packed. Pass the state of a transformation with packed in it; any other state "
      "is unpacked already."
    )
  return packing.unpack_all(opt_state)
