"""Pairs of products: found where one frees an array larger than its result, and only there."""

import math

import jax
import jax.numpy as jnp
import pytest

from optax_mpo._program import jax_forms
from optax_mpo._stepping import pairs, planning

LONG = jnp.zeros((32, 4))


def attention(q, k, v):
  return jax.nn.softmax(q @ k.T) @ v


def shapes(fun, *args):
  program = jax_forms.flatten(jax.make_jaxpr(fun)(*args))
  plan = planning.make_plan(program, [], program.outputs)
  return [tuple(program.aval(v).shape for v in pair) for pair in plan.pairs.values()]


def gradients(fun, *args):
  return shapes(jax.grad(lambda *args: jnp.sum(jnp.sin(fun(*args))), argnums=(0, 1, 2)), *args)


@pytest.mark.parametrize("attend", [attention, lambda q, k, v: (v.T @ jax.nn.softmax(q @ k.T).T).T])
def test_gradients_of_attention_are_pairs(attend):
  """Of weights [32, 32] and values, of which one frees the weights; and of queries and keys. In any order."""
  found = [{math.prod(shape) for shape in pair} for pair in gradients(attend, LONG, LONG, LONG)]
  assert found == [{32 * 32, 32 * 4}, {32 * 4}]


def test_a_forward_pass_has_no_pairs():
  assert not shapes(attention, LONG, LONG, LONG)


def test_products_of_one_input_are_no_pair():
  assert not shapes(lambda x, a, b: (x @ a, x @ b), jnp.zeros((64, 4)), jnp.zeros((4, 2)), jnp.zeros((4, 2)))


@pytest.mark.parametrize("between", [lambda x: x.T, lambda x: x.astype(jnp.bfloat16), jnp.sin])
def test_the_first_result_may_be_moved_before_the_second(between):
  def fun(x, a, b):
    y = jnp.sin(x)
    first, second = between(y @ a), y @ b
    return jnp.sin(first), second

  (pair,) = shapes(fun, jnp.zeros((64, 64)), jnp.zeros((64, 2)), jnp.zeros((64, 4))) or [None]
  assert (pair is None) == (between is jnp.sin), "a result that was computed with is in use already"
  assert pair is None or pair[1] == (64, 4)


def test_skipped_operations_are_in_no_pair():
  program = jax_forms.flatten(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attention(q, LONG, LONG))))(LONG))
  last_use = {v: 10**6 for v in range(len(program.avals))}
  assert not pairs.find(program, last_use, range(len(program.operations)))
