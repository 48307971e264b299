"""Flattens jaxprs into programs: lists of operations that can be inspected, cut into slices and run.

Why: gradient release, automatic or by layers, takes a training step apart, down to single leaves. It needs to know what
an operation depends on, and to run some operations and not others.

How: `flatten` traces nothing. It copies a jaxpr into a `Program`, inlines its nested calls (jit, custom_jvp_call, ...)
and numbers its variables. `dataflow` says what in it depends on what.
Everything that depends on how a JAX version writes jaxprs is in this module.
"""

import contextlib
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval

from optax_mpo._core import order
from optax_mpo._core.annotations import PyTree, Shaped, Values
from optax_mpo._program.program import Atom, Operation, Program, type_of

_PACKAGE, _JAX = pathlib.PurePath(__file__).parents[1], pathlib.PurePath(jax.__file__).parent
# The update of a transformation, as Optax writes it. Those that only pass on what others compute are none.
_UPDATE = re.compile(r"\b((?!(?:with_extra_args_support|wrapped_transform|chain)\b)\w+)\.<locals>\.update(?:_fn)?$")

# Calls that mean no more than the operations in them, once nothing is to be differentiated.
CALLS = frozenset(
  {"jit", "pjit", "closed_call", "eval_jaxpr", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "remat"}
)


def trace(fun: Callable[..., PyTree], *args: PyTree) -> tuple[Program, PyTree]:
  """Traces `fun(*args)`, and returns its program and the tree of shapes that it returns.

  The arguments may be ShapeDtypeStructs. Arrays that `fun` closes over become constants.
  """
  closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
  return flatten(closed), out


def flatten(closed: core.ClosedJaxpr, calls: frozenset[str] = CALLS) -> Program:
  """Copies a jaxpr into a program, and inlines the calls named in `calls`."""
  program = Program(source=closed)

  def inline(jaxpr: core.Jaxpr, consts: Values, args: Sequence[Atom], caller: core.JaxprEqn | None) -> list[Atom]:
    env: dict[core.Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      env[var] = number = program.new(type_of(var))
      program.constants[number] = const

    def read(var: core.Var | core.Literal) -> Atom:
      return var if isinstance(var, core.Literal) else env[var]

    for eqn in jaxpr.eqns:
      inputs = [read(v) for v in eqn.invars]
      if eqn.primitive.name in calls:
        results = inline(*_called(eqn), inputs, caller or eqn)
        env.update(zip(eqn.outvars, results, strict=True))
        continue
      outputs = []
      for var in eqn.outvars:
        if isinstance(var, core.DropVar):
          outputs.append(-1)
        else:
          env[var] = number = program.new(type_of(var))
          outputs.append(number)
      program.operations.append(Operation(eqn, tuple(inputs), tuple(outputs), caller, _branches(eqn)))
    return [read(v) for v in jaxpr.outvars]

  program.inputs = [program.new(type_of(v)) for v in closed.jaxpr.invars]
  program.outputs = inline(closed.jaxpr, closed.consts, program.inputs, None)
  return program


def _branches(eqn: core.JaxprEqn) -> tuple[Program, ...]:
  return tuple(flatten(_closed(b)) for b in eqn.params["branches"]) if eqn.primitive.name == "cond" else ()


def _called(eqn: core.JaxprEqn) -> tuple[core.Jaxpr, Values]:
  called = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
  return _open(called)


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> tuple[core.Jaxpr, Values]:
  """Returns a closed or open jaxpr as an open one, and its constants."""
  return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


@functools.cache
def _no_debug_info() -> core.DebugInfo:
  return jax.make_jaxpr(lambda: ())().jaxpr.debug_info


def run_operation(operation: Operation, values: Values, **changes: object) -> list[jax.Array]:
  """Runs one operation on its operands, with some of its params changed."""
  eqn = operation.eqn
  if operation.name == "optimization_barrier":
    return order.barrier(values)
  if operation.bodies and len(operation.outputs) != len(eqn.outvars):
    return lax.switch(values[0], [functools.partial(call, body) for body in operation.bodies], *values[1:])
  if changes:
    params = eqn.primitive.get_bind_params({**eqn.params, **changes})
    with eqn.ctx.manager if hasattr(eqn, "ctx") else contextlib.nullcontext():
      results = eqn.primitive.bind(*values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]
  # Run as a jaxpr of its own, an operation keeps its line of code and its name scope, for profiles and reports.
  named = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)}
  jaxpr = core.Jaxpr((), list(named), eqn.outvars, [eqn], debug_info=_no_debug_info())
  return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*named.values())


def run(program: Program, operations: Iterable[Operation], env: dict[int, jax.Array]) -> None:
  """Runs operations in order, reading and writing `env`."""
  for operation in operations:
    results = run_operation(operation, [operand(a, env) for a in operation.inputs])
    env.update((v, r) for v, r in zip(operation.outputs, results, strict=True) if v >= 0)


def call(program: Program, *args: jax.Array) -> list[jax.Array]:
  """Runs a whole program on the values of its inputs."""
  env = dict(program.constants) | dict(zip(program.inputs, args, strict=True))
  run(program, program.operations, env)
  return [value(a, env) for a in program.outputs]


def call_source(program: Program, *args: jax.Array) -> list[jax.Array]:
  """The same, but differentiated as its author wrote it, with custom derivatives."""
  assert program.source is not None
  consts = list(program.constants.values())[: len(program.source.consts)]  # those of inlined calls come after these
  return core.jaxpr_as_fun(core.ClosedJaxpr(program.source.jaxpr, consts))(*args)


def operand(atom: Atom, env: dict[int, jax.Array]) -> jax.Array:
  """The value of an atom as an operand; a literal becomes a NumPy array of its dtype, also with `jax_enable_x64`."""
  return env[atom] if isinstance(atom, int) else cast(jax.Array, np.asarray(atom.val, type_of(atom).dtype))


def value(atom: Atom, env: dict[int, jax.Array]) -> jax.Array:
  """The value of an atom; a literal becomes a JAX array of its dtype."""
  return env[atom] if isinstance(atom, int) else jnp.asarray(atom.val, type_of(atom).dtype)


# --- Scans ------------------------------------------------------------------------------------------------------------


def _closed(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.ClosedJaxpr:
  return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def scan_counts(operation: Operation) -> tuple[int, int, int]:
  """The numbers of a scan's constant, carried and scanned operands."""
  params = operation.eqn.params
  if "num_consts" in params:
    consts, carry = params["num_consts"], params["num_carry"]
    return consts, carry, len(operation.inputs) - consts - carry
  consts, carry, xs = (len(part) for part in params["ft_in"].unpack())  # from JAX 0.11 on
  return consts, carry, xs


def read_scan(operation: Operation) -> tuple[int, int, Program] | None:
  """The numbers of a scan's constant and carried operands, and its body; None if this JAX is unknown."""
  try:
    consts, carry, _ = scan_counts(operation)
    return consts, carry, flatten(scan_body(operation))
  except _NOT_THERE:
    return None


def scan_options(operation: Operation) -> dict[str, Any]:
  """The keyword arguments with which `lax.scan` makes such a scan: length, reverse and unroll."""
  return {name: operation.eqn.params[name] for name in ("length", "reverse", "unroll")}


def bodies(operation: Operation) -> Iterator[Program]:
  """The programs that an operation runs on its operands, except the condition of a while loop."""
  for name, param in operation.eqn.params.items():
    for x in param if isinstance(param, tuple | list) else (param,):
      if isinstance(x, core.ClosedJaxpr | core.Jaxpr) and name != "cond_jaxpr":
        yield flatten(_closed(x))


def cut_scan(operation: Operation, used: list[bool]) -> Operation:
  """A `scan` with only the results that are used, as far as JAX's own rule cuts it; else whole, also correct."""
  rule: Any = partial_eval.dce_rules.get(operation.eqn.primitive)
  if rule is None or misread_scan():
    return operation
  try:
    used_inputs, eqn = rule(used, operation.eqn)
  except TypeError:  # from JAX 0.11 on, it also asks which operands may be written to
    used_inputs, eqn = rule(used, [True] * len(operation.inputs), operation.eqn)
  if all(used) and all(used_inputs):
    return operation
  kept = {id(v) for v in eqn.outvars}  # the used results, and the carry that they need
  outputs = tuple(o for o, v in zip(operation.outputs, operation.eqn.outvars, strict=True) if id(v) in kept)
  inputs = tuple(a for a, wanted in zip(operation.inputs, used_inputs, strict=True) if wanted)
  return Operation(eqn, inputs, outputs, operation.caller)


# --- Names for errors -------------------------------------------------------------------------------------------------


def where(operation: Operation) -> str:
  """Names an operation, the line of code that asked for it, and the transformation it is part of.

  Such as `add (tree_sum, _tree_math.py:199, in clip_by_global_norm)`. The transformation is the innermost one: wrappers
  around it, such as `optax.inject_hyperparams`, say nothing about an operation. Lines of this package are left out.
  """
  for eqn in (operation.eqn, operation.caller):
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    line, maker = "", ""
    for frame in getattr(traceback, "frames", ()):
      path = pathlib.PurePath(frame.file_name)
      ours = path.is_relative_to(_PACKAGE)
      if line and ours:
        break
      if not line and not ours and not path.is_relative_to(_JAX):
        line = f"{frame.function_name.replace('.<locals>', '')}, {path.name}:{frame.line_num}"
      if made := _UPDATE.search(frame.function_name):
        maker = "" if f"{made[1]}." in line else f"in {made[1]}"
        break
    if line or maker:
      return f"`{operation.name}` ({', '.join(filter(None, (line, maker)))})"
  return f"`{operation.name}`"


# --- JAX versions -----------------------------------------------------------------------------------------------------

KNOWN = "JAX 0.10.2 to 0.12"
_NOT_THERE = (AttributeError, KeyError, TypeError, ValueError)


@functools.cache
def _sample() -> core.ClosedJaxpr:
  """A derivative with everything that `flatten_towards` and the callers of `scan_counts` and `scan_body` rely on."""

  def loss(w: jax.Array, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
      return jax.jit(jnp.tanh)(x * w), None

    return jnp.sum(lax.scan(jax.checkpoint(layer), x, w)[0])

  return jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 2)), jnp.ones(2))


def misread_scan() -> str:
  """Says what in a scan is not where this module expects it; empty if all is."""
  scans: list[Operation] = []
  try:
    scans += [operation for operation in flatten(_sample()).operations if operation.name == "scan"]
    for operation in scans:
      counts, body = scan_counts(operation), scan_body(operation)
      if sum(counts) != len(operation.inputs) or len(body.jaxpr.invars) != sum(counts):
        return f"a scan of {len(operation.inputs)} operands seems to have {counts}"
      scan_options(operation)
  except _NOT_THERE as error:
    return f"a scan has no {error}, but {sorted(scans[0].eqn.params)}" if scans else f"a call has no {error}"
  return "" if len(scans) == 2 else f"a scan and its derivative are {len(scans)} scans"


def check_forms(caller: str) -> None:
  """Raises NotImplementedError if this JAX writes jaxprs in a way that this module does not know."""
  misread = misread_scan()
  if misread:
    raise NotImplementedError(
      f"{caller}: this is JAX {jax.__version__}, and {caller} reads the programs of {KNOWN}: here, {misread}. Install "
      "one of these, or use fused_value_and_update with fused_layer and fused_scan, which do not read loss functions."
    )


# --- Gradients --------------------------------------------------------------------------------------------------------


def flatten_towards(closed: core.ClosedJaxpr, wanted: Sequence[bool], transparent: frozenset[str]) -> Program:
  """Copies a jaxpr into a program, and inlines only the calls that make `wanted` outputs.

  A wanted output is followed back through the operations named in `transparent`. A `remat` call is inlined together
  with the barrier that it implies on its operands.
  """
  program = Program(source=closed)

  def follow(jaxpr: core.Jaxpr, flags: Sequence[bool]) -> set[core.Var]:
    found = {v for v, flag in zip(jaxpr.outvars, flags, strict=True) if flag and not isinstance(v, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
      flags = [v in found for v in eqn.outvars]
      if not any(flags):
        continue
      if _is_inlined(eqn):
        inner, _ = _called(eqn)
        inside = follow(inner, flags)
        flags = [v in inside for v in inner.invars]
      else:
        flags = [eqn.primitive.name in transparent] * len(eqn.invars)
      found.update(v for v, flag in zip(eqn.invars, flags, strict=True) if flag and not isinstance(v, core.Literal))
    return found

  def inline(
    jaxpr: core.Jaxpr, consts: Values, args: Sequence[Atom], flags: Sequence[bool], caller: core.JaxprEqn | None
  ) -> list[Atom]:
    env: dict[core.Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))
    found = follow(jaxpr, flags)
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      env[var] = number = program.new(type_of(var))
      program.constants[number] = const

    def add(eqn: core.JaxprEqn, inputs: list[Atom]) -> list[int]:
      outputs = [-1 if isinstance(v, core.DropVar) else program.new(type_of(v)) for v in eqn.outvars]
      program.operations.append(Operation(eqn, tuple(inputs), tuple(outputs), caller, _branches(eqn)))
      return outputs

    def read(var: core.Var | core.Literal) -> Atom:
      return var if isinstance(var, core.Literal) else env[var]

    for eqn in jaxpr.eqns:
      inputs = [read(v) for v in eqn.invars]
      flags = [v in found for v in eqn.outvars]
      if any(flags) and _is_inlined(eqn):
        held = [i for i, keep in enumerate(_kept_apart(eqn)) if keep and isinstance(inputs[i], int)]
        if held:
          barrier = _barrier([program.aval(inputs[i]) for i in held])
          for i, new in zip(held, add(barrier, [inputs[i] for i in held]), strict=True):
            inputs[i] = new
        results = inline(*_called(eqn), inputs, flags, caller or eqn)
      else:
        results = add(eqn, inputs)
      env.update((v, r) for v, r in zip(eqn.outvars, results, strict=True) if not isinstance(v, core.DropVar))
    return [read(v) for v in jaxpr.outvars]

  program.inputs = [program.new(type_of(v)) for v in closed.jaxpr.invars]
  program.outputs = inline(closed.jaxpr, closed.consts, program.inputs, wanted, None)
  return program


def _is_inlined(eqn: core.JaxprEqn) -> bool:
  """Whether a call means no more than its operations: inlining it loses no derivative, sharding or compiler option."""
  if eqn.primitive.name not in CALLS or eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):
    return False
  shardings = [*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ())]
  return not eqn.params.get("compiler_options_kvs") and all(type(s).__name__ == "UnspecifiedValue" for s in shardings)


def _kept_apart(eqn: core.JaxprEqn) -> Sequence[bool]:
  """Which operands of a call go through a barrier, so that XLA does not merge its recomputation with the first run."""
  apart = eqn.params.get("prevent_cse", False) if eqn.params.get("differentiated") else False
  return [apart] * len(eqn.invars) if isinstance(apart, bool) else list(apart)


def _barrier(avals: Sequence[Shaped]) -> core.JaxprEqn:
  return jax.make_jaxpr(lax.optimization_barrier)([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]).eqns[0]


def scan_body(operation: Operation) -> core.ClosedJaxpr:
  """The body of a scan: constants, carry and one entry of each scanned operand -> carry, one entry of each result."""
  return _closed(operation.eqn.params["jaxpr"])


def consists_of(eqn: core.JaxprEqn, names: frozenset[str]) -> bool:
  """Whether an operation is one of `names`, or a call that contains nothing else."""
  if eqn.primitive.name in CALLS:
    return all(consists_of(e, names) for e in _called(eqn)[0].eqns)
  return eqn.primitive.name in names
