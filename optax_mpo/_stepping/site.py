"""How leaves are updated: a stack of layers as a whole, or one layer of it.

Why: Optax updates the whole stack at once, but a scan completes the gradient of one layer at a time.

How: `by_layer` makes the update of one layer from that of the stack. It takes the operations that lead from what the
scan stacks to the gradient, and those of the update. The layer axis of a weight is that of its gradient.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._backends import step_weight
from optax_mpo._backends.backend import Backend, of_layers, of_weights
from optax_mpo._core import order, types, xla_cpu
from optax_mpo._program import by_layer, jax_forms
from optax_mpo._program.program import Atom, Program, Slice

Values = Sequence[Any]

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
    layered: makes the step of one layer of a stack, as `layer_step` does; None for `layer_step`.
    backend: how they may be updated other than by XLA.
  """

  run: Callable[[Values, Values, Values, Values], tuple[list[Any], list[Any]]]
  grads: tuple[Any, ...]
  params: tuple[Any, ...]
  states: tuple[Any, ...]
  shared: tuple[Any, ...]
  layered: Callable[..., "Layered"] | None = None
  backend: Backend = dataclasses.field(default_factory=Backend)

  def apply(self, grads: Values, params: Values, states: Values, shared: Values) -> tuple[list[Any], list[Any]]:
    """Updates the leaves as `run` does, with the best backend for the machine."""
    if not self.backend.is_special:
      return self.run(grads, params, states, shared)
    grad = xla_cpu.laid_out(grads[0])
    new = step_weight.step(self.pure, self.backend, grad, [*params, *states], shared, jnp.int32(0))
    return new[: len(params)], new[len(params) :]

  def pure(self, grad: Any, stacks: Values, shared: Values, index: Any) -> list[Any]:
    """Updates the only leaf with XLA's operations, for `step_weight`."""
    params, states = self.run([grad], stacks[: len(self.params)], stacks[len(self.params) :], shared)
    return [*params, *states]


Taken = tuple[Values, Values, Values, Values]  # the gradients, weights, states and shared values of a step


def apply_all(steps: Sequence[Step], taken: Sequence[Taken]) -> list[tuple[list[Any], list[Any]]]:
  """Does several steps. Small weights are updated together, all others by `Step.apply`."""
  small = [(k, kernel) for k, step in enumerate(steps) if (kernel := step.backend.together) is not None]
  if len(small) < 2:
    return [step.apply(*t) for step, t in zip(steps, taken, strict=True)]
  given = [(grad, [*params, *states], shared) for (grad,), params, states, shared in (taken[k] for k, _ in small)]
  stepped = step_weight.step_together([steps[k].pure for k, _ in small], [kernel for _, kernel in small], given)
  new = {k: (result[:1], result[1:]) for (k, _), result in zip(small, stepped, strict=True)}
  return [new[k] if k in new else step.apply(*taken[k]) for k, step in enumerate(steps)]


@dataclasses.dataclass(frozen=True)
class Layered:
  """The step of one layer.

  Attributes:
    step: updates the layer. Its `shared` are those of the stack's step, the other given values, and the layer's index.
    param_axes: the layer axis of each weight.
    state_axes: the layer axis of each state.
    finish: None where the new states of the layers, stacked, are the new state. Otherwise the states of the layers
      start as zeros, and `finish(states, shared)` makes the new state of the stack from them.
    parts: the same update in parts, each written before the next one reads. `part(grads, params, states, shared)` makes
      new values; their positions among weights, then states, stand beside it. Empty: in one part.
    backend: how the layer may be updated other than by XLA.
  """

  step: Step
  param_axes: tuple[int, ...]
  state_axes: tuple[int, ...]
  finish: Callable[[Values, Values], list[Any]] | None = None
  parts: tuple[tuple[Callable[[Values, Values, Values, Values], list[Any]], tuple[int, ...]], ...] = ()
  backend: Backend = dataclasses.field(default_factory=Backend)

  def write(self, grads: Values, stacks: Values, shared: Values, index: Any, count: int) -> list[Any]:
    """Updates the layer at `index` of stacks of weights and states, and returns the stacks.

    Args:
      grads: the gradients of the layer.
      stacks: the weights, then the states.
      shared: the values that the update shares with others, without the index.
      index: i32[], which layer.
      count: a different number for each update of the layer; the next one may use `count + len(parts)`.
    """
    if not self.backend.is_special:
      return self._write(grads, stacks, shared, index, count)

    def pure(grad: Any, stacks: Values, shared: Values, index: Any) -> list[Any]:
      return self._write([grad], stacks, shared, index, count)

    return step_weight.step(pure, self.backend, grads[0], stacks, shared, index)

  def _write(self, grads: Values, stacks: Values, shared: Values, index: Any, count: int) -> list[Any]:
    stacks, axes, first = list(stacks), (*self.param_axes, *self.state_axes), len(self.param_axes)

    def layer(at: Any) -> tuple[list[Any], list[Any]]:
      values = [lax.dynamic_index_in_dim(s, at, a, False) for s, a in zip(stacks, axes, strict=True)]
      return values[:first], values[first:]

    def put(places: Iterable[int], values: Values, at: Any) -> list[Any]:
      for place, value in zip(places, values, strict=True):
        stacks[place] = lax.dynamic_update_index_in_dim(stacks[place], value, at, axes[place])
      return [stacks[place] for place in places]

    if not self.parts:
      params, states = self.step.run(grads, *layer(index), [*shared, index])
      put(range(len(stacks)), [*params, *states], index)
    done = grads
    for k, (run, places) in enumerate(self.parts):
      at = order.after(index, order.first_elements(done), count + k)
      done = put(places, run(grads, *layer(at), [*shared, at]), at)
    return stacks


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
    params: for each leaf, the variables that hold its weight.
    step: how they are updated. Its `shared` are the values that come from outside the site.
    place: where they are updated.
    why: the reason, unless this is the best place.
  """

  leaves: tuple[int, ...]
  grads: tuple[Atom, ...]
  params: tuple[tuple[int, ...], ...]
  step: Step
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


def layer_step(
  step: Step,
  post: Callable[[Values, Values], list[Any]],
  stacks: Sequence[Any],
  given: Sequence[Any],
  length: int,
) -> Layered:
  """Makes the step of one layer from that of a stack.

  Args:
    step: updates the stack.
    post: `post(stacks, given)` makes the gradients that `step` takes from what the scan stacks along axis 0.
    stacks: the shapes of what the scan stacks.
    given: the shapes of the other values that `post` takes.
    length: the number of layers.

  Raises:
    NotSeparableError: where a layer cannot be updated alone.
  """
  # The layer axis of a weight is that of its gradient.
  before, _ = jax_forms.trace(post, list(stacks), list(given))
  found: list[int | None] = []

  def grads_of(index: Any, layers: Values, values: Values) -> list[Any]:
    env, axes = _layers(before, before.inputs, [*layers, *values], [0] * len(stacks) + [None] * len(given))
    by_layer.run(before.operations, before, env, axes, index, length)
    found[:] = [axes.get(a) if isinstance(a, int) else None for a in before.outputs]
    return []

  number = jax.ShapeDtypeStruct((), jnp.int32)
  jax.eval_shape(grads_of, number, [types.struct(s, 0) for s in stacks], list(given))
  param_axes = []
  for axis, param in zip(found, step.params, strict=False):
    if axis is None or axis >= len(param.shape) or param.shape[axis] != length:
      raise by_layer.NotSeparableError("its gradient has no axis of layers")
    param_axes.append(axis)
  if len(param_axes) != len(step.params) or len(found) != len(step.params):
    raise by_layer.NotSeparableError("its gradient is made of several")
  state_axes = []
  for state in step.states:
    axis = next((a for p, a in zip(step.params, param_axes, strict=True) if p.shape == state.shape), 0)
    if axis >= len(state.shape) or state.shape[axis] != length:
      raise by_layer.NotSeparableError(
        f"its state has an array of shape {list(state.shape)}, with no entry for each of the {length} layers"
      )
    state_axes.append(axis)

  def whole(ys: Values, params: Values, states: Values, shared: Values, values: Values) -> Any:
    return step.run(post(ys, values), params, states, shared)

  program, _ = jax_forms.trace(
    whole, list(stacks), list(step.params), list(step.states), list(step.shared), list(given)
  )
  in_axes = [0] * len(stacks) + param_axes + state_axes + [None] * (len(step.shared) + len(given))
  out_axes = param_axes + state_axes

  own = len(stacks) + len(out_axes)  # of the inputs; the others are shared
  inputs, outputs, known = program.inputs[:own], program.outputs, program.inputs[own:]

  def run_part(part: by_layer.Part, ys: Values, params: Values, states: Values, shared: Values) -> list[Any]:
    *shared, index = shared
    env, axes = _layers(program, [*part.inputs, *known], [*ys, *params, *states, *shared], in_axes)
    by_layer.run(part.operations, program, env, axes, index, length)
    results = []
    for atom, out in ((outputs[k], out_axes[k]) for k in part.outputs):
      axis = axes.get(atom) if isinstance(atom, int) else None
      value = jax_forms.value(atom, env)
      if axis is None:  # it does not depend on the layer, so it was computed for all layers
        value, axis = jax.lax.dynamic_slice_in_dim(value, index, 1, out), out
      if axis != out:
        raise by_layer.NotSeparableError("the update moves the layer axis")
      results.append(jax.lax.squeeze(value, [axis]))
    return results

  whole_step = by_layer.Part(tuple(inputs), tuple(range(len(outputs))), tuple(program.operations))

  def run(ys: Values, params: Values, states: Values, shared: Values) -> tuple[list[Any], list[Any]]:
    results = run_part(whole_step, ys, params, states, shared)
    return results[: len(params)], results[len(params) :]

  layer = Step(
    run,
    tuple(types.struct(s, 0) for s in stacks),
    tuple(types.struct(s, a) for s, a in zip(step.params, param_axes, strict=True)),
    tuple(types.struct(s, a) for s, a in zip(step.states, state_axes, strict=True)),
    (*step.shared, *given, number),
  )
  jax.eval_shape(run, list(layer.grads), list(layer.params), list(layer.states), list(layer.shared))
  count = len(step.params)
  places = {count + j: len(stacks) + count + j for j in range(len(step.states))}
  parts = by_layer.parts(program, inputs, outputs, places, {*known, *program.constants})

  def one(grad: Any, param: Any, *rest: Any) -> list[Any]:
    params, states = run([grad], [param], rest[: len(layer.states)], rest[len(layer.states) :])
    return [*params, *states]

  update = Slice(program, program.operations, inputs, known, program.constants, outputs)
  avals = [*layer.grads, *layer.params, *layer.states]
  return Layered(
    layer,
    tuple(param_axes),
    tuple(state_axes),
    parts=tuple((functools.partial(run_part, part), part.outputs) for part in parts),
    backend=of_layers(update, out_axes, step.backend.kernels, one, avals, layer.shared),
  )


def _layers(
  program: Program, inputs: Sequence[int], values: Sequence[Any], in_axes: Sequence[int | None]
) -> tuple[dict[int, Any], dict[int, int | None]]:
  env, axes = dict(program.constants), {}
  for var, value, axis in zip(inputs, values, in_axes, strict=True):
    env[var] = value if axis is None else jnp.expand_dims(value, axis)
    if axis is not None:
      axes[var] = axis
  return env, axes


def of_groups(groups: Sequence[Any], grads: Any, weights: Any, kernels: bool = False) -> list[Site]:
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
      backend=of_weights(group.update, count, kernels),
    )
    sites.append(
      Site(group.leaves, tuple(grads[i] for i in group.leaves), tuple((weights[i],) for i in group.leaves), step)
    )
  return sites
