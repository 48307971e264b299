"""The operation that steps a weight in the way that is best for the machine it is compiled for.

Why: what an update costs is memory traffic, and XLA makes more of it than there has to be: on a GPU where blocks of
state get their scales and where stacks of layers are written, on a CPU wherever a value is used more than once.

How: one JAX primitive, which on one CUDA GPU is a kernel (`gpu_kernel`), on one CPU a loop over a few rows at a time
(`cpu_rows`), and anywhere else, on several devices above all, the update as it is. All of them compute the same.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Primitive

from optax_mpo._backends import cpu_rows, gpu_kernel
from optax_mpo._core import order, primitives

Pure = Callable[[Any, Sequence[Any], Sequence[Any], Any, Sequence[Any]], Sequence[Any]]

_MOST_ARRAYS = 400  # of one launch: 8 bytes each of the 4096 that every driver takes, and some for Triton


def step(
  pure: Pure,
  grad: Any,
  stacks: Sequence[Any],
  shared: Sequence[Any],
  index: Any,
  waits: Sequence[Any] = (),
  *,
  kernel: gpu_kernel.Kernel | None = None,
  rows: cpu_rows.Rows | None = None,
) -> list[Any]:
  """Steps a weight, or the layer at `index` of a stack.

  Args:
    pure: `pure(grad, stacks, shared, index, waits)` does it anywhere.
    grad: the gradient, of one layer where the weight is a stack.
    stacks: the weight and its states.
    shared: the values that the step shares with others.
    index: i32[], which layer; 0 where there are none.
    waits: numbers that are to be there before, for `pure` and `rows`.
    kernel: does it on a GPU.
    rows: does it on a CPU.

  Returns:
    The new stacks. Their derivatives are those of `pure`.
  """
  operands = [index, grad, *stacks, *shared, *waits]
  params = {"pure": pure, "kernel": kernel, "rows": rows, "stacks": len(stacks), "waits": len(waits)}
  return _step.bind(*operands, **params)


def step_together(
  pures: Sequence[Pure], kernels: Sequence[gpu_kernel.Kernel], given: Sequence[gpu_kernel.Given]
) -> list[list[Any]]:
  """Steps small weights, on a GPU in as few launches as their number of arrays allows.

  Args:
    pures: how each of them is stepped anywhere, as for `step`.
    kernels: of each.
    given: of each the gradient; the weight and its states; the values that the step shares with others.

  Returns:
    For each the new weight and states. Their derivatives are those of `pures`.
  """
  results: list[list[Any]] = []
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


def _launches(kernels: Sequence[gpu_kernel.Kernel]) -> list[list[int]]:
  """Sorts kernels into launches, each of arrays whose addresses fit into what a kernel is given."""
  parts: list[list[int]] = []
  arrays = _MOST_ARRAYS
  for k, kernel in enumerate(kernels):
    arrays += kernel.arrays
    if arrays > _MOST_ARRAYS:
      parts.append([])
      arrays = kernel.arrays
    parts[-1].append(k)
  return parts


# --- Where it is asked for --------------------------------------------------------------------------------------------

_met: contextvars.ContextVar[list[None] | None] = contextvars.ContextVar("optax_mpo_met", default=None)


@contextlib.contextmanager
def left_out() -> Iterator[list[None]]:
  """Within it, updates are computed as they are. Yields a list that is not empty once something asked for kernels."""
  met: list[None] = []
  token = _met.set(met)
  try:
    yield met
  finally:
    _met.reset(token)


def asked() -> bool:
  """Asks for kernels; False where the operation is left out."""
  met = _met.get()
  if met is not None:
    met.append(None)
  return met is None


def is_left_out() -> bool:
  """Whether the operation is left out here."""
  return _met.get() is not None


# --- The operation ----------------------------------------------------------------------------------------------------


def _abstract(*avals: Any, stacks: int, **_: Any) -> Any:
  return list(avals[2 : 2 + stacks])


def _pure(*operands: Any, pure: Pure, stacks: int, waits: int, **_: Any) -> list[Any]:
  index, grad, *rest = operands
  end = len(rest) - waits
  return list(pure(grad, rest[:stacks], rest[stacks:end], index, rest[end:]))


def _by_kernel(*operands: Any, kernel: gpu_kernel.Kernel, stacks: int, waits: int, **_: Any) -> list[Any]:
  index, grad, *rest = operands
  (new,) = gpu_kernel.call([kernel], [(grad, rest[:stacks], rest[stacks : len(rest) - waits])], index)
  return new


def _by_rows(*operands: Any, rows: cpu_rows.Rows, stacks: int, waits: int, **params: Any) -> list[Any]:
  index, grad, *rest = operands
  try:
    end = len(rest) - waits
    at = order.after(index, rest[end:], count=0) if waits else index
    return rows.step(grad, rest[:stacks], rest[stacks:end], at)
  except cpu_rows.NotByRowsError:
    return _pure(*operands, stacks=stacks, waits=waits, **params)


def _each(operands: Sequence[Any], counts: Sequence[tuple[int, int]]) -> list[gpu_kernel.Given]:
  """What each of several weights is given."""
  given, rest = [], list(operands)
  for stacks, shared in counts:
    given.append((rest[0], rest[1 : 1 + stacks], rest[1 + stacks : 1 + stacks + shared]))
    rest = rest[1 + stacks + shared :]
  return given


def _abstract_together(*avals: Any, counts: Sequence[tuple[int, int]], **_: Any) -> list[Any]:
  return [x for _, stacks, _ in _each(avals, counts) for x in stacks]


def _pure_together(*operands: Any, pures: Sequence[Pure], counts: Any, **_: Any) -> list[Any]:
  given = _each(operands, counts)
  return [x for pure, g in zip(pures, given, strict=True) for x in pure(*g, jnp.int32(0), [])]


def _by_kernel_together(*operands: Any, kernels: Sequence[gpu_kernel.Kernel], counts: Any, **_: Any) -> list[Any]:
  return [x for new in gpu_kernel.call(kernels, _each(operands, counts), jnp.int32(0)) for x in new]


def _operation(
  name: str,
  abstract: Callable[..., list[Any]],
  pure: Callable[..., list[Any]],
  by_kernel: Callable[..., list[Any]],
  by_rows: Callable[..., list[Any]] | None = None,
) -> Primitive:
  """An operation that is `pure` wherever it is not better done by a kernel, on a GPU, or by rows, on a CPU."""

  def devices(context: Any) -> int | None:
    return getattr(context.module_context.axis_context, "num_devices", None)  # None inside of shard_map

  def anywhere(lower: Any, *_: Any, **__: Any) -> Any:
    return lower(pure)

  def on_cuda(lower: Any, context: Any, *_: Any, **params: Any) -> Any:
    if params.get("kernel", by_kernel) is None or not gpu_kernel.is_usable(devices(context)):
      return lower(pure)
    with gpu_kernel.lowering():
      return lower(by_kernel)

  def on_cpu(lower: Any, context: Any, *_: Any, **params: Any) -> Any:
    return lower(pure if by_rows is None or params["rows"] is None or devices(context) != 1 else by_rows)

  return primitives.make(name, abstract, pure, {None: anywhere, "cuda": on_cuda, "cpu": on_cpu})


_step = _operation("step_weight", _abstract, _pure, _by_kernel, _by_rows)
_together = _operation("step_weights", _abstract_together, _pure_together, _by_kernel_together)


def is_traced(values: Sequence[Any]) -> bool:
  """Whether any of the values is one of a trace, so that there is a program to put the operation in."""
  return any(isinstance(x, Tracer) for x in values)
