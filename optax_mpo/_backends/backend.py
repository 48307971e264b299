"""Chooses how an update may run other than as XLA's own program: by a kernel on a GPU, by rows on a CPU.

Why: which machine a program is for is known only when it is lowered. Whether a kernel or rows can compute an update is
known when it is traced, and depends on the update alone.

How: a `Backend` holds what there is for one weight. `step_weight` lowers it. Everything else passes it on.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from optax_mpo._backends import cpu_rows, gpu_kernel
from optax_mpo._core import order
from optax_mpo._core.annotations import Shaped
from optax_mpo._program.elements import NotElementwiseError
from optax_mpo._program.entries import Entries
from optax_mpo._program.program import Slice


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Backend:
  """How one weight, or one layer of a stack, may be updated other than by XLA.

  Attributes:
    kernels: whether kernels of our own are allowed, by `with_kernels`.
    kernel: the update on one CUDA GPU, where it moves fewer bytes than XLA's.
    together: the update of a small weight in one launch with others; the launch is most of its cost.
    rows: the update on one CPU, a few rows at a time.
    no_kernel: why there is no kernel, where they are allowed.
  """

  kernels: bool = False
  kernel: gpu_kernel.Kernel | None = None
  together: gpu_kernel.Kernel | None = None
  rows: cpu_rows.Rows | None = None
  no_kernel: str = ""

  @property
  def is_special(self) -> bool:
    """Whether some machine has a better way than XLA's."""
    return self.kernel is not None or self.rows is not None

  def __repr__(self) -> str:  # short, since it stands in jaxprs
    return " and ".join(["kernel"] * bool(self.kernel) + ["rows"] * bool(self.rows)) or "XLA"


def of_weights(update: Slice, count: int, kernels: bool) -> Backend:
  """The backend of an update of `count` weights, outside of a scan over layers.

  XLA updates a weight that is not a stack of layers with one kernel, unless blocks of its state get new scales. So a
  kernel of our own is for those, and for small weights together.
  """
  if count != 1:
    return Backend(kernels)
  kernel, _ = _kernel_of(update, stacked=False) if kernels else (None, "")
  in_blocks = kernel is not None and bool(kernel.elements.block)
  return Backend(
    kernels,
    kernel=kernel if in_blocks else None,
    together=None if in_blocks or update.weight.size > order.SMALL else kernel,
    rows=cpu_rows.of_weight(update),
  )


def of_layers(
  update: Slice,
  entries: Sequence[Entries],
  kernels: bool,
  one: Callable[..., list[jax.Array]],
  avals: Sequence[Shaped],
  shared: Sequence[Shaped],
) -> Backend:
  """The backend of an update of one layer of stacks.

  Args:
    update: updates the whole stack.
    entries: where a layer lies in the weight and the states.
    kernels: whether kernels are allowed.
    one: `one(gradient, weight, *states, *shared)` returns the new weight and states of one layer.
    avals: the shapes of the gradients, weights and states of one layer.
    shared: the shapes of the other values that the update reads; the last one is the index of the layer.
  """
  single = len(update.inputs) == len(update.outputs) + 1 and all(e == Entries(0) for e in entries)
  no_kernel = "no kernel: its layers do not lie one by one along the first axis, or its update takes several gradients"
  kernel, why = _kernel_of(update, stacked=True) if single and kernels else (None, no_kernel)
  rows = cpu_rows.of_layer(one, avals, shared) if single else None
  return Backend(kernels, kernel=kernel, rows=rows, no_kernel=why if kernels else "")


def _kernel_of(update: Slice, stacked: bool) -> tuple[gpu_kernel.Kernel | None, str]:
  """Returns the kernel of an update, or None and why there is none."""
  try:
    return gpu_kernel.make(update, stacked), ""
  except NotElementwiseError as error:
    return None, f"no kernel: {error}"
