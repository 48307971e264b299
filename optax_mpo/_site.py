"""How leaves are stepped: a stack of layers as a whole, or one layer of it.

The step of one layer is made from that of the stack, by `_stacked`: with the operations that lead from what the scan
stacks to the gradient, and those of the update. Where the layer axis is in a weight is told by its gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo import _jaxpr, _order, _stacked, _types

Values = Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Step:
  """How the leaves of a site are stepped.

  Attributes:
    run: `run(grads, params, states, shared) -> (params, states)`.
    grads: the shapes of what it takes, as ShapeDtypeStructs.
    params: likewise.
    states: likewise.
    shared: likewise.
    layered: makes the step of one layer of a stack, as `layer_step` does.
  """

  run: Callable[[Values, Values, Values, Values], tuple[list[Any], list[Any]]]
  grads: tuple[Any, ...]
  params: tuple[Any, ...]
  states: tuple[Any, ...]
  shared: tuple[Any, ...]
  layered: Callable[..., "Layered"] | None = None


@dataclasses.dataclass(frozen=True)
class Layered:
  """The step of one layer.

  Attributes:
    step: steps the layer. Its `shared` are those of the stack's step, what is given besides, and the layer's index.
    param_axes: the layer axis of each weight.
    state_axes: of each state.
    finish: None where the layers of the new state make the new state. Else the states of the layers start as zeros, and
      `finish(states, shared)` makes the new state of the stack from all of them.
    parts: the same step in parts, each to be written before the next one reads: `part(grads, params, states, shared)`
      makes the new values that stand beside it, by their places among weights and then states. None: in one.
  """

  step: Step
  param_axes: tuple[int, ...]
  state_axes: tuple[int, ...]
  finish: Callable[[Values, Values], list[Any]] | None = None
  parts: tuple[tuple[Callable[[Values, Values, Values, Values], list[Any]], tuple[int, ...]], ...] = ()


@dataclasses.dataclass
class Site:
  """Leaves that are stepped together, as one program sees them.

  Attributes:
    leaves: which leaves of the params.
    grads: the atoms that the step needs.
    params: for each leaf, the variables that hold its weight.
    step: how they are stepped. Its `shared` are the values that the site is handed from outside.
    placed: where they are stepped, as `explain` says it, and why.
  """

  leaves: tuple[int, ...]
  grads: tuple[_jaxpr.Atom, ...]
  params: tuple[tuple[int, ...], ...]
  step: Step
  placed: tuple[str, str] = ("", "")


def layer_step(
  step: Step,
  post: Callable[[Values, Values], list[Any]],
  stacks: Sequence[Any],
  given: Sequence[Any],
  length: int,
) -> Layered:
  """Makes the step of one layer from that of a stack.

  Args:
    step: steps the stack.
    post: `post(stacks, given)` makes the gradients that `step` takes from what the scan stacks along axis 0.
    stacks: the shapes of that.
    given: the shapes of what else it takes.
    length: the number of layers.

  Raises:
    NotSeparableError: where a layer cannot be stepped alone.
  """
  # Where the layer axis of each gradient is tells where it is in the weight.
  before, _ = _jaxpr.trace(post, list(stacks), list(given))
  found: list[int | None] = []

  def grads_of(index: Any, layers: Values, values: Values) -> list[Any]:
    env, axes = _layers(before, before.inputs, [*layers, *values], [0] * len(stacks) + [None] * len(given))
    _stacked.run(before.operations, before, env, axes, index, length)
    found[:] = [axes.get(a) if isinstance(a, int) else None for a in before.outputs]
    return []

  number = jax.ShapeDtypeStruct((), jnp.int32)
  jax.eval_shape(grads_of, number, [_types.struct(s, 0) for s in stacks], list(given))
  param_axes = []
  for axis, param in zip(found, step.params, strict=False):
    if axis is None or axis >= len(param.shape) or param.shape[axis] != length:
      raise _stacked.NotSeparableError("its gradient has no axis of layers")
    param_axes.append(axis)
  if len(param_axes) != len(step.params) or len(found) != len(step.params):
    raise _stacked.NotSeparableError("its gradient is made of several")
  state_axes = []
  for state in step.states:
    axis = next((a for p, a in zip(step.params, param_axes, strict=True) if p.shape == state.shape), 0)
    if axis >= len(state.shape) or state.shape[axis] != length:
      raise _stacked.NotSeparableError(
        f"its state has an array of shape {list(state.shape)}, with no entry for each of the {length} layers"
      )
    state_axes.append(axis)

  def whole(ys: Values, params: Values, states: Values, shared: Values, values: Values) -> Any:
    return step.run(post(ys, values), params, states, shared)

  program, _ = _jaxpr.trace(whole, list(stacks), list(step.params), list(step.states), list(step.shared), list(given))
  in_axes = [0] * len(stacks) + param_axes + state_axes + [None] * (len(step.shared) + len(given))
  out_axes = param_axes + state_axes

  own = len(stacks) + len(out_axes)  # of the inputs; the others are shared
  inputs, outputs, known = program.inputs[:own], program.outputs, program.inputs[own:]

  def run_part(part: _stacked.Part, ys: Values, params: Values, states: Values, shared: Values) -> list[Any]:
    *shared, index = shared
    env, axes = _layers(program, [*part.inputs, *known], [*ys, *params, *states, *shared], in_axes)
    _stacked.run(part.operations, program, env, axes, index, length)
    results = []
    for atom, out in ((outputs[k], out_axes[k]) for k in part.outputs):
      axis = axes.get(atom) if isinstance(atom, int) else None
      value = env[atom] if isinstance(atom, int) else jnp.asarray(atom.val)
      if axis is None:  # the same for every layer, so that all of it was computed
        value, axis = jax.lax.dynamic_slice_in_dim(value, index, 1, out), out
      if axis != out:
        raise _stacked.NotSeparableError("the update moves the layer axis")
      results.append(jax.lax.squeeze(value, [axis]))
    return results

  whole_step = _stacked.Part(tuple(inputs), tuple(range(len(outputs))), tuple(program.operations))

  def run(ys: Values, params: Values, states: Values, shared: Values) -> tuple[list[Any], list[Any]]:
    results = run_part(whole_step, ys, params, states, shared)
    return results[: len(params)], results[len(params) :]

  layer = Step(
    run,
    tuple(_types.struct(s, 0) for s in stacks),
    tuple(_types.struct(s, a) for s, a in zip(step.params, param_axes, strict=True)),
    tuple(_types.struct(s, a) for s, a in zip(step.states, state_axes, strict=True)),
    (*step.shared, *given, number),
  )
  jax.eval_shape(run, list(layer.grads), list(layer.params), list(layer.states), list(layer.shared))
  parts = []
  if sum(math.prod(x.shape) for x in (*layer.params, *layer.states)) > _order.SMALL:
    count = len(step.params)
    places = {count + j: len(stacks) + count + j for j in range(len(step.states))}
    parts = _stacked.parts(program, inputs, outputs, places, {*known, *program.constants})
  return Layered(
    layer,
    tuple(param_axes),
    tuple(state_axes),
    parts=tuple((functools.partial(run_part, part), part.outputs) for part in parts),
  )


def _layers(
  program: _jaxpr.Program, inputs: Sequence[int], values: Sequence[Any], in_axes: Sequence[int | None]
) -> tuple[dict[int, Any], dict[int, int | None]]:
  env, axes = dict(program.constants), {}
  for var, value, axis in zip(inputs, values, in_axes, strict=True):
    env[var] = value if axis is None else jnp.expand_dims(value, axis)
    if axis is not None:
      axes[var] = axis
  return env, axes


def of_groups(groups: Sequence[Any], grads: Any, weights: Any) -> list[Site]:
  """Sites for groups of a `_separable.Update`, with the atoms of gradients and the variables of weights by leaf."""
  sites = []
  for group in groups:
    count, avals = len(group.leaves), [group.program.aval(v) for v in (*group.inputs, *group.shared)]
    structs = [_types.struct(a) for a in avals]
    step = Step(
      group.step,
      tuple(structs[:count]),
      tuple(structs[count : 2 * count]),
      tuple(structs[2 * count : len(group.inputs)]),
      tuple(structs[len(group.inputs) :]),
    )
    sites.append(
      Site(group.leaves, tuple(grads[i] for i in group.leaves), tuple((weights[i],) for i in group.leaves), step)
    )
  return sites
