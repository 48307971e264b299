"""Tries a transformation on tiny params, and warns of two mistakes that raise no error.

Why: weights with fewer bits than were cut off, rounded to nearest, lose a weight decay below half an ulp. And if a
wrapper around `compensated` changes its updates, or freezes weights that it updates, the bits belong to other weights
than the params.

How: every floating-point leaf is replaced by an array with the same number of axes and one element, in the same tree,
so that masks and labels match. The update is traced, and only the results to be checked are computed. A transformation
that cannot be tried, because it needs extra arguments or reads concrete values, gives no warning.
"""

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_mpo._codecs import codec, formats, masters
from optax_mpo._core import trees
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program import dataflow, jax_forms

_WEIGHT = 1 + 2.0**-7  # its ulp is large relative to it; at 1 the ulps above and below differ
_STEPS = [0, *(2**i for i in range(20))]  # steps at which schedules are tried: a warm-up starts with little decay

_FEW = 8  # kinds of operations

_trying: contextvars.ContextVar[bool] = contextvars.ContextVar("optax_mpo_trying", default=False)


def is_trying() -> bool:
  """Whether `warn_of_changes` is running. If so, `compensated` returns `tried_update(...)`."""
  return _trying.get()


def tried_update(params: PyTree, bits: PyTree) -> tuple[PyTree, PyTree]:
  """Returns an update of ones, for any gradients, and the bits plus one, so that they count updates."""
  return jax.tree.map(lambda leaf: jnp.ones_like(leaf, jnp.float32), params), jax.tree.map(lambda b: b + 1, bits)


def warn_of_lost_decay(inner: optax.GradientTransformation, params: PyTree, bits: int) -> None:
  """Warns if `inner` changes weights without a gradient (weight decay) by less than `bits` can hold."""
  leaves, treedef = jax.tree.flatten(params)
  first: dict[int, int] = {}  # one low-precision leaf per number of axes: vectors often have no decay
  for i, leaf in enumerate(leaves):
    if formats.is_low(leaf) and not formats.is_exact(leaf.dtype, bits):
      first.setdefault(leaf.ndim, i)
  if not first:
    return

  def updates(weights: list[jax.Array]) -> list[jax.Array]:
    tree = treedef.unflatten(weights)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    start = inner.init(tree)

    def made_at(step: jax.Array) -> list[jax.Array]:
      state = jax.tree.map(lambda x: jnp.full_like(x, step, x.dtype) if _is_counter(x) else x, start)
      made = treedef.flatten_up_to(inner.update(zeros, state, tree)[0])
      return [made[i] for i in first.values()]

    changes = jax.vmap(made_at)(jnp.asarray(_STEPS))
    kept = [
      formats.join(*formats.split(_WEIGHT + change, leaves[i].dtype, bits))
      for i, change in zip(first.values(), changes, strict=True)
    ]
    return [x for pair in zip(changes, kept, strict=True) for x in pair]

  tried = _tried(updates, [_tiny(x, _WEIGHT, np.float32) for x in leaves])
  for i, changes, kept in zip(first.values(), tried[::2], tried[1::2], strict=False):
    if not changes.any() or (kept != _WEIGHT).any():
      continue
    change = float(abs(changes).max())
    most = max(formats.widths(leaves[i].dtype))
    warnings.warn(
      f"compensated: without a gradient {trees.named_leaves(params)[i][0]} changes by at most {change:.1e} of itself "
      f"in a step (weight decay, say), and extra_bits={bits} with rounding='nearest' rounds that away: weights without "
      f"a gradient will not decay. Use {f'extra_bits={most}, ' if bits < most else ''}rounding='stochastic', or a "
      "larger product of learning rate and decay (docs/compact.md has the bound).",
      stacklevel=4,
    )
    return


def warn_of_changes(tx: optax.GradientTransformation, params: PyTree) -> None:
  """Warns if `tx` changes the updates of the `compensated` in it before they reach the params, of any size."""
  leaves, treedef = jax.tree.flatten(params)

  def updates(weights: list[jax.Array]) -> list[jax.Array]:
    tree = treedef.unflatten(weights)
    before, made = tx.init(tree), []
    for _ in range(2):  # twice: a moving average returns its first input unchanged
      update, after = tx.update(tree, before, tree)
      kept = (masters.kept_of(tree, state, "init") for state in (before, after))
      made += zip(treedef.flatten_up_to(update), map(_have_changed, *kept), strict=True)
      before = after
    return [x for pair in made for x in pair]

  with _flag():
    made = _tried(updates, [_tiny(x, 1.0) for x in leaves])
  for (name, leaf), u, stepped in zip(trees.named_leaves(params) * 2, made[::2], made[1::2], strict=False):
    as_it_was = (u == 1).all() or ((u == 0) & ~stepped).all()  # all zero: gradients are accumulated, for example
    if not formats.is_low(leaf) or as_it_was:
      continue
    warnings.warn(
      f"init: something around compensated changes its update of {name}, or holds it still, so that the bits it keeps "
      "belong to other weights than those that result. Put everything that changes updates inside: "
      "compensated(optax.chain(...)).",
      stacklevel=3,
    )
    return


def _have_changed(old: formats.Kept, new: formats.Kept) -> jax.Array:
  """Whether the bits of a leaf have changed: bool[1, ...], or bool[] where it has none."""
  old, new = (x.bits if isinstance(x, codec.ScaledBits) else x for x in (old, new))
  return jnp.zeros([], bool) if old is None else old != new


@contextlib.contextmanager
def _flag() -> Iterator[None]:
  token = _trying.set(True)
  try:
    yield
  finally:
    _trying.reset(token)


def _is_counter(x: PyTree) -> bool:
  if not trees.is_array(x) or x.shape not in ((), (1,)):  # in `per_layer` each layer has a counter
    return False
  return x.dtype == jnp.int32 if x.shape else jnp.issubdtype(x.dtype, jnp.integer)


def _tiny(leaf: jax.Array, value: float, dtype: DTypeLike | None = None) -> PyTree:
  if not trees.is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
    return leaf
  return np.full((1,) * leaf.ndim, value, dtype if formats.is_low(leaf) and dtype else leaf.dtype)


def _tried(updates: Callable[[list[jax.Array]], list[jax.Array]], weights: Values) -> list[np.ndarray]:
  """The values of `updates(weights)`, or an empty list if they cannot be computed."""
  try:
    program, _ = jax_forms.trace(updates, list(weights))
    given = [*program.constants.values(), *weights]
    names = [*program.constants, *program.inputs]
    operations = dataflow.slice_of(program, program.outputs, {*names})

    def run(given: list[jax.Array]) -> list[jax.Array]:
      env = dict(zip(names, given, strict=True))
      jax_forms.run(program, operations, env)
      return [jax_forms.value(a, env) for a in program.outputs]

    # JAX keeps programs of single operations; more of them than these compile faster as one.
    run = run if len({o.name for o in operations}) <= _FEW else jax.jit(run).lower(given).compile()
    with jax.ensure_compile_time_eval():  # also where `init` itself is traced
      return [np.asarray(x) for x in run(given)]
  except Exception:  # a transformation that cannot be tried may raise anything, and so may a traced learning rate
    return []
