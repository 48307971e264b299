"""The primitive that updates a weight with the best backend for the machine it is compiled for.

Why: an update costs memory traffic, and XLA makes more of it than needed: on a GPU where blocks of state get their
scales and where stacks of layers are written, on a CPU wherever a value is used more than once.

How: one JAX primitive. On one CUDA GPU it becomes a kernel (`gpu_kernel`), on one CPU a loop over a few rows at a time
(`cpu_rows`), anywhere else, above all on several devices, the plain update. All of them compute the same.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.interpreters import mlir

from optax_mpo._backends import cpu_rows, gpu_kernel, kernel_launch
from optax_mpo._backends.backend import Backend
from optax_mpo._core import primitives
from optax_mpo._core.annotations import Shaped, Values

Pure = Callable[[jax.Array, Values, Values, jax.Array], Values]
Kernels = Sequence[gpu_kernel.Kernel]
Counts = Sequence[tuple[int, int]]  # for each weight the number of its stacks, and of the values that it shares
T = TypeVar("T")

_MOST_ARRAYS = 400  # in one launch: 8 bytes each, of the 4096 that every driver takes, with some left for Triton


def step(
  pure: Pure, backend: Backend, grad: jax.Array, stacks: Values, shared: Values, index: jax.Array
) -> list[jax.Array]:
  """Updates a weight, or the layer at `index` of a stack.

  Args:
    pure: `pure(grad, stacks, shared, index)` is the plain update, which runs anywhere.
    backend: the same by a kernel, on a GPU, and by rows, on a CPU, where there are any.
    grad: the gradient; of one layer where the weight is a stack.
    stacks: the weight and its states.
    shared: the values that the update shares with others.
    index: i32[], which layer; 0 where there are none.

  Returns:
    The new stacks. Their derivatives are those of `pure`.
  """
  return _step.bind(index, grad, *stacks, *shared, pure=pure, backend=backend, stacks=len(stacks))


def step_together(pures: Sequence[Pure], kernels: Kernels, given: Sequence[gpu_kernel.Given]) -> list[list[jax.Array]]:
  """Updates small weights; on a GPU in as few launches as their number of arrays allows.

  Args:
    pures: the plain update of each weight, as for `step`.
    kernels: the kernel of each weight.
    given: for each weight the gradient; the weight and its states; the values that its update shares with others.

  Returns:
    For each weight the new weight and states. Their derivatives are those of `pures`.
  """
  results: list[list[jax.Array]] = []
  for part in _launches(kernels):
    operands = [x for k in part for x in (given[k][0], *given[k][1], *given[k][2])]
    new = _together.bind(
      *operands,
      pures=tuple(pures[k] for k in part),
      kernels=tuple(kernels[k] for k in part),
      counts=tuple((len(given[k][1]), len(given[k][2])) for k in part),
    )
    for k in part:
      results.append(new[: len(given[k][1])])
      new = new[len(given[k][1]) :]
  return results


def _launches(kernels: Kernels) -> list[list[int]]:
  """Sorts kernels into launches, so that the addresses of each launch's arrays fit into a kernel's arguments."""
  parts: list[list[int]] = []
  arrays = _MOST_ARRAYS
  for k, kernel in enumerate(kernels):
    arrays += kernel.arrays
    if arrays > _MOST_ARRAYS:
      parts.append([])
      arrays = kernel.arrays
    parts[-1].append(k)
  return parts


# --- Requests for kernels ---------------------------------------------------------------------------------------------

_met: contextvars.ContextVar[list[None] | None] = contextvars.ContextVar("optax_mpo_met", default=None)


@contextlib.contextmanager
def left_out() -> Iterator[list[None]]:
  """A context without the primitive: updates stay plain. Yields a list, filled once something asks for kernels."""
  met: list[None] = []
  token = _met.set(met)
  try:
    yield met
  finally:
    _met.reset(token)


def asked() -> bool:
  """Asks for kernels. Returns False where the primitive is left out."""
  met = _met.get()
  if met is not None:
    met.append(None)
  return met is None


def is_better_by_rows(elements: int) -> bool:
  """Whether this is a CPU, whose XLA is slow to update 8-bit state of so many elements in one piece."""
  return _met.get() is None and jax.default_backend() == "cpu" and elements >= cpu_rows.ELEMENTS


# --- The primitive ----------------------------------------------------------------------------------------------------


def _abstract(*avals: Shaped, stacks: int, **_: object) -> list[Shaped]:
  return list(avals[2 : 2 + stacks])


def _pure(*operands: jax.Array, pure: Pure, stacks: int, **_: object) -> list[jax.Array]:
  index, grad, *rest = operands
  return list(pure(grad, rest[:stacks], rest[stacks:], index))


def _by_kernel(
  *operands: jax.Array, backend: Backend, stacks: int, language: kernel_launch.Language, **_: object
) -> list[jax.Array]:
  index, grad, *rest = operands
  assert backend.kernel is not None
  (new,) = kernel_launch.call([backend.kernel], [(grad, rest[:stacks], rest[stacks:])], index, language)
  return new


def _by_rows(*operands: jax.Array, backend: Backend, stacks: int, **params: Any) -> list[jax.Array]:
  index, grad, *rest = operands
  assert backend.rows is not None
  try:
    return backend.rows.step(grad, rest[:stacks], rest[stacks:], index)
  except cpu_rows.NotByRowsError:
    return _pure(*operands, stacks=stacks, **params)


def _each(operands: Sequence[T], counts: Counts) -> list[tuple[T, Sequence[T], Sequence[T]]]:
  """Splits the operands into what each of several weights needs."""
  given, rest = [], list(operands)
  for stacks, shared in counts:
    given.append((rest[0], rest[1 : 1 + stacks], rest[1 + stacks : 1 + stacks + shared]))
    rest = rest[1 + stacks + shared :]
  return given


def _abstract_together(*avals: Shaped, counts: Counts, **_: object) -> list[Shaped]:
  return [x for _, stacks, _ in _each(avals, counts) for x in stacks]


def _pure_together(*operands: jax.Array, pures: Sequence[Pure], counts: Counts, **_: object) -> list[jax.Array]:
  given = _each(operands, counts)
  return [x for pure, g in zip(pures, given, strict=True) for x in pure(*g, jnp.int32(0))]


def _by_kernel_together(
  *operands: jax.Array, kernels: Kernels, counts: Counts, language: kernel_launch.Language, **_: object
) -> list[jax.Array]:
  return [x for new in kernel_launch.call(kernels, _each(operands, counts), jnp.int32(0), language) for x in new]


def _devices(context: mlir.LoweringRuleContext) -> int | None:
  return getattr(context.module_context.axis_context, "num_devices", None)  # None inside of shard_map


def _anywhere(pure: Callable[..., list[jax.Array]]) -> primitives.Lowering:
  return lambda lower, *_, **__: lower(pure)


def _on_cuda(pure: Callable[..., list[jax.Array]], by_kernel: Callable[..., list[jax.Array]]) -> primitives.Lowering:
  def lowering(
    lower: primitives.Lower,
    context: mlir.LoweringRuleContext,
    *_: object,
    backend: Backend | None = None,
    kernels: Kernels = (),
    **__: object,
  ) -> primitives.IrValues:
    if backend is not None:
      kernels = [backend.kernel] if backend.kernel is not None else []
    language = kernel_launch.chosen(kernels, _devices(context)) if kernels else None
    if language is None:
      return lower(pure)
    with kernel_launch.lowering():
      return lower(functools.partial(by_kernel, language=language))

  return lowering


def _on_cpu(
  lower: primitives.Lower, context: mlir.LoweringRuleContext, *_: object, backend: Backend, **__: object
) -> primitives.IrValues:
  return lower(_pure if backend.rows is None or _devices(context) != 1 else _by_rows)


_step = primitives.make(
  "step_weight", _abstract, _pure, {None: _anywhere(_pure), "cuda": _on_cuda(_pure, _by_kernel), "cpu": _on_cpu}
)
_together = primitives.make(
  "step_weights",
  _abstract_together,
  _pure_together,
  {None: _anywhere(_pure_together), "cuda": _on_cuda(_pure_together, _by_kernel_together)},
)


def is_traced(values: Values) -> bool:
  """Whether any of the values is traced, so that there is a program to put the primitive into."""
  return any(isinstance(x, Tracer) for x in values)
