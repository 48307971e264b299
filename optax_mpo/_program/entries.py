"""Where a layer lies in an array that has the entries of all layers along one axis."""

from typing import Any, NamedTuple


class Entries(NamedTuple):
  """The entries of an axis that belong to a layer: `size` consecutive ones, from `start + stride * index` on.

  Stacks `[layers, ...]` have `Entries(0)`. In a stack that is reshaped to `[layers / 2, 2, ...]` before it is scanned,
  an iteration takes two entries, and one that is reversed has a negative stride.
  """

  axis: int
  start: int = 0
  stride: int = 1
  size: int = 1

  def first(self, index: Any) -> Any:
    """The first entry of the layer at `index`, i32[]."""
    scaled = index if self.stride == 1 else index * self.stride
    return scaled + self.start if self.start else scaled

  def within(self, length: int, count: int) -> bool:
    """Whether all of `count` layers lie in an axis of `length`."""
    ends = (self.start, self.start + self.stride * (count - 1))
    return min(ends) >= 0 and max(ends) + self.size <= length

  def covered(self, count: int) -> set[int]:
    """All entries of `count` layers."""
    return {self.start + self.stride * i + k for i in range(count) for k in range(self.size)}

  def on(self, axis: int) -> "Entries":
    """The same entries of another axis."""
    return self._replace(axis=axis)

  def spread(self, start: int, step: int) -> "Entries":
    """Where they lie once entry `i` of the axis is entry `start + step * i`."""
    return self._replace(start=start + step * self.start, stride=step * self.stride)

  def reversed(self, length: int) -> "Entries":
    """Where they lie once an axis of this length is reversed."""
    return self._replace(start=length - self.size - self.start, stride=-self.stride)


class NotSeparableError(Exception):
  """An update of stacked layers that cannot be run for one layer alone. The message names the operation."""


Where = Entries | None  # None: the array does not depend on the layer
