"""Where weights and states are read from and written to while a program runs, by the index of a site.

Why: the same plans run over a whole training state, over one layer of the stacks that a scan carries, and in a backward
pass that updates no weight, but makes sums of gradients.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import jax

from optax_mpo._core import types
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._stepping.plan import Released
from optax_mpo._stepping.site import Site, Step, apply_all
from optax_mpo._stepping.windows import Window
from optax_mpo._updates.group import Group

_Each = Sequence[Values]  # for each site
_Stacks = dict[int, list[jax.Array]]  # by site
_ByIndex = TypeVar("_ByIndex", list[jax.Array], dict[int, jax.Array])


class _Stepped:
  """Where weights and states are read from and written to, by the index of a site."""

  def get(self, index: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """The weights and states of a site."""
    raise NotImplementedError

  def put(self, index: int, params: Values, states: Values) -> None:
    """Replaces them."""
    raise NotImplementedError

  def stacks(self, index: int) -> tuple[list[jax.Array], list[Window]]:
    """The arrays that hold the weights, then the states of a site, and which part of each they are."""
    arrays = [x for values in self.get(index) for x in values]
    return arrays, [Window.whole(x) for x in arrays]

  def put_stacks(self, index: int, r: Released, arrays: list[jax.Array]) -> None:
    """Replaces these arrays, after a scan has updated the layers of `r` in them."""
    self.put(index, *r.layered.split(arrays))

  def step(self, indices: Sequence[int], steps: Sequence[Step], grads: _Each, shared: _Each) -> None:
    """Updates sites, each with its gradients and shared values."""
    taken = [(g, *self.get(index), s) for index, g, s in zip(indices, grads, shared, strict=True)]
    for index, new in zip(indices, apply_all(steps, taken), strict=True):
      self.put(index, *new)


class Whole(_Stepped, Generic[_ByIndex]):
  """The weights and the state during a training step."""

  def __init__(self, leaves: _ByIndex, states: _ByIndex, groups: Sequence[Group]):
    """Takes weights and states by index, in lists or dicts that are written, and the groups of a `by_leaf.Update`."""
    self.leaves, self.states, self._groups = leaves, states, groups

  def get(self, index: int) -> tuple[list[jax.Array], list[jax.Array]]:
    group = self._groups[index]
    return [self.leaves[i] for i in group.leaves], [self.states[j] for j in group.states]

  def put(self, index: int, params: Values, states: Values) -> None:
    group = self._groups[index]
    for i, value in zip(group.leaves, params, strict=True):
      self.leaves[i] = value
    for j, value in zip(group.states, states, strict=True):
      self.states[j] = value

  def held(self, index: int) -> PyTree:
    return self.get(index)

  def hold(self, index: int, values: PyTree) -> None:
    self.put(index, *values)


class Layer(_Stepped):
  """One layer of the stacks that a scan carries.

  Attributes:
    arrays: the stacks of weights and states, by the site in the program around the scan.
  """

  def __init__(self, released: Sequence[Released], arrays: _Stacks, outer: dict[int, list[Window]], index: jax.Array):
    self._released, self.arrays, self._outer, self._index = released, dict(arrays), outer, index
    self._ordered = 1

  def get(self, index: int) -> tuple[list[jax.Array], list[jax.Array]]:
    arrays, windows = self.stacks(index)
    return self._released[index].layered.split([w.read(x) for w, x in zip(windows, arrays, strict=True)])

  def put(self, index: int, params: Values, states: Values) -> None:
    arrays, windows = self.stacks(index)
    new = [w.write(x, y) for w, x, y in zip(windows, arrays, [*params, *states], strict=True)]
    self.arrays[self._released[index].index] = new

  def stacks(self, index: int) -> tuple[list[jax.Array], list[Window]]:
    r = self._released[index]
    return list(self.arrays[r.index]), r.layered.windows(self._outer[r.index], self._index)

  def put_stacks(self, index: int, r: Released, arrays: list[jax.Array]) -> None:
    self.arrays[self._released[index].index] = arrays

  def step(self, indices: Sequence[int], steps: Sequence[Step], grads: _Each, shared: _Each) -> None:
    for index, grad, known in zip(indices, grads, shared, strict=True):
      r = self._released[index]
      arrays, outer = self.arrays[r.index], self._outer[r.index]
      self.arrays[r.index] = r.layered.write(grad, arrays, outer, known[:-1], self._index, self._ordered)
      self._ordered += len(r.layered.parts)

  def held(self, index: int) -> PyTree:
    return self.arrays[self._released[index].index]

  def hold(self, index: int, values: PyTree) -> None:
    self.arrays[self._released[index].index] = values


class Parts(_Stepped):
  """What a backward pass that updates no weight makes of the gradients, from zeros or from values by site."""

  def __init__(self, sites: Sequence[Site], values: Sequence[list[jax.Array]] | None = None):
    zeros = [list(map(types.zeros, site.step.states)) for site in sites] if values is None else values
    self.values: list[list[jax.Array]] = list(zeros)

  def get(self, index: int) -> tuple[list[jax.Array], list[jax.Array]]:
    return [], self.values[index]

  def put(self, index: int, params: Values, states: Values) -> None:
    self.values[index] = list(states)

  def held(self, index: int) -> PyTree:
    return self.values[index]

  def hold(self, index: int, values: PyTree) -> None:
    self.values[index] = values


Store = Whole | Layer | Parts
