"""Makes the JAX primitives of this package, each with all the rules that JAX's transformations need.

Why: a primitive without a batching or JVP rule works until a user maps or differentiates a training step. Then it
fails with an error that names something internal.

How: a function in plain JAX says what a primitive computes, and gives its implementation, batching and JVP. Only the
lowering differs between backends. Most primitives return their operands and only tell XLA something; their derivatives
pass straight through, and a mapped axis stays where it is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from optax_mpo._core.annotations import PyTree, Values

MADE: dict[str, Primitive] = {}
"""All primitives of this package by name, for the test that covers them."""

IrValues = Sequence[mlir.Value | Sequence[mlir.Value]]  # as `mlir.LoweringRule` returns them
Lower = Callable[[Callable[..., PyTree]], IrValues]
Lowering = Callable[..., IrValues]
"""`lowering(lower, context, *operands, **params)` returns `lower(fun)`; the program runs `fun`, in plain JAX.

It may put a context manager around `lower`.
"""

Axis = int | None  # the mapped one of an operand
Batched = tuple[PyTree, Sequence[Axis] | Axis]  # results, and their mapped axes


def make(
  name: str,
  abstract: Callable[..., PyTree],
  plain: Callable[..., PyTree],
  lowerings: Mapping[str | None, Lowering],
  *,
  multiple_results: bool = True,
  depends_on_operands: bool = False,
) -> Primitive:
  """Makes a primitive that computes what `plain` does, with the derivatives of `plain`.

  Args:
    name: the name of the primitive.
    abstract: `abstract(*avals, **params)` returns the types of the results.
    plain: `plain(*operands, **params)` computes them on any backend.
    lowerings: its lowerings by platform; None stands for all others.
    multiple_results: whether it returns a list.
    depends_on_operands: whether a lowering looks at its operands; then it is not reused for others of the same type.
  """
  primitive = MADE[name] = Primitive(name)
  primitive.multiple_results = multiple_results
  primitive.def_impl(plain)
  primitive.def_abstract_eval(abstract)

  def rule_of(lowering: Lowering) -> mlir.LoweringRule:
    def rule(context: mlir.LoweringRuleContext, *operands: mlir.Value, **params: object) -> IrValues:
      def lower(fun: Callable[..., PyTree]) -> IrValues:
        return mlir.lower_fun(fun, multiple_results=multiple_results)(context, *operands, **params)

      return lowering(lower, context, *operands, **params)

    return rule

  for platform, lowering in lowerings.items():
    rule = rule_of(lowering)
    mlir.register_lowering(primitive, rule, platform=platform, cacheable=not depends_on_operands)

  def batch(axis: Any, operands: Values, axes: Sequence[Axis], **params: object) -> Batched:
    if all(a is None for a in axes):
      results = primitive.bind(*operands, **params)
      return results, [None] * len(results) if multiple_results else None
    names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
    mapped = jax.vmap(functools.partial(plain, **params), tuple(axes), axis_size=axis.size, **names)
    results = mapped(*operands)
    return results, [0] * len(results) if multiple_results else 0

  def jvp(primals: Values, tangents: Values, **params: object) -> tuple[PyTree, PyTree]:
    _, found = jvp_of(functools.partial(plain, **params), primals, tangents)
    found = [ad.Zero(jax.typeof(t)) if t.dtype == jax.dtypes.float0 else t for t in jax.tree.leaves(found)]
    return primitive.bind(*primals, **params), found if multiple_results else found[0]

  batching.fancy_primitive_batchers[primitive] = batch
  ad.primitive_jvps[primitive] = jvp
  return primitive


def jvp_of(fun: Callable[..., PyTree], primals: Values, tangents: Values) -> tuple[PyTree, PyTree]:
  """`jax.jvp` of `fun(*primals)`, where some tangents may be symbolic zeros."""
  active = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero | SymbolicZero)]

  def of_active(*values: jax.Array) -> PyTree:
    operands = list(primals)
    for i, value in zip(active, values, strict=True):
      operands[i] = value
    return fun(*operands)

  return jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])


def make_hint(
  name: str, lowerings: Mapping[str | None, Lowering], *, all_operands: bool = False, depends_on_operands: bool = False
) -> Primitive:
  """Makes a primitive that returns its first operand, or all operands, and whose lowering tells XLA something.

  Args:
    name: the name of the primitive.
    lowerings: as for `make`. They work for operands with any further axes.
    all_operands: whether it returns all operands, as a list. If not, the others have the shape of the first one, and
      only say what it is computed from or has to wait for.
    depends_on_operands: as for `make`.
  """

  def same(*operands: jax.Array, **_: object) -> PyTree:
    return list(operands) if all_operands else operands[0]

  primitive = make(name, same, same, lowerings, multiple_results=all_operands, depends_on_operands=depends_on_operands)

  def batch(_: object, operands: Values, axes: Sequence[Axis], **params: object) -> Batched:
    if all_operands:
      return primitive.bind(*operands, **params), list(axes)
    first, *others = operands
    fitting = [_like_first(x, a, first, axes[0]) for x, a in zip(others, axes[1:], strict=True)]
    return primitive.bind(first, *fitting, **params), axes[0]

  def jvp(primals: Values, tangents: Values, **params: object) -> tuple[PyTree, PyTree]:
    return primitive.bind(*primals, **params), same(*tangents)

  def transpose(cotangents: PyTree, *operands: object, **_: object) -> list[jax.Array | None]:
    given = cotangents if all_operands else [cotangents, *[None] * (len(operands) - 1)]
    return [ct if ad.is_undefined_primal(x) else None for ct, x in zip(given, operands, strict=True)]

  batching.fancy_primitive_batchers[primitive] = batch
  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose
  return primitive


def _like_first(x: jax.Array, axis: Axis, first: jax.Array, first_axis: Axis) -> jax.Array:
  """Gives an operand a mapped axis if the first operand has one, and removes it if not."""
  if first_axis is None:
    return x if axis is None else jax.lax.index_in_dim(x, 0, axis, keepdims=False)  # the hint holds for any member
  if axis is None:
    return jnp.broadcast_to(jnp.expand_dims(x, first_axis), first.shape)
  return jnp.moveaxis(x, axis, first_axis)
