"""How leaves are stepped: a stack of layers as a whole, or one layer of it.

The step of one layer is made from that of the stack, by `by_layer`: with the operations that lead from what the scan
stacks to the gradient, and those of the update. Where the layer axis is in a weight is told by its gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._backends import cpu_rows, gpu_kernel, step_weight
from optax_mpo._core import order, types, xla_cpu
from optax_mpo._program import by_layer, elementwise, jax_forms
from optax_mpo._program.program import Atom, Operation, Program

Values = Sequence[Any]

HELD = 2**14
"""Elements of a gradient that may be kept for a better moment, in a scan that of a layer."""

_SHARE = 256  # of the elements that a scan steps, one in so many may belong to small stacks


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
    kernels: whether stacks of layers may be stepped by a kernel of `gpu_kernel`.
    kernel: steps the weight, where `kernels` and there is one that moves less than XLA's.
    small: steps it together with others, where `kernels` and it is so small that its launch is most of its cost.
    rows: steps the weight on CPUs, where it does so by a few rows at a time.
  """

  run: Callable[[Values, Values, Values, Values], tuple[list[Any], list[Any]]]
  grads: tuple[Any, ...]
  params: tuple[Any, ...]
  states: tuple[Any, ...]
  shared: tuple[Any, ...]
  layered: Callable[..., "Layered"] | None = None
  kernels: bool = False
  kernel: gpu_kernel.Kernel | None = None
  small: gpu_kernel.Kernel | None = None
  rows: cpu_rows.Rows | None = None

  @property
  def is_special(self) -> bool:
    """Whether there is a better way to step the leaves than XLA's, on some machine."""
    return self.kernel is not None or self.rows is not None

  def apply(self, grads: Values, params: Values, states: Values, shared: Values) -> tuple[list[Any], list[Any]]:
    """Steps the leaves: what `run` does, in the best way for the machine."""
    if not self.is_special:
      return self.run(grads, params, states, shared)
    stacks, ways = [*params, *states], {"kernel": self.kernel, "rows": self.rows}
    new = step_weight.step(self.pure, xla_cpu.laid_out(grads[0]), stacks, shared, jnp.int32(0), **ways)
    return new[: len(params)], new[len(params) :]

  def pure(self, grad: Any, stacks: Values, shared: Values, index: Any, waits: Values) -> list[Any]:
    """Steps the leaf that there is as XLA does, for `step_weight`."""
    params, states = self.run([grad], stacks[: len(self.params)], stacks[len(self.params) :], shared)
    return [*params, *states]


Taken = tuple[Values, Values, Values, Values]  # the gradients, weights, states and shared values of a step


def apply_all(steps: Sequence[Step], taken: Sequence[Taken]) -> list[tuple[list[Any], list[Any]]]:
  """Does several steps, each as `Step.apply` does it, but for small weights: those together."""
  small = [(k, step.small) for k, step in enumerate(steps) if step.small is not None]
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
    step: steps the layer. Its `shared` are those of the stack's step, what is given besides, and the layer's index.
    param_axes: the layer axis of each weight.
    state_axes: of each state.
    finish: None where the layers of the new state make the new state. Else the states of the layers start as zeros, and
      `finish(states, shared)` makes the new state of the stack from all of them.
    parts: the same step in parts, each to be written before the next one reads: `part(grads, params, states, shared)`
      makes the new values that stand beside it, by their places among weights and then states. None: in one.
    kernel: does the same in one pass, where there is one.
    no_kernel: why there is none, where one is asked for.
    rows: does the same on CPUs a few rows at a time, where there is 8-bit state.
  """

  step: Step
  param_axes: tuple[int, ...]
  state_axes: tuple[int, ...]
  finish: Callable[[Values, Values], list[Any]] | None = None
  parts: tuple[tuple[Callable[[Values, Values, Values, Values], list[Any]], tuple[int, ...]], ...] = ()
  kernel: gpu_kernel.Kernel | None = None
  no_kernel: str = ""
  rows: cpu_rows.Rows | None = None

  def write(self, grads: Values, stacks: Values, shared: Values, index: Any, count: int) -> list[Any]:
    """Steps the layer at `index` of stacks of weights and states, and returns the stacks.

    Args:
      grads: the gradients of the layer.
      stacks: of the weights, then of the states.
      shared: what the step shares with others, without the index.
      index: i32[], which layer.
      count: another one for each step of the layer; the next one may use `count + len(parts)`.
    """
    if self.kernel is None and self.rows is None:
      return self._write(grads, stacks, shared, index, count)
    pure = functools.partial(self._pure, count=count)
    return step_weight.step(pure, grads[0], stacks, shared, index, kernel=self.kernel, rows=self.rows)

  def _pure(self, grad: Any, stacks: Values, shared: Values, index: Any, _: Values, count: int) -> list[Any]:
    return self._write([grad], stacks, shared, index, count)

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
  grads: tuple[Atom, ...]
  params: tuple[tuple[int, ...], ...]
  step: Step
  placed: tuple[str, str] = ("", "")


def small_stacks(sizes: Sequence[int], length: int) -> set[int]:
  """Which stacks of layers are stepped after a scan, whole, since within it each layer would take launches of its own.

  Args:
    sizes: the elements of each stack.
    length: the number of layers.

  Returns:
    The places of small ones, such as biases and norms: all of their gradients together are next to nothing.
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
    step: steps the stack.
    post: `post(stacks, given)` makes the gradients that `step` takes from what the scan stacks along axis 0.
    stacks: the shapes of that.
    given: the shapes of what else it takes.
    length: the number of layers.

  Raises:
    NotSeparableError: where a layer cannot be stepped alone.
  """
  # Where the layer axis of each gradient is tells where it is in the weight.
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
      if axis is None:  # the same for every layer, so that all of it was computed
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
  kernel, no_kernel = None, ""
  if step.kernels:
    kernel, no_kernel = _kernel_of(program, program.operations, inputs, known, outputs, [0, *out_axes])
  return Layered(
    layer,
    tuple(param_axes),
    tuple(state_axes),
    parts=tuple((functools.partial(run_part, part), part.outputs) for part in parts),
    kernel=kernel,
    no_kernel=no_kernel,
    rows=_rows_of(layer, (*param_axes, *state_axes)),
  )


def _rows_of(layer: Step, axes: Sequence[int]) -> cpu_rows.Rows | None:
  """The update of one layer by rows, if its leaf is one and its layers are along the first axis."""
  if len(layer.params) != 1 or len(layer.grads) != 1 or any(axes):
    return None

  def run(grad: Any, param: Any, *rest: Any) -> list[Any]:
    states, shared = rest[: len(layer.states)], rest[len(layer.states) :]
    params, states = layer.run([grad], [param], states, shared)
    return [*params, *states]

  return cpu_rows.of_layer(run, [*layer.grads, *layer.params, *layer.states], layer.shared)


def _kernel_of(
  program: Program,
  operations: Sequence[Operation],
  inputs: Sequence[int],
  given: Sequence[int],
  outputs: Sequence[Atom],
  axes: Sequence[int] | None,
) -> tuple[gpu_kernel.Kernel | None, str]:
  """The kernel of an update of one weight, whose inputs have these axes of layers; or None, and why."""
  if len(inputs) != len(outputs) + 1 or any(axes or ()):
    return None, "no kernel: its layers are not along the first axis, or its update takes several gradients"
  try:
    return gpu_kernel.make(program, operations, inputs, given, outputs, axes is not None), ""
  except elementwise.NotElementwiseError as error:
    return None, f"no kernel: {error}"


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
  """Sites for groups of a `by_leaf.Update`, with the atoms of gradients and the variables of weights by leaf."""
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
      kernels=kernels,
      kernel=_block_kernel(group) if kernels else None,
      small=_small_kernel(group) if kernels else None,
      rows=cpu_rows.of_group(group),
    )
    sites.append(
      Site(group.leaves, tuple(grads[i] for i in group.leaves), tuple((weights[i],) for i in group.leaves), step)
    )
  return sites


def _small_kernel(group: Any) -> gpu_kernel.Kernel | None:
  """The kernel of a group with one small weight and no 8-bit state, if there is one."""
  if len(group.leaves) != 1 or group.program.aval(group.inputs[1]).size > order.SMALL:
    return None
  kernel, _ = _kernel_of(group.program, group.operations, group.inputs, group.shared, group.outputs, None)
  return kernel if kernel is not None and not kernel.elements.block else None


def _block_kernel(group: Any) -> gpu_kernel.Kernel | None:
  """The kernel of a group with one weight, if there is one and it moves less than XLA's.

  XLA updates a weight that is no stack of layers with one kernel, unless blocks of its state get new scales.
  """
  kernel = None
  if len(group.leaves) == 1:
    kernel, _ = _kernel_of(group.program, group.operations, group.inputs, group.shared, group.outputs, None)
  return kernel if kernel is not None and kernel.elements.block else None
