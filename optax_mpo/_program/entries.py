"""Where the layers of a stack lie in an array: which entries of which axis belong to each layer."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax

from optax_mpo._core.annotations import Index

_Index = TypeVar("_Index", int, jax.Array, Index)


class Entries(NamedTuple):
  """The entries of an axis that belong to a layer: `size` consecutive ones, from `start + stride * index` on.

  Stacks `[layers, ...]` have `Entries(0)`. In a stack that is reshaped to `[layers / 2, 2, ...]` before it is scanned,
  an iteration takes two entries, and one that is reversed has a negative stride. A stack that is scanned together with
  other layers has no entries for these: `without` counts them, first and last ones.
  """

  axis: int
  start: int = 0
  stride: int = 1
  size: int = 1
  without: tuple[int, int] = (0, 0)

  def first(self, index: _Index) -> _Index:
    """The first entry of the layer at `index`, i32[]."""
    scaled = index if self.stride == 1 else index * self.stride
    return scaled + self.start if self.start else scaled

  def layers(self, count: int) -> range:
    """Which of `count` layers have entries."""
    return range(self.without[0], count - self.without[1])

  def exist(self, index: Index, count: int) -> jax.Array | bool:
    """Whether the layer at `index`, i32[], has entries: bool[], or True where all have."""
    if self.without == (0, 0):
      return True
    layers = self.layers(count)
    return (index >= layers.start) & (index < layers.stop)

  def within(self, length: int, count: int) -> bool:
    """Whether those of `count` layers that have entries lie in an axis of `length`, and there are some."""
    ends = [self.first(i) for i in self.layers(count)[:: max(1, len(self.layers(count)) - 1)]]
    return bool(ends) and min(ends) >= 0 and max(ends) + self.size <= length

  def covered(self, count: int) -> set[int]:
    """All entries of `count` layers."""
    return {self.first(i) + k for i in self.layers(count) for k in range(self.size)}

  def cut(self, start: int, limit: int, count: int) -> "Entries | None":
    """Where those layers lie that are in this part of the axis; None if it has only some entries of a layer."""
    layers = [i for i in self.layers(count) if start < self.first(i) + self.size and self.first(i) < limit]
    if any(self.first(i) < start or self.first(i) + self.size > limit for i in layers):
      return None
    without = (layers[0], count - 1 - layers[-1]) if layers else (count, 0)
    return self._replace(start=self.start - start, without=without)

  def on(self, axis: int) -> "Entries":
    """The same entries of another axis."""
    return self._replace(axis=axis)

  def spread(self, start: int, step: int) -> "Entries":
    """Where they lie once entry `i` of the axis is entry `start + step * i`."""
    return self._replace(start=start + step * self.start, stride=step * self.stride)

  def reversed(self, length: int) -> "Entries":
    """Where they lie once an axis of this length is reversed."""
    return self._replace(start=length - self.size - self.start, stride=-self.stride)

  def reshaped(self, old: Sequence[int], new: Sequence[int]) -> "Entries | None":
    """Where they lie after a reshape, which may keep their axis, join it with axes after it, or split it."""
    before, length = math.prod(old[: self.axis]), old[self.axis]
    starts = [i for i in range(len(new)) if math.prod(new[:i]) == before]
    if self.size < length:  # an only layer may also be the entry of an axis of one before it
      starts.sort(key=lambda i: new[i] != length)
    found = (self._resized(i, length, new[i]) for i in starts)
    return next((e for e in found if e is not None), None)

  def _resized(self, axis: int, old: int, new: int) -> "Entries | None":
    """Where they lie once their axis of `old` entries, and those after it, are reshaped to one of `new` and others."""
    if new >= old:
      factor, rest = divmod(new, old)
      found = [part * factor for part in (self.start, self.stride, self.size)]
      return None if rest else Entries(axis, found[0], found[1], found[2], self.without)
    factor, rest = divmod(old, new)
    if rest or any(part % factor for part in self[1:4]):
      return None
    return Entries(axis, self.start // factor, self.stride // factor, self.size // factor, self.without)


class NotSeparableError(Exception):
  """An update of stacked layers that cannot be run for one layer alone. The message names the operation."""


Where = Entries | None  # None: the array does not depend on the layer
