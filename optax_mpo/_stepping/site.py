"""How leaves are updated: a stack of layers as a whole, or one layer of it.

Why: Optax updates the whole stack at once, but a scan completes the gradient of one layer at a time.

How: `by_layer` makes the update of one layer from that of the stack. It takes the operations that lead from what the
scan stacks to the gradient, and those of the update. The layer axis of a weight is that of its gradient.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo._backends import step_weight
from optax_mpo._backends.backend import Backend, of_weights
from optax_mpo._core import host, types, xla_cpu
from optax_mpo._core.annotations import Index, Values
from optax_mpo._program.program import Atom
from optax_mpo._updates.group import Group

HELD = 2**14
"""The most elements of a gradient that may be kept for a later update; in a scan, of one layer's gradient."""

_SHARE = 256  # small stacks may have 1 in this many of the elements that a scan updates


@dataclasses.dataclass(frozen=True, repr=False)  # jaxprs print it
class Step:
  """How the leaves of a site are updated.

  Attributes:
    run: `run(grads, params, states, shared) -> (params, states)`.
    grads: the shapes of the gradients, as ShapeDtypeStructs.
    params: likewise, of the weights.
    states: likewise, of the states.
    shared: likewise, of the values that the update shares with others.
    backend: how they may be updated other than by XLA.
  """

  run: Callable[[Values, Values, Values, Values], tuple[list[jax.Array], list[jax.Array]]]
  grads: tuple[jax.ShapeDtypeStruct, ...]
  params: tuple[jax.ShapeDtypeStruct, ...]
  states: tuple[jax.ShapeDtypeStruct, ...]
  shared: tuple[jax.ShapeDtypeStruct, ...]
  backend: Backend = dataclasses.field(default_factory=Backend)

  def apply(
    self, grads: Values, params: Values, states: Values, shared: Values
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Updates the leaves as `run` does, with the best backend for the machine."""
    if not self.backend.is_special:
      return self.run(grads, params, states, shared)
    grad = xla_cpu.laid_out(grads[0])
    new = step_weight.step(self.pure, self.backend, grad, [*params, *states], shared, jnp.int32(0))
    return new[: len(params)], new[len(params) :]

  def pure(self, grad: jax.Array, stacks: Values, shared: Values, index: Index) -> list[jax.Array]:
    """Updates the only leaf with XLA's operations, for `step_weight`."""
    params, states = self.run([grad], stacks[: len(self.params)], stacks[len(self.params) :], shared)
    return [*params, *states]


Taken = tuple[Values, Values, Values, Values]  # the gradients, weights, states and shared values of a step


def apply_all(steps: Sequence[Step], taken: Sequence[Taken]) -> list[tuple[list[jax.Array], list[jax.Array]]]:
  """Does several steps. Small weights are updated together, all others by `Step.apply`."""
  small = [(k, kernel) for k, step in enumerate(steps) if (kernel := step.backend.together) is not None]
  if len(small) < 2:
    return [step.apply(*t) for step, t in zip(steps, taken, strict=True)]
  given = [(grad, [*params, *states], shared) for (grad,), params, states, shared in (taken[k] for k, _ in small)]
  stepped = step_weight.step_together([steps[k].pure for k, _ in small], [kernel for _, kernel in small], given)
  new = {k: (result[:1], result[1:]) for (k, _), result in zip(small, stepped, strict=True)}
  return [new[k] if k in new else step.apply(*taken[k]) for k, step in enumerate(steps)]


class Place(enum.StrEnum):
  """Where a weight is updated, as `explain` says it."""

  UNKNOWN = ""
  IN_SCAN = "in scan"
  IN_SCAN_BY_KERNEL = "in scan, by a kernel"
  AFTER_SCAN = "after the scan"
  AT_ONCE = "at once"
  AT_ONCE_BY_KERNEL = "at once, by a kernel"
  TOGETHER = "together"
  AT_END = "at the end"
  BETWEEN_PASSES = "between the passes"
  WITH_ZERO_GRADIENT = "with a zero gradient"
  WITHOUT_GRADIENT = "without a gradient"


@dataclasses.dataclass
class Site:
  """Leaves that are updated together, in one program.

  Attributes:
    leaves: which leaves of the params.
    grads: the atoms of the gradients that the update reads.
    params: for each leaf, the variables that hold its weight, if the update writes it.
    step: how they are updated. Its `shared` are the values that come from outside the site.
    reads: other variables that are read for the last time before the update, so that they take no memory beside it.
    place: where they are updated.
    why: the reason, unless this is the best place.
  """

  leaves: tuple[int, ...]
  grads: tuple[Atom, ...]
  params: tuple[tuple[int, ...], ...]
  step: Step
  reads: tuple[int, ...] = ()
  place: Place = Place.UNKNOWN
  why: str = ""

  def put(self, place: Place, why: str = "") -> None:
    """Sets the place and the reason."""
    self.place, self.why = place, why


def small_stacks(sizes: Sequence[int], length: int) -> set[int]:
  """Finds small stacks of layers. They are updated whole after a scan, since inside it each layer takes launches.

  Args:
    sizes: the elements of each stack.
    length: the number of layers.

  Returns:
    The positions of the small ones, such as biases and norms. All of their gradients together take next to no memory.
  """
  left, found = sum(sizes) // _SHARE, set()
  for k in sorted(range(len(sizes)), key=lambda k: sizes[k]):
    left -= sizes[k]
    if left < 0 or sizes[k] > HELD * length:
      break
    found.add(k)
  return found


def of_groups(groups: Sequence[Group], grads: Any, weights: Any, kernels: bool = False) -> list[Site]:
  """Makes sites for groups of a `by_leaf.Update`, with the atoms of gradients and variables of weights, by leaf."""
  sites = []
  for group in groups:
    count, avals = len(group.leaves), [group.program.aval(v) for v in (*group.inputs, *group.shared)]
    structs = [types.struct(a) for a in avals]
    step = Step(
      group.step,
      tuple(structs[:count]),
      tuple(structs[count : 2 * count]),
      tuple(structs[2 * count : len(group.inputs)]),
      tuple(structs[len(group.inputs) :]),
      backend=Backend() if any(map(host.is_on_host, avals)) else of_weights(group.update, count, kernels),
    )
    sites.append(
      Site(group.leaves, tuple(grads[i] for i in group.leaves), tuple((weights[i],) for i in group.leaves), step)
    )
  return sites
