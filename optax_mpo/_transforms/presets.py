"""One line to start: the two precisions that most runs use, and a way to choose matrices alone."""

from collections.abc import Callable, Iterable, Mapping

import jax
import optax

from optax_mpo._core.annotations import KeyPath
from optax_mpo._transforms.compensated import compensated
from optax_mpo._transforms.quantized import quantized_state


def exact(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Training with bf16 weights that equals training with f32 masters bit for bit: `compensated(inner, extra_bits=16)`.

  Args:
    inner: any Optax transformation. It sees f32 weights and f32 gradients.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Make params and state with `init`.

  Raises:
    TypeError: if `inner` is not an Optax transformation.

  Memory: 4 bytes per parameter, 2 for the weight and 2 for the bits that rounding to bf16 cut off, plus the state of
    `inner` (AdamW: 8).

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> tx = mpo.exact(optax.adamw(1e-3))
    >>> params, opt_state = mpo.init(tx, {"w": jnp.full(2, 0.1)})
    >>> params["w"].dtype.name, mpo.master_params(params, opt_state)["w"]
    ('bfloat16', Array([0.1, 0.1], dtype=float32))

  References:
    Lewandowski & Kosson, `Memory Efficient Mixed-Precision Optimizers <https://arxiv.org/abs/2309.12381>`_, 2023
  """
  return compensated(inner, extra_bits=16)


def compact(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Training in the least memory: weights of 24 bits, state in 8: `compensated(quantized_state(inner), extra_bits=8)`.

  It is not exact. docs/compact.md shows what it costs in loss, and how to keep some of the state in f32.

  Args:
    inner: any Optax transformation. It sees f32 weights, gradients and state.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Make params and state with `init`.

  Raises:
    TypeError: if `inner` is not an Optax transformation.

  Memory: 3 bytes per parameter, plus 1.0625 for each element of large state (AdamW: 5.125 in all).

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> params, opt_state = mpo.init(mpo.compact(optax.adamw(1e-3)), {"w": jnp.ones((256, 256))})
    >>> f"{sum(x.nbytes for x in jax.tree.leaves((params, opt_state))) / 256**2:.3f}"
    '5.125'
  """
  return compensated(quantized_state(inner), extra_bits=8)


def matrices(stacked: str | Iterable[str] | Mapping[str, int] = ()) -> Callable[[KeyPath, jax.Array], bool]:
  """Makes a `where` that chooses matrices: leaves with two axes or more, axes of layers not counted.

  `leaf.ndim >= 2` takes the stacked biases and norms of a scanned model, `[layers, width]`, for matrices. This knows
  which parts of the tree are stacks. It goes by axes: a bias of attention, `[heads, head_dim]`, is a matrix to it.
  Where that matters, write a `where` that goes by names: `lambda path, leaf: path[-1].key == "kernel"`.

  Args:
    stacked: the keys under which leaves have an axis of layers, such as "layers" or ("encoder", "decoder"). A dict says
      how many such axes: `{"layers": 1, "experts": 2}`. Of nested keys the largest number counts.

  Returns:
    `where(path, leaf) -> bool`, for `init`, `cast` and `convert`, and for masks that take a path:
    `jax.tree_util.tree_map_with_path(where, params)` is a mask for `optax.masked` and for `adamw(mask=...)`.

  Raises:
    TypeError: if `stacked` is none of these.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> params = {"head": jnp.ones((4, 2)), "layers": {"w": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}}
    >>> jax.tree_util.tree_map_with_path(mpo.matrices("layers"), params)
    {'head': True, 'layers': {'scale': False, 'w': True}}
    >>> low, _ = mpo.init(mpo.exact(optax.adamw(1e-3)), params, where=mpo.matrices("layers"))
    >>> low["layers"]["w"].dtype.name, low["layers"]["scale"].dtype.name
    ('bfloat16', 'float32')
  """
  if isinstance(stacked, str):
    stacked = (stacked,)
  if not isinstance(stacked, Iterable):
    raise TypeError(f"matrices: stacked has to be a key, several, or a dict, but it is a {type(stacked).__name__}.")
  depths = dict(stacked) if isinstance(stacked, Mapping) else dict.fromkeys(stacked, 1)

  def where(path: KeyPath, leaf: jax.Array) -> bool:
    keys = {jax.tree_util.keystr((key,), simple=True) for key in path}
    return leaf.ndim - max((n for key, n in depths.items() if key in keys), default=0) >= 2

  return where
