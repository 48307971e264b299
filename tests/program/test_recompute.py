"""Arrays that are made again for each use: the same results, and one barrier and one call for each use."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_mpo._program import jax_forms, recompute

decode = jax.jit(lambda w, s: w.astype(jnp.bfloat16) * s)


def trace(fun, *args):
  program = jax_forms.flatten(jax.make_jaxpr(fun)(*args), calls=frozenset())
  made = next(o.outputs[0] for o in program.operations if o.name in jax_forms.CALLS)
  return program, recompute.for_each_use(program, [made])


def arguments(size):
  rng = np.random.default_rng(0)
  w, x = rng.normal(size=(size, size)), rng.normal(size=(4, size))
  return jnp.asarray(w, jnp.float8_e4m3fn), jnp.full((1, 1), 2, jnp.bfloat16), jnp.asarray(x, jnp.bfloat16)


def two_uses(w, s, x):
  w = decode(w, s)
  return jnp.tanh(x @ w) @ w.T


def names(program):
  return [o.name for o in program.operations if o.name != "convert_element_type"]


def test_each_use_gets_an_array_of_its_own():
  args = arguments(160)
  before, after = trace(two_uses, *args)
  assert names(after).count("optimization_barrier") == 2
  assert names(after).count("jit") == 1 + names(before).count("jit") + 1
  np.testing.assert_array_equal(jax_forms.call(after, *args)[0], jax_forms.call(before, *args)[0])


def test_small_arrays_and_scans_are_left_alone():
  before, after = trace(two_uses, *arguments(32))
  assert after.operations == before.operations

  def scanned(w, s, x):
    return jax.lax.scan(lambda x, row: (x * row[None], None), x, decode(w, s))[0]

  before, after = trace(scanned, *arguments(160))
  assert names(after) == names(before)
