"""Where a layer lies in a stack, also in a stack of stacks: read and written in place.

Why: a scan inside a scan has a layer of a layer. If the inner scan carried a slice of the stack, XLA would copy the
slice of the weight and of each state, forth and back. It carries the whole stacks, and a window moves over them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._core.annotations import Index, Shaped
from optax_mpo._program.entries import Entries


@dataclasses.dataclass(frozen=True)
class Window:
  """A part of an array.

  Attributes:
    starts: the first entry of each axis of the array, ints or i32[].
    sizes: the number of entries of each axis.
    axes: the axes of the array that the part has; the others have one entry, and are left out.
    exists: whether there is this part, bool[]; if not, nothing is written.
  """

  starts: tuple[Index, ...]
  sizes: tuple[int, ...]
  axes: tuple[int, ...]
  exists: jax.Array | bool = True

  @classmethod
  def whole(cls, array: Shaped) -> "Window":
    """All of an array."""
    return cls((0,) * array.ndim, tuple(array.shape), tuple(range(array.ndim)))

  @property
  def is_whole(self) -> bool:
    """Whether no layer was chosen yet."""
    return all(isinstance(start, int) for start in self.starts)

  def narrowed(self, entries: Entries, index: Index, count: int) -> "Window":
    """The layer at `index` of this part, of `count`; one entry alone loses its axis."""
    axis = self.axes[entries.axis]
    starts, sizes = list(self.starts), list(self.sizes)
    first, sizes[axis] = entries.first(index), entries.size
    starts[axis] = first if isinstance(starts[axis], int) and starts[axis] == 0 else starts[axis] + first
    axes = tuple(a for a in self.axes if a != axis) if entries.size == 1 else self.axes
    exists = [e for e in (self.exists, entries.exist(index, count)) if e is not True]
    return Window(tuple(starts), tuple(sizes), axes, functools.reduce(jnp.logical_and, exists) if exists else True)

  def read(self, array: jax.Array) -> jax.Array:
    """Returns this part of an array."""
    part = lax.dynamic_slice(array, self._indices(), self.sizes)
    return lax.squeeze(part, self._left_out())

  def write(self, array: jax.Array, part: jax.Array) -> jax.Array:
    """Returns the array with another value for this part."""
    if self.is_whole:
      return part
    if self.exists is not True:
      part = lax.select_n(self.exists, self.read(array), part)
    return lax.dynamic_update_slice(array, lax.expand_dims(part, self._left_out()), self._indices())

  def _left_out(self) -> tuple[int, ...]:
    return tuple(a for a in range(len(self.sizes)) if a not in self.axes)

  def _indices(self) -> list[jax.Array]:
    return [jnp.int32(start) if isinstance(start, int) else start for start in self.starts]
