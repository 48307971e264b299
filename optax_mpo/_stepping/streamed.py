"""Calls a function of params that are in host memory, such as a loss for evaluation.

Why: an operation on the device cannot read host memory, and params moved there as a whole may not fit.

How: as in `value_and_update`, without updates: scans fetch the layer that they need, and other operations the leaf.
"""

import functools
from collections.abc import Callable

import jax

from optax_mpo._core import host, wrapping
from optax_mpo._core.annotations import PyTree
from optax_mpo._program import jax_forms, recompute
from optax_mpo._stepping import evaluate, stores


def streamed(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Makes a function that may be called with params in host memory, and fetches them as it needs them.

  Use it to evaluate the loss function, or to run the model, that `value_and_update` trains. Params that are on the
  device are used as they are.

  Args:
    fn: `fn(params, *args, **kwargs)`, any function that JAX can trace.

  Returns:
    A function with the same arguments and the same results. Run it under `jax.jit`. It is not meant to be
    differentiated.

  Raises:
    NotImplementedError: when called on a JAX whose programs it cannot read.
    It also raises what `fn` raises.

  Memory: on the device, one layer of each stack that a `lax.scan` runs over, and of other leaves one at a time.

  Example:
    >>> import jax, jax.numpy as jnp, optax_mpo as mpo
    >>> params = {"layers": jnp.ones((3, 4, 4))}
    >>> def loss_fn(params, x):
    ...   return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0].sum()
    >>> shardings = mpo.state_sharding(params, params, memory_kind="pinned_host", where=lambda path, leaf: True)
    >>> on_host = jax.device_put(params, shardings)
    >>> evaluate = jax.jit(mpo.streamed(loss_fn))
    >>> x = jnp.ones((2, 4))
    >>> bool(evaluate(on_host, x) == jax.jit(loss_fn)(params, x))
    True
  """
  wrapping.check_loss(fn, "streamed", "fn")

  @functools.wraps(fn)
  def call(params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
    jax_forms.check_forms("streamed")

    def fetching(params: PyTree, args: PyTree, kwargs: PyTree) -> PyTree:
      return fn(host.fetched(params), *args, **kwargs)

    program, out = jax_forms.trace(fetching, params, args, kwargs)
    weights = program.inputs[: len(jax.tree.leaves(params))]
    program = recompute.fetched_for_each_use(program, weights)
    inputs = jax.tree.leaves((params, args, kwargs))
    results = evaluate.run(program, [], inputs, program.outputs, stores.Whole([], [], []), [], weights=weights)
    return jax.tree.structure(out).unflatten(results)

  return call
