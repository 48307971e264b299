"""A reduction of what a scalar selects is made of each case: the same bits, and it does not wait for the scalar."""

import jax
import jax.numpy as jnp
import pytest

from optax_mpo._program import dataflow, jax_forms, selects
from tests.helpers import assert_same_bits

X = jax.random.normal(jax.random.key(0), (3, 4))
ONE_OF_TWO = {
  "scalar": lambda s, x: jnp.sum(jnp.square(jnp.where(s > 0.0, x, 1.0)), axis=0),
  "kept axes": lambda s, x: jnp.max(2.0 * jnp.where(jnp.reshape(s, (1, 1)) > 0.0, x, -x)),
  "twice": lambda s, x: jnp.min((y := jnp.where(s > 0.0, x, 1.0)) * jnp.abs(y) + x),
  "selected at last": lambda s, x: jnp.where(s > 0.0, x, 1.0),
  "two scalars": lambda s, x: jnp.sum(jnp.where(s > 0.0, x, 1.0) * jnp.where(s > 1.0, x, 2.0)),
  "an array selects": lambda s, x: jnp.sum(jnp.where(x > s, x, 1.0)),
}


@pytest.mark.parametrize("name", list(ONE_OF_TWO))
@pytest.mark.parametrize("scalar", [-1.0, 0.5, 2.0])
def test_reductions_of_selected_arrays(name, scalar):
  program, _ = jax_forms.trace(ONE_OF_TWO[name], jnp.float32(0), X)
  env = dict(program.constants) | dict(zip(program.inputs, (jnp.float32(scalar), X), strict=True))
  selects.run(program, program.operations, env)
  assert_same_bits(jax_forms.value(program.outputs[0], env), ONE_OF_TWO[name](jnp.float32(scalar), X))


@pytest.mark.parametrize("name", ["scalar", "kept axes", "twice"])
def test_the_reductions_do_not_read_the_scalar(name):
  program, _ = jax_forms.trace(ONE_OF_TWO[name], jnp.float32(0), X)

  def run(scalar, x):
    env = dict(program.constants) | dict(zip(program.inputs, (scalar, x), strict=True))
    selects.run(program, program.operations, env)
    return jax_forms.value(program.outputs[0], env)

  new, _ = jax_forms.trace(run, jnp.float32(0), X)
  needed = dataflow.slice_of(new, new.outputs, set(new.inputs))
  depends = dataflow.dependencies(new, [1, 0])
  reductions = [o for o in needed if o.name in selects.REDUCTIONS]
  assert len(reductions) == 2
  assert not any(depends[a] for o in reductions for a in o.inputs)
