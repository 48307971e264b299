"""The operation that steps a weight in the way that is best for the machine it is compiled for.

Why: what an update costs is memory traffic, and XLA makes more of it than there has to be: on a GPU where blocks of
state get their scales and where stacks of layers are written, on a CPU wherever a value is used more than once.

How: one JAX primitive, which on one CUDA GPU is a kernel (`_kernel`), on one CPU a loop over a few rows at a time
(`_rows`), and anywhere else, on several devices above all, the update as it is. All of them compute the same.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from optax_mpo import _kernel, _rows

Pure = Callable[[Any, Sequence[Any], Sequence[Any], Any, Sequence[Any]], Sequence[Any]]


def step(
  pure: Pure,
  grad: Any,
  stacks: Sequence[Any],
  shared: Sequence[Any],
  index: Any,
  waits: Sequence[Any] = (),
  *,
  kernel: _kernel.Kernel | None = None,
  rows: _rows.Rows | None = None,
) -> list[Any]:
  """Steps a weight, or the layer at `index` of a stack.

  Args:
    pure: `pure(grad, stacks, shared, index, waits)` does it anywhere.
    grad: the gradient, of one layer where the weight is a stack.
    stacks: the weight and its states.
    shared: the values that the step shares with others.
    index: i32[], which layer; 0 where there are none.
    waits: numbers that are to be there before, for `pure`.
    kernel: does it on a GPU.
    rows: does it on a CPU.

  Returns:
    The new stacks. They have no derivatives.
  """
  operands = [index, grad, *stacks, *shared, *waits]
  params = {"pure": pure, "kernel": kernel, "rows": rows, "stacks": len(stacks), "waits": len(waits)}
  return _step.bind(*operands, **params)


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


def _by_kernel(*operands: Any, kernel: _kernel.Kernel, stacks: int, waits: int, **_: Any) -> list[Any]:
  index, grad, *rest = operands
  return kernel.call(index, grad, rest[:stacks], rest[stacks : len(rest) - waits])


def _by_rows(*operands: Any, rows: _rows.Rows, stacks: int, waits: int, **params: Any) -> list[Any]:
  _, grad, *rest = operands
  try:
    return rows.step(grad, rest[:stacks], rest[stacks : len(rest) - waits])
  except _rows.NotByRowsError:
    return _pure(*operands, stacks=stacks, waits=waits, **params)


def _devices(context: Any) -> int | None:
  return getattr(context.module_context.axis_context, "num_devices", None)  # None inside of shard_map


def _lower(context: Any, *operands: Any, **params: Any) -> Any:
  return mlir.lower_fun(_pure, multiple_results=True)(context, *operands, **params)


def _lower_cuda(context: Any, *operands: Any, **params: Any) -> Any:
  if params["kernel"] is None or not _kernel.is_usable(_devices(context)):
    return _lower(context, *operands, **params)
  with _kernel.lowering():
    return mlir.lower_fun(_by_kernel, multiple_results=True)(context, *operands, **params)


def _lower_cpu(context: Any, *operands: Any, **params: Any) -> Any:
  if params["rows"] is None or _devices(context) != 1:
    return _lower(context, *operands, **params)
  return mlir.lower_fun(_by_rows, multiple_results=True)(context, *operands, **params)


def _batch(operands: Any, axes: Any, **params: Any) -> Any:
  results = jax.vmap(functools.partial(_pure, **params), in_axes=axes)(*operands)
  return results, [0] * len(results)


_step = Primitive("step_weight")
_step.multiple_results = True
_step.def_abstract_eval(_abstract)
_step.def_impl(_pure)
batching.primitive_batchers[_step] = _batch
mlir.register_lowering(_step, _lower)
mlir.register_lowering(_step, _lower_cuda, platform="cuda")
mlir.register_lowering(_step, _lower_cpu, platform="cpu")


def is_traced(values: Sequence[Any]) -> bool:
  """Whether any of the values is one of a trace, so that there is a program to put the operation in."""
  return any(isinstance(x, Tracer) for x in values)
