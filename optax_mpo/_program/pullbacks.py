"""Splits a function into forward and backward pass, without keeping residuals that its weights can give again.

Why: JAX's residuals for the backward pass of a layer include its weights and values made from weights alone: a cast to
f32, a transpose. With gradient release they would be a second copy of every weight, from before its update.

How: trace `jax.vjp`, and sort its residuals by dataflow. Those that depend on the inputs are kept. Those that depend on
weights and constants alone are dropped and recomputed, by the slice of the program that makes them. `jax.checkpoint`
around the function, with its policies, decides what else is a residual; this module need not know.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.extend import core

from optax_mpo._core.annotations import PyTree, PyTreeDef, Shaped, Values
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Atom, Operation, Program


@dataclasses.dataclass(frozen=True, eq=False)
class Pullback:
  """A function's forward pass, and its backward pass with given residuals.

  Attributes:
    out_treedef: the structure of what the function returns.
    out_avals: the types of its leaves.
    stored: how many arrays `forward` returns to be kept.
  """

  out_treedef: PyTreeDef
  out_avals: tuple[Shaped, ...]
  stored: int
  _run: Callable[..., Values]
  _backward: Program
  _vjp_treedef: PyTreeDef
  _residuals: tuple[Atom, ...]
  _kept: dict[int, int]  # variable -> its place among the kept arrays
  _slice: tuple[Operation, ...]

  def forward(self, weights: Values, constants: Values, inputs: Values) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the leaves of the result, and the arrays to keep."""
    results = self._run(*weights, *constants, *inputs)
    count = len(self.out_avals)
    kept: dict[int, jax.Array] = {}
    for atom, value in zip(self._residuals, results[count:], strict=True):
      if isinstance(atom, int) and atom in self._kept:
        kept[self._kept[atom]] = value
    return list(results[:count]), [kept[place] for place in range(self.stored)]

  def backward(
    self, weights: Values, constants: Values, kept: Values, cotangents: Sequence[jax.typing.ArrayLike]
  ) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Returns the cotangents of the differentiated weights, constants and inputs, in their order."""
    env = dict(self._backward.constants)
    env.update(zip(self._backward.inputs, [*weights, *constants], strict=False))
    env.update((var, kept[place]) for var, place in self._kept.items())
    jax_forms.run(self._backward, self._slice, env)
    residuals = [jax_forms.value(a, env) for a in self._residuals]
    vjp = jax.tree.unflatten(self._vjp_treedef, residuals)
    return vjp(jax.tree.unflatten(self.out_treedef, cotangents))


def trace(
  fun: Callable[..., PyTree],
  weights: Sequence[Shaped],
  constants: Sequence[Shaped],
  inputs: Sequence[Shaped],
  active: Sequence[Sequence[bool]],
) -> Pullback:
  """Traces `fun(weights, constants, inputs)` and its derivative.

  Args:
    fun: takes three lists of arrays.
    weights: arrays or their shapes: available again in the backward pass, and may change from call to call.
    constants: the same in all calls, such as arrays that the function closed over.
    inputs: known in this call only.
    active: for each of the three, which arrays are differentiated.
  """

  def whole(*full: list[jax.Array]) -> tuple[PyTree, PyTree]:
    def differentiated(*parts: list[jax.Array]) -> PyTree:
      merged = []
      for values, flags, part in zip(full, active, parts, strict=True):
        rest = iter(part)
        merged.append([next(rest) if flag else value for value, flag in zip(values, flags, strict=True)])
      return fun(*merged)

    parts = [[v for v, flag in zip(vs, flags, strict=True) if flag] for vs, flags in zip(full, active, strict=True)]
    return jax.vjp(differentiated, *parts)

  closed, (out, vjp) = jax.make_jaxpr(whole, return_shape=True)(*map(list, (weights, constants, inputs)))
  count, out_treedef = len(jax.tree.leaves(out)), jax.tree.structure(out)
  program = jax_forms.flatten(closed)
  again = [0] * (len(weights) + len(constants)) + [1] * len(inputs)
  depends = dataflow.dependencies(program, again)
  residuals = program.outputs[count:]
  kept: dict[int, int] = {}
  for atom in residuals:
    if isinstance(atom, int) and depends[atom]:
      kept.setdefault(atom, len(kept))
  given = set(program.inputs) | set(program.constants) | set(kept)
  made = [a for a in residuals if isinstance(a, int) and a not in given]
  return Pullback(
    out_treedef=out_treedef,
    out_avals=tuple(closed.out_avals[:count]),
    stored=len(kept),
    _run=core.jaxpr_as_fun(closed),
    _backward=program,
    _vjp_treedef=jax.tree.structure(vjp),
    _residuals=tuple(residuals),
    _kept=kept,
    _slice=tuple(dataflow.slice_of(program, made, given)),
  )
