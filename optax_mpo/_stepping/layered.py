"""The update of one layer of a stack, made from that of the whole stack, and how it is written in place.

Why: Optax updates the whole stack at once, but a scan completes the gradient of one layer at a time.

How: `by_layer` makes the update of one layer from that of the stack. It takes the operations that lead from what the
scan stacks to the gradient, and those of the update, except those that need all layers: `across` takes them out. A
layer lies in a weight where it lies in its gradient.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._backends import step_weight
from optax_mpo._backends.backend import Backend, of_layers
from optax_mpo._core import host, order, types
from optax_mpo._core.annotations import Index, PyTree, Shaped
from optax_mpo._program import by_layer, jax_forms, layer_scans
from optax_mpo._program.entries import Entries, NotSeparableError, Where
from optax_mpo._program.program import Program, Slice
from optax_mpo._stepping.across import Across, Update, take_apart
from optax_mpo._stepping.site import Step, Values
from optax_mpo._stepping.windows import Window

_MOST_GUESSES = 64  # of which axis of a state is the layers'; more than two are rare


@dataclasses.dataclass(frozen=True)
class Layered:
  """The step of one layer.

  Attributes:
    step: updates the layer. Its states are those that have layers, and what the layer gives to the totals. Its `shared`
      are those of the stack's step, the values made before the scan, the other given values, and the layer's index.
    entries: where a layer lies in each weight, then in each of these states.
    gradients: where it lies in each gradient.
    count: the number of layers.
    across: what is done for the whole stack, before and after.
    parts: the same update in parts, each written before the next one reads. `part(grads, params, states, shared)` makes
      new values; their positions among weights, then states, stand beside it. Empty: in one part.
    backend: how the layer may be updated other than by XLA.
  """

  step: Step
  entries: tuple[Entries, ...]
  gradients: tuple[Entries, ...]
  count: int
  across: Across
  parts: tuple[tuple[Callable[[Values, Values, Values, Values], list[jax.Array]], tuple[int, ...]], ...] = ()
  backend: Backend = dataclasses.field(default_factory=Backend)

  def split(self, values: Values) -> tuple[list[jax.Array], list[jax.Array]]:
    """Separates weights from states."""
    first = len(self.step.params)
    return list(values[:first]), list(values[first:])

  def windows(self, outer: Sequence[Window], index: Index) -> list[Window]:
    """The layer at `index` of each part `outer` of a stack."""
    return [window.narrowed(e, index, self.count) for window, e in zip(outer, self.entries, strict=True)]

  def write(
    self, grads: Values, stacks: Values, outer: Sequence[Window], shared: Values, index: jax.Array, count: int
  ) -> list[jax.Array]:
    """Updates the layer at `index` of stacks of weights and states, and returns the stacks.

    Args:
      grads: the gradients of the layer.
      stacks: the weights, then the states.
      outer: the parts of them that `index` counts the layers of.
      shared: the other values that the update reads, without the index.
      index: i32[], which layer.
      count: a different number for each update of the layer; the next one may use `count + len(parts)`.
    """
    if not self.backend.is_special or not all(window.is_whole for window in outer):
      return self._write(grads, stacks, outer, shared, index, count)

    def pure(grad: jax.Array, stacks: Values, shared: Values, index: jax.Array) -> list[jax.Array]:
      return self._write([grad], stacks, outer, shared, index, count)

    return step_weight.step(pure, self.backend, grads[0], stacks, shared, index)

  def _write(
    self, grads: Values, stacks: Values, outer: Sequence[Window], shared: Values, index: jax.Array, count: int
  ) -> list[jax.Array]:
    stacks, grads = list(stacks), self._as_they_lie(grads)

    def read(at: Index) -> tuple[list[jax.Array], list[jax.Array]]:
      return self.split([window.read(s) for window, s in zip(self.windows(outer, at), stacks, strict=True)])

    def put(places: Sequence[int], values: Values, at: Index) -> list[jax.Array]:
      windows = self.windows(outer, at)
      for place, value in zip(places, values, strict=True):
        stacks[place] = windows[place].write(stacks[place], value)
      return [stacks[place] for place in places]

    if not self.parts:
      params, states = self.step.run(grads, *read(index), [*shared, index])
      put(range(len(stacks)), [*params, *states], index)
    done = grads
    for k, (run, places) in enumerate(self.parts):
      at = order.after(index, order.first_elements(done), count + k)
      done = put(places, run(grads, *read(at), [*shared, at]), at)
    return stacks

  def _as_they_lie(self, grads: Values) -> list[jax.Array]:
    """Gradients of a layer, laid out as its weights are: a layer of several entries has these on their axis there."""
    axes = [e.axis if e.size > 1 and e.axis < g.ndim else 0 for g, e in zip(grads, self.gradients, strict=False)]
    if len(axes) != len(grads):  # made of several
      return order.as_they_lie(grads)
    laid_out = order.as_they_lie([jnp.moveaxis(g, 0, axis) for g, axis in zip(grads, axes, strict=True)])
    return [jnp.moveaxis(g, axis, 0) for g, axis in zip(laid_out, axes, strict=True)]


def type_of_layer(stack: Shaped, entries: Entries) -> jax.ShapeDtypeStruct:
  """The type of one layer of a stack; one entry alone loses its axis."""
  if entries.size == 1:
    return types.struct(stack, entries.axis)
  return types.resized(stack, entries.axis, entries.size)


def layer_step(
  step: Step,
  post: Callable[[Values, Values], list[jax.Array]],
  stacks: Sequence[Shaped],
  given: Sequence[Shaped],
  count: int,
) -> Layered:
  """Makes the step of one layer from that of a stack.

  Args:
    step: updates the stack.
    post: `post(stacks, given)` makes the gradients that `step` takes from what the scan stacks along axis 0.
    stacks: the shapes of what the scan stacks.
    given: the shapes of the other values that `post` takes.
    count: the number of layers that the scan stacks.

  Raises:
    NotSeparableError: where a layer cannot be updated alone.
  """
  params = entries_of_gradients(step, post, stacks, given, count)
  if step.params and len(params) != len(step.params):
    raise NotSeparableError("its gradient is made of several: scan leaves that depend on each other together")

  def whole(ys: Values, params: Values, states: Values, shared: Values, values: Values) -> PyTree:
    return step.run(post(ys, values), params, states, shared)

  arguments = [list(stacks), list(step.params), list(step.states), list(step.shared), list(given)]
  program, _ = jax_forms.trace(whole, *arguments)
  counts = tuple(map(len, arguments))
  large = max(g.size // g.shape[e.axis] * e.size for g, e in zip(step.grads, params, strict=True))
  refused: NotSeparableError | None = None
  for states in _entries_of_states(step, params, count, large):
    entries = (*[Entries(0)] * len(stacks), *params[: len(step.params)], *states)
    try:
      return _layer_of(step, Update(program, counts, entries, count, large), stacks, params)
    except NotSeparableError as error:
      refused = refused or _named(error, step, params, states)
  assert refused is not None
  raise refused


def _layer_of(step: Step, update: Update, stacks: Sequence[Shaped], gradients: Sequence[Entries]) -> Layered:
  """Makes the step of one layer, if the layers lie where `update` says."""
  update, across = take_apart(update)
  program, count = _opened(update), update.count
  ys, params, states, shared, given = update.inputs
  inputs, known = [*ys, *params, *states], [*shared, *given]
  entries = [e for e in update.entries if e is not None][len(ys) :]
  run_part = functools.partial(_run_part, program, [*[Entries(0)] * len(ys), *entries], entries, count)
  whole = by_layer.Part.whole(program, inputs)
  of_layer = [type_of_layer(types.struct(program.aval(v)), e) for v, e in zip([*params, *states], entries, strict=True)]
  layer = Step(
    functools.partial(_run_whole, run_part, whole, len(params)),
    tuple(types.struct(s, 0) for s in stacks),
    tuple(of_layer[: len(params)]),
    tuple(of_layer[len(params) :]),
    (*(types.struct(program.aval(v)) for v in known), jax.ShapeDtypeStruct((), jnp.int32)),
  )
  jax.eval_shape(layer.run, list(layer.grads), list(layer.params), list(layer.states), list(layer.shared))
  places = {len(params) + j: len(ys) + len(params) + j for j in range(len(states))}
  avals = [*layer.grads, *layer.params, *layer.states]
  where = tuple(entries), tuple(gradients), count, across
  if any(map(host.is_on_host, avals)):  # parts would fetch again what the part before has written
    return Layered(layer, *where)
  parts = by_layer.parts(program, inputs, program.outputs, places, {*known, *program.constants})
  stacked = update.program
  whole_update = Slice(stacked, stacked.operations, inputs, known, stacked.constants, stacked.outputs)
  return Layered(
    layer,
    *where,
    parts=tuple((functools.partial(run_part, part), part.outputs) for part in parts),
    backend=of_layers(whole_update, entries, step.backend.kernels, functools.partial(_one, layer), avals, layer.shared),
  )


def _opened(update: Update) -> Program:
  """The program of an update for `by_layer.run`, with scans over layers taken apart."""
  program, read = update.program, [v for part in update.inputs[:3] for v in part]
  if all(operation.name != "scan" for operation in program.operations):
    return program
  where: dict[int, Where] = {v: e for v, e in zip(read, update.entries, strict=True) if e is not None}
  return layer_scans.opened(program, by_layer.entries_of(program.operations, program, where, update.count))


def _named(
  error: NotSeparableError, step: Step, gradients: Sequence[Entries], states: Sequence[Where]
) -> NotSeparableError:
  """The same error, which names the first state that has no layers, and what helps."""
  state = next((s for s, e in zip(step.states, states, strict=True) if e is None), None)
  if not step.params:
    return error
  error = NotSeparableError(f"{error}, or wrap the transformation in per_layer, along the axis that the model scans")
  if state is None:
    return error
  length = step.grads[0].shape[gradients[0].axis]
  return NotSeparableError(
    f"its state has an array of shape {list(state.shape)}, with no entry for each of the {length} layers: {error}"
  )


def entries_of_gradients(
  step: Step, post: Callable[..., list[jax.Array]], stacks: Sequence[Shaped], given: Sequence[Shaped], count: int
) -> list[Entries]:
  """Where a layer lies in each gradient, and so in each weight; arguments and errors are those of `layer_step`."""
  program, _ = jax_forms.trace(post, list(stacks), list(given))
  scanned: dict[int, Entries | None] = dict.fromkeys(program.inputs[: len(stacks)], Entries(0))
  where = by_layer.entries_of(program.operations, program, scanned, count)
  entries = []
  for atom, grad in zip(program.outputs, step.grads, strict=True):
    e = where.get(atom) if isinstance(atom, int) else None
    if e is None or program.aval(atom).shape != grad.shape or not e.within((*grad.shape, 0)[e.axis], count):
      raise NotSeparableError("its gradient has no axis of layers: keep them on an axis of the leaf")
    entries.append(e)
  return entries


def _entries_of_states(step: Step, gradients: Sequence[Entries], count: int, large: int) -> Iterator[tuple[Where, ...]]:
  """Where a layer may lie in the states. Which guess is right, the update has to show.

  A state of a weight's shape has its layers where the weight has them. Any other, such as the scales of blocks or a
  factor of a second moment, has them on an axis of the same length, or has none, such as a flag for the whole stack.
  """
  guesses: list[list[Where]] = []
  for state in step.states:
    alike = [e for e, grad in zip(gradients, step.grads, strict=True) if grad.shape == state.shape]
    e, length = gradients[0], step.grads[0].shape[gradients[0].axis]
    axes = sorted((a for a, n in enumerate(state.shape) if n == length), key=lambda a: (a != e.axis, a))
    found: list[Where] = [*(alike[:1] or [e.on(a) for a in axes])]
    guesses.append(found if found and state.size > large else [*found, None])
  return itertools.islice(itertools.product(*guesses), _MOST_GUESSES)


def _one(layer: Step, grad: jax.Array, param: jax.Array, *rest: jax.Array) -> list[jax.Array]:
  """Updates a layer of a single weight; `rest` are its states and the shared values."""
  params, states = layer.run([grad], [param], rest[: len(layer.states)], rest[len(layer.states) :])
  return [*params, *states]


def _run_whole(
  run_part: Callable[..., list[jax.Array]], part: by_layer.Part, count: int, ys: Values, params: Values, *rest: Values
) -> tuple[list[jax.Array], list[jax.Array]]:
  results = run_part(part, ys, params, *rest)
  return results[:count], results[count:]


def _run_part(
  program: Program,
  in_entries: Sequence[Entries],
  out_entries: Sequence[Entries],
  count: int,
  part: by_layer.Part,
  ys: Values,
  params: Values,
  states: Values,
  shared: Values,
) -> list[jax.Array]:
  """Runs a part of an update for one layer; the index is the last of `shared`."""
  *shared, index = shared
  env = dict(program.constants)
  where: dict[int, Where] = {}
  env.update(zip(program.inputs[len(in_entries) :], shared, strict=True))
  for var, value, e in zip(part.inputs, [*ys, *params, *states], in_entries, strict=True):
    env[var], where[var] = (jnp.expand_dims(value, e.axis) if e.size == 1 else value), e
  by_layer.run(part.operations, program, env, where, index, count)
  results = []
  for k in part.outputs:
    atom, out = program.outputs[k], out_entries[k]
    e = where.get(atom) if isinstance(atom, int) else None
    value = jax_forms.value(atom, env)
    if e is None:  # it does not depend on the layer, so it was computed for all layers
      value, e = lax.dynamic_slice_in_dim(value, out.first(index), out.size, out.axis), out
    if e != out:
      raise NotSeparableError("the update moves the layer axis: keep it in place")
    results.append(lax.squeeze(value, [out.axis]) if out.size == 1 else value)
  return results
