"""The first of two passes over the gradients: what a leaf contributes to the small arrays that couple it with others.

Why: `coupled` says which small arrays of each leaf the update of all leaves needs, such as the sum of its squares. They
are made as soon as the leaf's gradient is complete, so that the gradient can be freed at once.

How: each leaf gets a `Step` that makes these arrays as its new state and leaves the weight alone. For a stack of layers
they are made layer by layer: a sum over the stack becomes a sum of the layers' sums. This changes the order of the
additions, so the last bit of a sum can differ from that of the ordinary step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._program import by_layer, jax_forms
from optax_mpo._program.layer_rules import Entries, NotSeparableError, Where
from optax_mpo._program.program import Operation, Program
from optax_mpo._stepping.layered import Layered, entries_of_gradients
from optax_mpo._stepping.site import Step
from optax_mpo._updates.coupled import Part


def _keeping_dtype(reduction: Callable[..., Any]) -> Callable[..., Any]:
  """A sum or a product in the dtype of its operand; NumPy would widen small integers."""
  return lambda x, axis: reduction(x, axis=axis, dtype=x.dtype)


_REDUCED_AGAIN = {
  "reduce_sum": _keeping_dtype(jnp.sum),
  "reduce_max": jnp.max,
  "reduce_min": jnp.min,
  "reduce_prod": _keeping_dtype(jnp.prod),
  "reduce_and": jnp.all,
  "reduce_or": jnp.any,
}


def part_step(part: Part, program: Program, grad: int) -> Step:
  """Makes the step of the first pass: its new state is the values of the part, and it leaves the weight alone."""

  def struct(var: int) -> jax.ShapeDtypeStruct:
    return types.struct(program.aval(var))

  def run(grads: Any, params: Any, states: Any, shared: Any) -> tuple[list[Any], list[Any]]:
    env = dict(program.constants) | dict(zip((grad, *part.reads, *part.shared), [*grads, *shared], strict=True))
    jax_forms.run(program, part.operations, env)
    return [], [env[v] for v in part.outputs]

  shared = tuple(struct(v) for v in (*part.reads, *part.shared))
  return Step(run, (struct(grad),), (), tuple(struct(v) for v in part.outputs), shared, layer_part)


def layer_part(step: Step, post: Any, stacks: Sequence[Any], given: Sequence[Any], count: int) -> Layered:
  """Makes the step of one layer for the first pass, as `layered.layer_step` does for the second.

  The state of a layer is its own reductions. After the scan, those of the stack are made from them.
  """

  entries = entries_of_gradients(step, post, stacks, given, count)
  if any(e.covered(count) != set(range(g.shape[e.axis])) for e, g in zip(entries, step.grads, strict=True)):
    raise NotSeparableError("its reductions are made for all of its layers in one scan: scan all of them there")

  def whole(ys: Any, shared: Any, values: Any) -> list[Any]:
    return step.run(post(ys, values), [], [], shared)[1]

  program, _ = jax_forms.trace(whole, list(stacks), list(step.shared), list(given))
  layers = [types.struct(s, 0) for s in stacks]
  rest, number = [*step.shared, *given], jax.ShapeDtypeStruct((), jnp.int32)
  marks = jax_forms.dependencies(program, [1] * len(stacks) + [0] * len(rest))
  inside: list[Operation] = []
  across: list[Operation] = []
  after: list[Operation] = []

  def begin(ys: Any, handed: Any) -> tuple[dict[int, Any], dict[int, Where]]:
    values = [*(y[None] for y in ys), *handed]
    env = dict(program.constants) | dict(zip(program.inputs, values, strict=True))
    return env, dict.fromkeys(program.inputs[: len(stacks)], Entries(0))

  def split(index: Any, ys: Any, handed: Any) -> list[Any]:
    (env, where), crossed = begin(ys, handed), set()
    for operation in program.operations:
      read = {a for a in operation.inputs if isinstance(a, int)}
      if read & crossed:
        if any(marks[a] for a in read - crossed):
          raise NotSeparableError(
            f"{jax_forms.where(operation)} needs all layers before it goes on with each: do it for one layer at a time"
          )
        after.append(operation)
        crossed.update(operation.outputs)
      elif operation.name in _REDUCED_AGAIN and _is_across(operation, where):
        across.append(operation)
        crossed.update(operation.outputs)
      else:
        inside.append(operation)
        if not any(marks[a] for a in read):
          after.append(operation)
        by_layer.run([operation], program, env, where, index, count)
    if any(isinstance(a, int) and marks[a] and a not in crossed for a in program.outputs):
      raise NotSeparableError(
        "other leaves need more of its gradient than sums over the layers: let updates depend on norms or flags alone"
      )
    return []

  jax.eval_shape(split, number, layers, rest)
  inside = _needed(inside, {a for o in across for a in o.inputs if isinstance(a, int)})
  after = _needed(after, {a for a in program.outputs if isinstance(a, int)})

  def run(ys: Any, params: Any, states: Any, shared: Any) -> tuple[list[Any], list[Any]]:
    *handed, index = shared
    env, where = begin(ys, handed)
    by_layer.run(inside, program, env, where, index, count)
    return [], [jax_forms.run_operation(o, [env[a] for a in o.inputs], **_unsharded(o))[0] for o in across]

  def finish(totals: Sequence[Any], shared: Sequence[Any]) -> list[Any]:
    env = dict(program.constants) | dict(zip(program.inputs[len(stacks) :], shared, strict=True))
    for operation, total in zip(across, totals, strict=True):
      env[operation.outputs[0]] = _REDUCED_AGAIN[operation.name](total, axis=0)
    jax_forms.run(program, after, env)
    return [jax_forms.value(a, env) for a in program.outputs]

  avals = [program.aval(o.outputs[0]) for o in across]
  kept = tuple(types.struct(a) for a in avals)
  layer = Step(run, tuple(layers), (), kept, (*rest, number), _no_deeper)
  return Layered(layer, (Entries(0),) * len(kept), tuple(entries), finish)


def _is_across(operation: Operation, where: dict[int, Where]) -> bool:
  """Whether a reduction is over the axis of the layers."""
  entries = where.get(operation.inputs[0])
  return entries is not None and entries.axis in operation.eqn.params["axes"]


def _needed(operations: list[Operation], wanted: set[int]) -> list[Operation]:
  kept = []
  for operation in reversed(operations):
    if wanted & set(operation.outputs):
      kept.append(operation)
      wanted |= {a for a in operation.inputs if isinstance(a, int)}
  return kept[::-1]


def _unsharded(operation: Operation) -> dict[str, Any]:
  return {"out_sharding": None} if operation.eqn.params.get("out_sharding") is not None else {}


def _no_deeper(*_: Any) -> Any:
  raise NotSeparableError("its reductions are made for one scan, not for scans inside of scans: scan all layers in one")
