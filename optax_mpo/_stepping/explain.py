"""Tells how `value_and_update` updates each leaf, and why, before anything runs.

Why: a step that keeps the gradient of a whole stack of layers would be noticed late, when a GPU runs out of memory.

How: it makes the plan of the step without running it, and says what the plan does with each leaf.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax

from optax_mpo._core import modules, trees, types, wrapping
from optax_mpo._core.annotations import PyTree
from optax_mpo._program import batch_loops, upcasts
from optax_mpo._program.program import Program
from optax_mpo._stepping import held, planning, value_and_update
from optax_mpo._stepping.microbatches import Microbatches, step_by_microbatches
from optax_mpo._stepping.site import Place
from optax_mpo._stepping.traced import Traced
from optax_mpo._updates import by_leaf
from optax_mpo._updates.late import take

_USAGE = "loss_fn, tx, params, opt_state, *args"


class Leaf(NamedTuple):
  """How one leaf of the params is updated.

  Attributes:
    name: such as `params['head']['w']`.
    shape: the shape of the leaf.
    stepped: `in scan`, `after the scan`, `at once`, `at the end`, `between the passes`, `with a zero gradient` or
      `without a gradient`; with kernels also `in scan, by a kernel`, `at once, by a kernel` or `together`.
    why: the reason, unless this is the best way, and what to change.
    gradient_bytes: the most bytes of gradient that are held for it at a time, with the parts that it is added up from.
    parameters: its number of elements.
  """

  name: str
  shape: tuple[int, ...]
  stepped: str
  why: str
  gradient_bytes: int
  parameters: int


class Explanation(tuple[Leaf, ...]):
  """A tuple of `Leaf`, which prints as a table.

  Attributes:
    passes: how many backward passes a step takes: 2 only with `two_pass`, where new weights need all gradients first.
    accumulator_bytes: the bytes of the sum of gradients that `microbatches` takes beside them.
  """

  passes: int = 1
  accumulator_bytes: int = 0

  def __str__(self) -> str:
    rows = [("leaf", "shape", "stepped", "gradient held", "why")]
    rows += [(x.name, str(list(x.shape)), x.stepped, _bytes(x.gradient_bytes), x.why) for x in self]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows]
    total, largest = sum(x.parameters for x in self), max((x.gradient_bytes for x in self), default=0)
    lines.append(f"{total:,} parameters; the largest gradient held is {_bytes(largest)}")
    if self.accumulator_bytes:
      lines.append(
        f"the gradients of earlier microbatches are held in an accumulator of {_bytes(self.accumulator_bytes)}"
      )
    if self.passes == 2:
      lines.append("in two backward passes: the first makes what new weights need of all gradients")
    return "\n".join(lines)

  __repr__ = __str__  # for notebooks and the interactive interpreter


def _bytes(count: int) -> str:
  for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
    if count >= size:
      return f"{count / size:.2f} {unit}"
  return f"{count} B"


def explain(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformation,
  params: PyTree,
  opt_state: optax.OptState,
  *args: PyTree,
  has_aux: bool = False,
  two_pass: bool = False,
  tx_args: Mapping[str, PyTree] | None = None,
  microbatches: int | Microbatches = 1,
  **kwargs: PyTree,
) -> Explanation:
  """Tells how `value_and_update(loss_fn, tx)` updates each leaf of `params`.

  - `in scan`: in the backward pass of a `lax.scan` over layers, one layer at a time.
  - `after the scan`: the leaf is a small part of the layers, such as a bias or a norm. Its gradients are kept for one
    update of all layers, which takes one launch in place of several in each layer.
  - `at once`: as soon as its gradient is complete and the weight has been read for the last time.
  - `at the end`: the leaf is a stack of layers, but its gradient is held whole until the scan is over; `why` says why.
  - `between the passes`: with `two_pass`, a leaf so small that its gradient is kept from the first pass.
  - `with a zero gradient`: the loss does not depend on it. It is updated as Optax would do it.
  - `without a gradient`: its update reads no gradient, as for frozen weights, so none is computed.

  `gradient held` counts the gradient, the parts that it is added up from, and what a stack gets from other scans. It
  may be several times the gradient; `why` then says what to change.

  If `with_kernels` is in or around `tx`, `by a kernel` marks what a GPU updates with a kernel of this package, and
  `together` marks small leaves that share a kernel. `why` says why other layers in scans are left to XLA.

  `why` also names low-precision weights whose products run in f32, which is slow, because their input is f32. Cast the
  input, or pass `dtype=jnp.bfloat16` to the Flax layer.

  With `microbatches`, the table is that of the last one, whose backward pass updates the weights. The accumulator of
  the others' gradients, 2 to 4 bytes per parameter, is held besides.

  A loop in `loss_fn` that adds up the losses of parts of the batch keeps whole gradients; `why` says which
  `microbatches` of `value_and_update` replace it.

  Args:
    loss_fn: as for `value_and_update`.
    tx: likewise.
    params: arrays or ShapeDtypeStructs.
    opt_state: likewise.
    *args: further arguments of `loss_fn`, likewise.
    has_aux: whether `loss_fn` returns more than the loss.
    tx_args: extra arguments of `tx.update`, as for the step.
    two_pass: as for `value_and_update`. The table shows the second pass; the first holds no more. `passes` says if
      there are two.
    microbatches: as for `value_and_update`.
    **kwargs: further arguments of `loss_fn`, likewise.

  Returns:
    An `Explanation`, a tuple with a `Leaf` for each leaf of the params. Print it to see it as a table.

  Raises:
    ValueError: as the step itself would, for instance where `tx` couples leaves.

  Memory: none; nothing runs.

  Example:
    >>> import jax, jax.numpy as jnp, optax, optax_mpo as mpo
    >>> def loss_fn(params, x):
    ...   x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    ...   return jnp.mean((x @ params["head"]) ** 2)
    >>> params = {"layers": jnp.ones((3, 4, 4)), "head": jnp.ones((4, 2))}
    >>> tx = optax.adam(1e-3)
    >>> table = mpo.explain(loss_fn, tx, params, tx.init(params), jnp.ones((8, 4)))
    >>> table
    leaf              shape      stepped  gradient held  why
    params['head']    [4, 2]     at once  32 B
    params['layers']  [3, 4, 4]  in scan  64 B
    56 parameters; the largest gradient held is 64 B
    >>> table[1].stepped
    'in scan'

  References:
    See `value_and_update`.
  """
  wrapping.check_loss(loss_fn, "explain", _USAGE)
  tx = wrapping.as_transformation(tx, "explain", "tx", _USAGE)
  how = Microbatches.of(microbatches)
  if how is not None:
    explained = of_last_microbatch(loss_fn, tx, how, has_aux, two_pass)
    return explained(params, opt_state, *args, tx_args=tx_args, **kwargs)
  update = take(
    by_leaf.Update(
      tx, modules.pure(params), modules.pure(opt_state), "explain", extra=wrapping.extra_args(tx_args, "explain")
    )
  ).update
  traced = Traced(loss_fn, has_aux, update, params, opt_state, args, kwargs)
  passes = value_and_update.two_passes(traced, update, "explain") if two_pass else None
  groups = passes.groups if passes else value_and_update.groups_of(update)
  sites = traced.sites(groups, update.kernels)
  plan = planning.make_plan(traced.program, sites, traced.results)
  forward = traced.forward()
  upcast, loops = _upcasts(traced, forward), batch_loops.find(forward, *traced.weights_and_batch(forward))
  rows: list[Leaf | None] = [None] * len(traced.leaves)

  def add(i: int, place: Place, why: str, count: int) -> None:
    shape = tuple(jax.numpy.shape(traced.leaves[i]))
    why = "; ".join(filter(None, (why, upcast.get(i))))
    rows[i] = Leaf(update.names[i], shape, str(place), why, count, math.prod(shape))

  for index, site in enumerate(sites):
    why = "; ".join(filter(None, (site.why, held.reason(plan, index, max(loops.get(i, 0) for i in site.leaves)))))
    for i in site.leaves:
      add(i, site.place, why, held.gradient_bytes(plan, index))
  for i in passes.middle if passes else ():
    grad = traced.program.aval(traced.grads[i])
    kept = math.prod(grad.shape) * grad.dtype.itemsize
    add(i, Place.BETWEEN_PASSES, "small, so that its gradient is kept from the first", kept)
  explanation = Explanation(row for row in rows if row is not None)
  explanation.passes = 2 if passes else 1
  return explanation


def of_last_microbatch(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformationExtraArgs,
  how: Microbatches,
  has_aux: bool,
  two_pass: bool,
  has_carry: bool = False,
) -> Callable[..., Explanation]:
  """Makes `explained(params, opt_state, *args, tx_args=None, **kwargs)` of a step that `step_by_microbatches` makes."""

  def explained(*given: PyTree, **kwargs: PyTree) -> Explanation:
    def make(tx: optax.GradientTransformation) -> Callable[..., PyTree]:
      def step(params: PyTree, state: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        found = explain(loss_fn, tx, params, state, *args, has_aux=has_aux, two_pass=two_pass, **kwargs)
        found.accumulator_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.sums))
        run = value_and_update.value_and_update(loss_fn, tx, has_aux, two_pass)
        out, params, _ = run(params, state, *args, **kwargs)
        return out, params, state._replace(inner_state=trees.Static(found))  # returned in place of the new state

      return step

    leaves, treedef = jax.tree.flatten((given, kwargs))

    def traced(arrays: list[jax.Array]) -> trees.Static:
      values = iter(arrays)
      given, kwargs = treedef.unflatten([next(values) if trees.is_array(x) else x for x in leaves])
      return step_by_microbatches(loss_fn, tx, has_aux, how, make, has_carry)(*given, **kwargs)[2]

    return jax.eval_shape(traced, [x for x in leaves if trees.is_array(x)]).value

  return explained


def _upcasts(traced: Traced, program: Program) -> dict[int, str]:
  """Returns advice for the low-precision weights whose products run in f32, by leaf."""
  leaves = zip(program.inputs, range(len(traced.leaves)), strict=False)
  low = {v: i for v, i in leaves if program.aval(v).dtype in types.LOW_DTYPES}
  return {
    i: f"in f32 at {where}, as the input is: cast that to {(name := program.aval(program.inputs[i]).dtype.name)}, in "
    f"Flax with dtype=jnp.{name}"
    for i, where in upcasts.products(program, low).items()
  }
