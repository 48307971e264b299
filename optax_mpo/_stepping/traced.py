"""A loss function with its derivative as a program, and how a step that runs it is differentiated itself.

How: `jax.value_and_grad(loss_fn)` is traced for one set of shapes, and flattened so that the operations that make
gradients can be followed. Weights are taken out of the residuals of its scans.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from optax_mpo._codecs import formats, masters
from optax_mpo._core import host, modules, primitives, trees
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program import dataflow, jax_forms, recompute, residuals
from optax_mpo._program.program import Program
from optax_mpo._stepping import first_pass, planning
from optax_mpo._stepping.plan import FOLLOWED
from optax_mpo._stepping.site import Place, Site, of_groups
from optax_mpo._updates import by_leaf, coupled

CALLER = "value_and_update"  # whose errors these are


Operands = tuple[list[jax.Array], list[jax.Array], dict[int, jax.Array], dict[int, jax.Array]]
"""Params and arguments; the leaves of the state; the traced constants of the loss function, and those of the update.

A step may be differentiated with respect to all of these, or mapped over them.
"""

Results = tuple[list[jax.Array], list[jax.Array], list[jax.Array]]
"""What the loss function returned, the new weights and the new leaves of the state."""

_Operands = TypeVar("_Operands")
_Results = TypeVar("_Results")


class Traced:
  """`jax.value_and_grad(loss_fn)` as a program, for one set of shapes.

  The loss is differentiated with respect to the leaves whose gradients the update reads. The others, such as frozen
  weights, get a gradient of zeros, which nothing reads. It gets params whose dtype has scales decoded, and is
  differentiated with respect to what it gets.
  """

  def __init__(
    self,
    loss_fn: Callable[..., PyTree],
    has_aux: bool,
    update: by_leaf.Update,
    params: PyTree,
    opt_state: PyTree,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
  ):
    jax_forms.check_forms(CALLER)
    scales_of = masters.scales_of(modules.pure(params), modules.pure(opt_state), CALLER)
    self.leaves, treedef = jax.tree.flatten(params)
    self._trained = [update.needs_gradient(i) for i in range(len(self.leaves))]
    rest, rest_treedef = jax.tree.flatten((args, kwargs))
    scales = [x for x in scales_of if x is not None]
    self.lifted = [*(x for x in rest if trees.is_array(x)), *scales]
    self._scales = len(scales)

    def decoded(leaves: list[jax.Array], lifted: list[jax.Array]) -> list[jax.Array]:
      values = iter(lifted[len(lifted) - len(scales) :])
      pairs = zip(host.fetched(leaves), scales_of, strict=True)
      return [formats.decode(p, None if s is None else host.fetched(next(values))) for p, s in pairs]

    def loss_of(trained: dict[int, jax.Array], leaves: list[jax.Array], lifted: list[jax.Array]) -> PyTree:
      values = iter(lifted)
      args, kwargs = rest_treedef.unflatten([next(values) if trees.is_array(x) else x for x in rest])
      return loss_fn(treedef.unflatten([trained.get(i, leaf) for i, leaf in enumerate(leaves)]), *args, **kwargs)

    def arrays_of_loss(leaves: list[jax.Array], lifted: list[jax.Array]) -> list[jax.Array]:
      return [x for x in jax.tree.leaves(loss_of({}, leaves, lifted)) if trees.is_array(x)]

    def flat(leaves: list[jax.Array], lifted: list[jax.Array]) -> PyTree:
      leaves = decoded(leaves, lifted)
      trained = {i: leaf for i, leaf in enumerate(leaves) if self._trained[i]}
      out, found = jax.value_and_grad(loss_of, has_aux=has_aux)(trained, leaves, lifted)
      grads = [found[i] if i in found else jnp.zeros_like(leaf) for i, leaf in enumerate(leaves)]
      results, out_treedef = jax.tree.flatten(out)
      static = trees.Static(([None if trees.is_array(x) else x for x in results], out_treedef))
      return static, [x for x in results if trees.is_array(x)], grads

    self._arrays_of_loss = arrays_of_loss
    closed, (self._out, *_) = jax.make_jaxpr(flat, return_shape=True)(self.leaves, self.lifted)
    for (name, _), leaf in zip(trees.named_leaves(params), self.leaves, strict=True):
      if any(const is leaf for const in closed.consts):
        raise ValueError(
          f"{CALLER}: loss_fn closes over {name}: it uses the array beside its argument, as a constant that is not "
          "differentiated and that the step is about to overwrite. Use the params that loss_fn is called with."
        )
    self.effects = closed.effects
    count, outputs = len(self.leaves), len(closed.jaxpr.outvars)
    program = jax_forms.flatten_towards(closed, [i >= outputs - count for i in range(outputs)], FOLLOWED)
    beside = program.inputs[len(program.inputs) - len(scales) :]
    program = residuals.without_weights(program, [*program.inputs[:count], *beside])
    self.program = recompute.fetched_for_each_use(program, program.inputs[:count], beside)
    self.results, self.grads = self.program.outputs[: outputs - count], self.program.outputs[outputs - count :]

  def forward(self) -> Program:
    """The program of `loss_fn` without its derivative; its first inputs are the leaves of the params, decoded."""
    return jax_forms.trace(self._arrays_of_loss, list(map(formats.gradient_like, self.leaves)), self.lifted)[0]

  def weights_and_batch(self, forward: Program) -> tuple[list[int], list[int]]:
    """The inputs of `forward` that are weights, and those that may have a batch: no scalars, random keys or scales."""
    weights, rest = forward.inputs[: len(self.leaves)], forward.inputs[len(self.leaves) :]
    types = [(v, forward.aval(v)) for v in rest[: len(rest) - self._scales]]
    raw_key = jnp.dtype(jnp.uint32), (2,)
    is_key = [jnp.issubdtype(t.dtype, jax.dtypes.prng_key) or (t.dtype, t.shape[-1:]) == raw_key for _, t in types]
    return weights, [v for (v, t), key in zip(types, is_key, strict=True) if t.shape and not key]

  def sites(self, groups: Sequence[by_leaf.Group], kernels: bool) -> list[Site]:
    """The sites of the weights, with their gradients; `kernels` allows GPU kernels."""
    sites = of_groups(groups, self.grads, self.program.inputs, kernels)
    for site in sites:
      if not any(self._trained[i] for i in site.leaves):
        site.put(Place.WITHOUT_GRADIENT, "its update does not read one")
    return sites

  def sites_of_parts(self, passes: coupled.TwoPass) -> list[Site]:
    """The sites of the first of two passes."""
    return [
      Site((part.leaf,), (self.grads[part.leaf],), (), first_pass.part_step(part, passes.program, gradient))
      for part in passes.parts
      for gradient in (passes.program.inputs[part.leaf],)
    ]

  def held_stacks(self, sites: list[Site]) -> set[int]:
    """The leaves that are stacks of layers and can only be updated whole."""
    planning.make_plan(self.program, sites, self.results)
    return {i for site in sites if site.place is Place.AT_END for i in site.leaves}

  def after_forward(self) -> tuple["Traced", list[int]]:
    """The program without its forward pass, and the variables that it reads of what was made before.

    What is made of weights alone, such as casts and views, and what is much larger than what it is made from, such as
    logits, is made again: to keep it would take more memory. With what it reads is the gradient that its first scan
    over layers starts from.
    """
    program = self.program
    is_data = [len(self.leaves) <= i < len(program.inputs) - self._scales for i in range(len(program.inputs))]
    of_data = dataflow.dependencies(program, list(map(int, is_data)))
    loss = program.makers.get(self.results[0], -1) if isinstance(self.results[0], int) else -1
    made = {v for o in program.operations[: loss + 1] for v in o.outputs if of_data.get(v)}
    read = dataflow.read_by(program.operations[loss + 1 :], program.outputs)
    kept = recompute.worth_keeping(program, made & read, of_data)
    kept += recompute.starts(program, program.operations[loss + 1 :], of_data, kept)
    operations = dataflow.slice_of(program, program.outputs, set(kept))
    other = copy.copy(self)
    other.program = dataclasses.replace(program, inputs=[*program.inputs, *kept], operations=operations)
    return other, kept

  def at(self, inputs: Values, constants: dict[int, jax.Array]) -> "Traced":
    """The same program with other values for its inputs and for constants."""
    other = copy.copy(self)
    count = len(self.leaves)
    other.leaves, other.lifted, other.program = (
      list(inputs[:count]),
      list(inputs[count:]),
      self.program.replaced(constants),
    )
    return other

  def output(self, results: Values) -> PyTree:
    """Puts the arrays of the loss function's result back into its tree."""
    static, treedef = self._out.value
    values = iter(results)
    return treedef.unflatten([next(values) if x is None else x for x in static])


def differentiated_as(
  ordinary: Callable[[_Operands], _Results], released: Callable[[_Operands], _Results], operands: _Operands
) -> _Results:
  """Returns `released(operands)`, differentiated as `ordinary(operands)`, which computes the same.

  A derivative needs all gradients of the step at once. Also, a released step runs the operations of the update one by
  one, without the calls that they come from, and so without the custom derivatives of these, such as a rounding's.
  """
  leaves, treedef = jax.tree.flatten(operands)

  @jax.custom_jvp
  def step(*leaves: jax.Array) -> _Results:
    return released(treedef.unflatten(leaves))

  def jvp(primals: Values, tangents: Values) -> tuple[_Results, _Results]:
    if any(map(host.is_on_host, primals)):  # JAX has no tangents of integers there, such as bits
      raise NotImplementedError(
        f"{CALLER}: a step with params or state in host memory cannot be differentiated (jax.grad, jvp, linearize, or "
        "remat under one of them). Move them to the device: jax.device_put(opt_state, jax.memory.Space.Device)."
      )
    return primitives.jvp_of(lambda *leaves: ordinary(treedef.unflatten(leaves)), primals, tangents)

  step.defjvp(jvp, symbolic_zeros=True)
  return step(*leaves)
