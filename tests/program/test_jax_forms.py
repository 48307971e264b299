"""Programs made from jaxprs compute the same as the function, their dependencies are sound, and slices are small."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._updates import by_leaf


def plain(x, y):
  return jnp.sin(x) * y, x + 1, y


def nested(x, y):
  inner = jax.jit(lambda a, b: (jax.nn.relu(a) * 2, jnp.where(b > 0, b, 0.0)))
  a, b = inner(x, y)
  return a, b, jax.checkpoint(jnp.cos)(y)


def with_cond(x, y):
  big = lax.cond(x.sum() > 0, lambda a, b: (a * 2, b, a * b), lambda a, b: (a, b + 1, b), x, y)
  return big


def nested_cond(x, y):
  def inner(a, b):
    return lax.cond(b.sum() > 0, lambda p, q: (p, q), lambda p, q: (-p, 2 * q), a, b)

  return lax.cond(x[0] > 0, inner, lambda a, b: (a + 1, b - 1), x, y)


def three_way(x, y):
  branches = [lambda a, b: (a, b), lambda a, b: (a + b, b * 3), lambda a, b: (jnp.zeros(3), b)]
  return lax.switch(jnp.int32(x[0]), branches, x, y)


def with_scan(x, y):
  def body(carry, z):
    a, b = carry
    return (a + z[0] * x, b * 2), (z[1], a)

  (a, b), (c, d) = lax.scan(body, (x, y), (jnp.arange(4.0), jnp.arange(4.0) * y[0]))
  return a, b, c, d


def with_while(x, y):
  return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2, c[2] + x), (0, x, y))[1:]


def with_barrier(x, y):
  return lax.optimization_barrier((x * 2, y))


def literals(x, y):
  return 1.0, x, x, jnp.float32(2.0) * y, 3


TABLE = np.arange(3, dtype=np.float32) + 0.5


def closed_over(x, y):
  return x * TABLE, jnp.asarray(TABLE), y @ jnp.eye(3)


FUNCTIONS = [
  plain,
  nested,
  with_cond,
  nested_cond,
  three_way,
  with_scan,
  with_while,
  with_barrier,
  literals,
  closed_over,
]
ARGS = [(jnp.array([a, -2.0, 0.5]), jnp.array([b, 1.0, -0.25])) for a in (1.0, -1.0) for b in (2.0, -2.0)]


def with_name(fun):
  return fun.__name__


@pytest.mark.parametrize("fun", FUNCTIONS, ids=with_name)
def test_programs_compute_what_the_function_does(fun):
  program, _ = jax_forms.trace(fun, *ARGS[0])
  assert {o.name for o in program.operations}.isdisjoint(jax_forms.CALLS)
  for args in ARGS:
    for got, want in zip(jax_forms.call(program, *args), fun(*args), strict=True):
      assert got.dtype == jnp.result_type(want)
      np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fun", FUNCTIONS, ids=with_name)
def test_each_slice_gives_its_output_from_the_inputs_it_is_said_to_depend_on(fun):
  program, _ = jax_forms.trace(fun, *ARGS[0])
  bits = dataflow.output_bits(program, dataflow.dependencies(program, [1, 2]))
  for args in ARGS:
    for i, (atom, want) in enumerate(zip(program.outputs, fun(*args), strict=True)):
      operations = dataflow.slice_of(program, [atom], frozenset())
      env = dict(program.constants)
      env.update((v, x) for v, x, bit in zip(program.inputs, args, (1, 2), strict=True) if bits[i] & bit)
      jax_forms.run(program, operations, env)  # a KeyError here means an input that the dependencies miss
      np.testing.assert_array_equal(jax_forms.value(atom, env), want)


@pytest.mark.parametrize("fun", FUNCTIONS, ids=with_name)
def test_slices_run_under_jit(fun):
  program, _ = jax_forms.trace(fun, *ARGS[0])
  cut = dataflow.slice_of(program, program.outputs[:1], frozenset())

  @jax.jit
  def run(*args):
    env = dict(program.constants) | dict(zip(program.inputs, args, strict=True))
    jax_forms.run(program, cut, env)
    return jax_forms.value(program.outputs[0], env)

  np.testing.assert_array_equal(run(*ARGS[0]), jax.jit(fun)(*ARGS[0])[0])


@pytest.mark.parametrize(
  ("fun", "want"),
  [
    (plain, [3, 1, 2]),
    (with_cond, [1, 3, 3]),  # x is the predicate; the second output is y or y + 1
    (nested_cond, [3, 3]),
    (three_way, [3, 3]),
    (with_scan, [1, 2, 2, 1]),
    (with_barrier, [1, 2]),
    (literals, [0, 1, 1, 2, 0]),
    (closed_over, [1, 0, 2]),
  ],
  ids=lambda x: getattr(x, "__name__", ""),
)
def test_dependencies(fun, want):
  program, _ = jax_forms.trace(fun, *ARGS[0])
  assert dataflow.output_bits(program, dataflow.dependencies(program, [1, 2])) == want


def test_dependencies_run_through_the_carry_of_a_scan():
  # Each result of the carry needs at least its own initial value.
  def fun(a, b, c):
    return lax.scan(lambda s, _: ((s[1], s[2], s[2]), s[0]), (a, b, c), None, length=4)

  program, _ = jax_forms.trace(fun, 1.0, 2.0, 3.0)
  assert dataflow.output_bits(program, dataflow.dependencies(program, [1, 2, 4])) == [
    7,
    6,
    4,
    7,
  ]


def test_a_cond_is_cut_down_to_what_is_used():
  def fun(flag, xs):
    return lax.cond(flag, lambda xs: [x * 2 for x in xs], lambda xs: [jnp.sin(x) for x in xs], xs)

  program, _ = jax_forms.trace(fun, True, [1.0, 2.0, 3.0])
  cut = dataflow.slice_of(program, [program.outputs[1]], frozenset())[-1]
  assert cut.inputs[1:] == (program.inputs[2],)
  assert len(cut.outputs) == 1
  assert [len(b.operations) for b in cut.bodies] == [1, 1]


def test_a_scan_is_cut_down_to_what_is_used():
  def fun(x, y, xs):
    return lax.scan(lambda c, z: ((c[0] + z[0], c[1] * y), (c[0], z[1])), (x, y), xs)

  program, _ = jax_forms.trace(fun, 1.0, 2.0, (jnp.ones(3), jnp.ones(3)))
  (cut,) = dataflow.slice_of(program, [program.outputs[2]], frozenset())
  assert jax_forms.scan_counts(cut) == (0, 1, 1)
  assert set(cut.inputs) == {program.inputs[0], program.inputs[2]}
  (whole,) = program.operations
  assert jax_forms.scan_counts(whole) == (1, 2, 2)


def test_a_scan_loses_operands_that_no_result_needs():
  """As the dependencies say. A slice that reads them could not run where they are not known yet."""
  program, _ = jax_forms.trace(lambda x, xs: lax.map(lambda z: z[0] + x, xs), 1.0, (jnp.ones(3), jnp.ones(3)))
  (cut,) = dataflow.slice_of(program, program.outputs, frozenset())
  assert set(cut.inputs) == {program.inputs[0], program.inputs[1]}
  assert len(program.operations[0].inputs) == 3


def test_slices_stop_at_what_is_given():
  program, _ = jax_forms.trace(lambda x: jnp.cos(jnp.sin(x)), 1.0)
  sine = program.operations[0].outputs[0]
  assert [o.name for o in dataflow.slice_of(program, program.outputs, {sine})] == ["cos"]
  assert dataflow.slice_of(program, [sine], {sine}) == []


def test_operations_are_named_with_the_line_that_asked_for_them():
  program, _ = jax_forms.trace(lambda x: jnp.linalg.norm(plain(x, x)[0]), jnp.ones(3))
  names = [jax_forms.where(o) for o in program.operations]
  assert names[0].startswith("`sin` (plain, test_jax_forms.py:")
  assert all("test_jax_forms.py" in name for name in names)


@pytest.mark.parametrize(
  ("make", "name"),
  [
    (lambda wrap: wrap(optax.clip_by_global_norm)(max_norm=1.0), r"`sqrt` \(\w+, \S+:\d+, in clip_by_global_norm\)"),
    (lambda wrap: wrap(mpo.clip_by_delayed_norm)(max_norm=1.0), r"`sqrt` \(in clip_by_delayed_norm\)"),
  ],
)
def test_operations_are_named_with_their_transformation(make, name):
  for wrap in (lambda f: f, optax.inject_hyperparams):
    tx = mpo.compensated(optax.chain(optax.identity(), make(wrap), optax.sgd(0.1)))
    params, state = mpo.init(tx, {"w": jnp.ones(3), "b": jnp.ones(2)})
    program = by_leaf.Update(tx, params, state, "test").program
    (found,) = {jax_forms.where(o) for o in program.operations if o.name == "sqrt"}
    assert re.fullmatch(name, found)


def test_a_coupled_update_names_the_clip_within_inject_hyperparams():
  clip = optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=optax.linear_schedule(1.0, 0.5, 10))
  tx = mpo.compensated(optax.chain(clip, optax.sgd(0.1)))
  params, state = mpo.init(tx, {"w": jnp.ones(3), "b": jnp.ones(3)})
  with pytest.raises(ValueError, match=r"couples .* in `add` \(.*, in clip_by_global_norm\)"):
    mpo.value_and_update(lambda p: jnp.sum(p["w"] * p["b"]), tx)(params, state)


def test_lines_in_a_folder_that_is_called_jax(tmp_path):
  path = tmp_path / "jax" / "mine.py"
  code = compile("def mine(x):\n  return jnp.sin(x)\n", str(path), "exec")
  space = {"jnp": jnp}
  exec(code, space)
  program, _ = jax_forms.trace(space["mine"], jnp.ones(3))
  assert jax_forms.where(program.operations[0]) == "`sin` (mine, mine.py:2)"
