"""Runs the program of a backward pass, and updates weights as it goes.

Why: XLA may order operations as it likes, and would keep gradients for a later update.

How: a weight is updated after the operation where its plan says that it is due. A barrier makes the rest of the
backward pass wait for the update. A scan that would stack the gradients of layers runs with the stacks of weights and
state in its carry, and updates them in place. Every operation is the one that JAX and Optax wrote.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._core import order, types, xla_cpu
from optax_mpo._core.annotations import Index, PyTree, Values
from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Program
from optax_mpo._stepping import planning
from optax_mpo._stepping.plan import Own, Plan, Released, Rest, ScanPlan, Source, constant, run_own
from optax_mpo._stepping.site import Site
from optax_mpo._stepping.stores import Layer, Parts, Store
from optax_mpo._stepping.windows import Window

Location = Callable[[], tuple[jax.Array, Window]]
"""Gives the array that a layer is a part of, as it is by then, and which part."""


def run(
  program: Program,
  sites: list[Site],
  inputs: Values,
  results: Sequence[Atom],
  store: Store,
  shared: Sequence[Values] | Callable[[jax.Array | None], Sequence[Values]],
  at_least: int = 0,
  weights: Sequence[int] = (),
  loss: Atom | None = None,
) -> list[jax.Array]:
  """Runs a program and updates weights in it, each as soon as its gradient is complete.

  Args:
    program: makes gradients, and `results` too.
    sites: how weights are updated, with the atoms of their gradients.
    inputs: the values of the program's inputs.
    results: atoms of the program.
    store: holds the weights and the state of each site; they are replaced there.
    shared: for each site the values that its update shares with others; or a function that makes them of the loss.
    at_least: bytes of gradient, as for `planning.make_plan`.
    weights: variables that scans read where they lie, likewise.
    loss: an atom of the program that `shared` needs before the first update.

  Returns:
    The values of `results`.
  """
  env = dict(program.constants) | dict(zip(program.inputs, inputs, strict=True))
  plan = planning.make_plan(program, sites, [*results, loss], at_least, weights, loss)
  if callable(shared):
    shared = _OnDemand(shared, lambda: None if loss is None else jax_forms.value(loss, env))
  evaluate(plan, env, store, shared)
  return [jax_forms.value(a, env) for a in results]


class _OnDemand(Sequence[Values]):
  """Values of the sites that are made when the first is needed: by then the loss is known."""

  def __init__(self, make: Callable[[jax.Array | None], Sequence[Values]], loss: Callable[[], jax.Array | None]):
    self._make = functools.cache(lambda: make(loss()))

  def __getitem__(self, index: Any) -> Any:
    return self._make()[index]

  def __len__(self) -> int:
    return len(self._make())


def evaluate(
  plan: Plan,
  env: dict[int, jax.Array],
  store: Store,
  shared: Sequence[Values],
  layers: Mapping[int, Location] = MappingProxyType({}),
) -> None:
  """Runs a program and updates the sites of its plan.

  Args:
    plan: the program and its plan.
    env: the values of the program's variables, read and written.
    store: holds the weights and the state of each site.
    shared: for each site the values that its update shares with others.
    layers: where those variables lie that are layers of weights.
  """

  def step_due(i: int) -> None:
    due, rests = plan.due.get(i, []), plan.rests.get(i, [])
    if not due and not rests:
      return
    # The backward pass goes on with `ties`. One barrier makes the update wait for them, and so for the last use of the
    # old weights, which can then be overwritten. The other barrier makes what follows wait for the update.
    ties = plan.ties.get(i, ())
    atoms = {a for a in plan.grads_due(i) if isinstance(a, int) and constant(plan.program, a) is None}
    made, held = {a: env[a] for a in atoms}, [env[v] for v in ties]
    if ties:
      # Parts get a barrier on CPUs too, so that sums of gradients come out the same in both passes.
      made, held = (_barrier if isinstance(store, Parts) else xla_cpu.tie)((made, held))
    known = env | made
    grads = [[jax_forms.value(a, known) for a in plan.sites[index].grads] for index in due]
    store.step(due, [plan.sites[index].step for index in due], grads, [shared[index] for index in due])
    for rest in rests:
      _update_rest(plan, rest, known, store, shared, begun)
    touched = list(dict.fromkeys([*due, *(rest.released.index for rest in rests)]))
    changed, held = _barrier(([store.held(index) for index in touched], held))
    for index, new in zip(touched, changed, strict=True):
      store.hold(index, new)
    env.update(zip(ties, held, strict=True))

  begun: dict[int, _Begun] = {}
  step_due(-1)
  for i, operation in enumerate(plan.program.operations):
    if i in plan.scans:
      jax_forms.run(plan.program, [plan.program.operations[k] for k in plan.scans[i].early], env)
      _run_scan(plan, plan.scans[i], env, store, shared, begun, layers)
    elif i not in plan.skipped:
      jax_forms.run(plan.program, [operation], env)
    if pair := plan.pairs.get(i):
      env.update(zip(pair, order.together([env[v] for v in pair]), strict=True))
    step_due(i)  # also after a skipped operation, which may be the last one
    for atom in (*operation.inputs, *operation.outputs):
      if isinstance(atom, int) and plan.last_use.get(atom, -1) <= i:
        env.pop(atom, None)  # outside jit this frees the array


def _barrier(values: tuple[PyTree, list[jax.Array]]) -> tuple[PyTree, list[jax.Array]]:
  return order.barrier(values) if values[1] else values


@dataclasses.dataclass
class _Begun:
  """A stack that is updated in pieces, such as the layers of one scan.

  Attributes:
    early: by the piece, the values that were made of the stack before any of its layers was updated.
    totals: what the layers have given so far to the state that the whole stack has once.
    left: the number of pieces that are still to come.
  """

  early: dict[int, list[jax.Array]]
  totals: list[jax.Array]
  left: int


def _begin(plan: Plan, index: int, store: Store, shared: Values) -> _Begun:
  params, states = store.get(index)
  pieces = [r for scan in plan.scans.values() for r in scan.released if r.index == index]
  pieces += [rest.released for rests in plan.rests.values() for rest in rests if rest.released.index == index]
  early = {id(r): r.layered.across.before(params, states, shared) for r in pieces}
  return _Begun(early, list(map(types.zeros, pieces[0].layered.across.totals)), len(pieces))


def _run_scan(
  plan: Plan,
  scan: ScanPlan,
  env: dict[int, jax.Array],
  store: Store,
  shared: Sequence[Values],
  begun: dict[int, _Begun],
  layers: Mapping[int, Location],
) -> None:
  """Runs a scan with the stacks that it updates in its carry; `begun` are those of which scans have updated layers."""
  program, operation, body = plan.program, scan.operation, scan.body
  counts = jax_forms.scan_counts(operation)
  first = counts[0] + counts[1]
  values: list[PyTree] = [
    None if i >= first and i - first in scan.own else jax_forms.value(a, env) for i, a in enumerate(operation.inputs)
  ]
  consts, carry, xs = values[: counts[0]], values[counts[0] : first], values[first:]
  inner_shared = [_handed(plan, r, env, store, shared, begun) for r in scan.released]
  starts = {r.index: _carried(r, store, begun[r.index].totals) for r in scan.released}
  outer = {index: windows for index, (_, windows) in starts.items()}

  options = jax_forms.scan_options(operation)

  def step(state: PyTree, xs: list[PyTree]) -> tuple[PyTree, list[jax.Array]]:
    (carry, arrays, done), xs = state, list(xs)
    index = scan.length - 1 - done if options["reverse"] else done
    layer = Layer(scan.released, arrays, outer, index)
    places = {k: _places(own, env, layers, layer, index, scan.length) for k, own in scan.own.items()}
    for k, own in scan.own.items():
      xs[k] = run_own(own, program, _values(own, env, places[k]), index, scan.length)
    inner = dict(body.constants) | dict(zip(body.inputs, [*consts, *carry, *xs], strict=True))
    inner_layers = {v: next(iter(places[k].values())) for v, k in scan.layers.items()}
    evaluate(scan.plan, inner, layer, [[*s, index] for s in inner_shared], inner_layers)
    out = [jax_forms.value(a, inner) for a in body.outputs[: counts[1]]]
    ys = [body.outputs[counts[1] + j] for j in scan.kept]
    return (out, layer.arrays, done + 1), [jax_forms.value(a, inner) for a in ys]

  # The index is a counter. If it came from an array, XLA:GPU would read all weights of a layer at its start.
  done = jnp.int32(0)
  if scan.length == 1:  # XLA takes the only iteration out of the loop, where it would know the index
    done = order.hidden(done, order.first_elements([x for arrays, _ in starts.values() for x in arrays]))
  carried = carry, {index: arrays for index, (arrays, _) in starts.items()}, done
  (carry, new, _), ys = lax.scan(step, carried, xs, **options)
  for r, handed in zip(scan.released, inner_shared, strict=True):
    _put_carried(r, store, new[r.index], handed, begun[r.index])
  outputs = operation.outputs
  env.update(zip([*outputs[: counts[1]], *(outputs[counts[1] + j] for j in scan.kept)], [*carry, *ys], strict=True))


def _handed(
  plan: Plan, r: Released, env: dict[int, jax.Array], store: Store, shared: Sequence[Values], begun: dict[int, _Begun]
) -> list[jax.Array]:
  """The values that the update of a layer reads, without its index."""
  if r.index not in begun:
    begun[r.index] = _begin(plan, r.index, store, shared[r.index])
  return [*shared[r.index], *begun[r.index].early[id(r)], *(env[v] for v in r.given)]


def _update_rest(
  plan: Plan, rest: Rest, env: dict[int, jax.Array], store: Store, shared: Sequence[Values], begun: dict[int, _Begun]
) -> None:
  """Updates layers whose gradients no scan makes."""
  r, layered = rest.released, rest.released.layered
  jax_forms.run(plan.program, [plan.program.operations[k] for k in r.early], env)
  handed = _handed(plan, r, env, store, shared, begun)
  arrays, outer = _carried(r, store, begun[r.index].totals)

  def step(arrays: list[jax.Array], index: jax.Array) -> tuple[list[jax.Array], None]:
    grads = [jnp.full(g.shape, rest.fill, g.dtype) for g in layered.step.grads] if rest.fill is not None else []
    for v, e in rest.sources.items():
      grads.append(Window.whole(env[v]).narrowed(e, index, layered.count).read(env[v]))
    return layered.write(grads, arrays, outer, handed, index, 1), None

  if layered.count == 1:
    known = order.first_elements([*(env[v] for v in rest.sources), *arrays])
    new, _ = step(arrays, order.hidden(jnp.int32(0), known))
  else:
    new, _ = lax.scan(step, arrays, jnp.arange(layered.count, dtype=jnp.int32))
  _put_carried(r, store, new, handed, begun[r.index])


def _places(
  own: Own, env: dict[int, jax.Array], layers: Mapping[int, Location], layer: Layer, index: Index, count: int
) -> dict[int, Location]:
  """Where the layer of each weight lies: in a stack that the scan updates, or in another."""

  def place(v: int, source: Source) -> Location:
    def current() -> tuple[jax.Array, Window]:
      if source.released is not None:
        arrays, windows = layer.stacks(source.released)
        return arrays[source.leaf], windows[source.leaf]
      array, window = layers[v]() if source.in_place else (env[v], Window.whole(env[v]))
      return array, window.narrowed(source.entries, index, count)

    return current

  return {v: place(v, source) for v, source in own.sources.items()}


def _values(own: Own, env: dict[int, jax.Array], places: dict[int, Location]) -> dict[int, jax.Array]:
  """A layer of each weight, and the whole arrays."""
  values = {v: env[v] for v in own.given}
  for v, place in places.items():
    array, window = place()
    (values[v],) = order.as_they_lie([window.read(array)])
  return values


def _carried(r: Released, store: Store, totals: Values) -> tuple[list[jax.Array], list[Window]]:
  """The arrays that a scan carries, and which part of each it updates."""
  arrays, windows = store.stacks(r.index)
  places = r.layered.across.carried
  return [*(arrays[k] for k in places), *totals], [*(windows[k] for k in places), *map(Window.whole, totals)]


def _put_carried(r: Released, store: Store, new: Values, shared: Values, begun: _Begun) -> None:
  """Stores the arrays that a scan has carried, and after the last scan also the state that the whole stack has once."""
  across = r.layered.across
  arrays, windows = store.stacks(r.index)
  for k, value in zip(across.carried, new, strict=False):
    arrays[k] = value
  begun.totals = list(new[len(across.carried) :])
  begun.left -= 1
  if not begun.left:
    for k, value in zip(across.wholes, across.after(begun.totals, shared), strict=True):
      arrays[k] = windows[k].write(arrays[k], value)
  store.put_stacks(r.index, r, arrays)
