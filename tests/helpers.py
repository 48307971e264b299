"""Helpers for tests in all folders: compile for equal bits, compare bits, and the ordinary step to compare with."""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np

import optax_mpo as mpo
from optax_mpo._codecs import masters
from optax_mpo._stepping.layered import layer_step
from optax_mpo._stepping.site import of_groups

ROOT = pathlib.Path(__file__).parent.parent
"""The folder with README.md, docs, examples and benchmarks."""


def _under(dtypes, ranks, fun):
  @functools.wraps(fun)
  def under(*args, **kwargs):
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
      return fun(*args, **kwargs)

  return under


relaxed = functools.partial(_under, "standard", "allow")
"""Runs a function under JAX's defaults, for code that is not ours: Optax, Flax, or an example."""

strict = functools.partial(_under, "strict", "raise")


def exact_jit(fun: Callable[..., Any], **options: Any) -> Any:
  """`jax.jit` without excess precision: XLA may otherwise skip roundings to bf16 in one of two programs."""
  return jax.jit(fun, compiler_options={"xla_allow_excess_precision": False, **options})


quick_jit = functools.partial(exact_jit, xla_backend_optimization_level=0)
"""Also with LLVM at its lowest optimization level, which compiles faster, and sums in one order in every program."""

_EMITTERS = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters=false" in os.environ.get("XLA_FLAGS", "") else {}
unfused_jit = functools.partial(quick_jit, xla_disable_hlo_passes="fusion", **_EMITTERS)
"""Also with XLA's fusion off, as the documentation advises for comparisons. It compiles a kernel for each operation."""


def assert_same_bits(got: Any, want: Any) -> None:
  """Asserts that trees are equal in structure, shapes, dtypes and every bit. NaN equals NaN; -0.0 differs from 0.0."""
  chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert _raw(a).tobytes() == _raw(b).tobytes(), jax.tree_util.keystr(path)


def _raw(x: Any) -> np.ndarray:
  is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def ordinary_step(loss_fn: Callable[..., Any], tx: Any, **options: Any) -> Callable[..., Any]:
  """The step of `jax.value_and_grad`, `tx.update` and `apply_updates`, which gradient release has to equal."""

  def step(params: Any, opt_state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    weights = masters.decode(params, opt_state, "ordinary_step")
    value, grads = jax.value_and_grad(loss_fn, **options)(weights, *args, **kwargs)
    updates, opt_state = tx.update(grads, opt_state, params)
    return value, mpo.apply_updates(params, updates), opt_state

  return step


def one_layer(group: Any, length: int) -> Callable[..., Any]:
  """The update of one layer of stacks along axis 0: `run(grads, params, states, shared, index)` as `group.step`.

  Raises:
    NotSeparableError: where a layer cannot be updated alone.
  """
  none = dict.fromkeys(group.leaves)
  (whole,) = (site.step for site in of_groups([group], none, none))
  layered = layer_step(whole, lambda stacks, _: list(stacks), whole.grads, [], length)
  layer = layered.step
  assert len(layer.states) == len(whole.states), "state that the whole stack has once"
  assert len(layer.shared) == len(whole.shared) + 1, "values made before the layers"
  return lambda grads, params, states, shared, index: layer.run(grads, params, states, [*shared, index])
