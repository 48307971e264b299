"""Presets, the choice of matrices, and old names of arguments."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from optax_mpo.checkpoint import Checkpointer
from tests.helpers import assert_same_bits

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 64 * 64).reshape(64, 64), "b": jnp.zeros(64)}


@pytest.mark.parametrize(
  ("preset", "spelled_out"),
  [
    (mpo.exact, lambda tx: mpo.compensated(tx, extra_bits=16)),
    (mpo.compact, lambda tx: mpo.compensated(mpo.quantized_state(tx, state_bits=8), extra_bits=8)),
  ],
)
def test_presets_are_what_they_say(preset, spelled_out):
  def trained(tx):
    params, state = mpo.init(tx, PARAMS)
    updates, state = tx.update(PARAMS, state, params)
    return mpo.apply_updates(params, updates), state

  assert_same_bits(trained(preset(optax.adamw(1e-2))), trained(spelled_out(optax.adamw(1e-2))))


@pytest.mark.parametrize("preset", [mpo.exact, mpo.compact])
def test_presets_refuse_what_is_no_transformation(preset):
  with pytest.raises(TypeError, match="inner has to be an Optax transformation, but it is a float"):
    preset(1e-3)


def test_matrices_counts_no_axes_of_layers():
  x = jnp.ones
  params = {
    "embedding": x((8, 4)),
    "norm": x(4),
    "decoder": {"w": x((3, 4, 4)), "b": x((3, 4)), "moe": {"w": x((3, 2, 4, 4)), "b": x((3, 2, 4))}},
    "layers": [x((4, 4)), x(4)],
  }

  def chosen(where):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/")
      for path, yes in jax.tree_util.tree_leaves_with_path(jax.tree_util.tree_map_with_path(where, params))
      if yes
    }

  plain = {"embedding", "layers/0", "decoder/w", "decoder/moe/w"}
  assert chosen(mpo.matrices()) == plain | {"decoder/b", "decoder/moe/b"}
  assert chosen(mpo.matrices("decoder")) == plain | {"decoder/moe/b"}
  assert chosen(mpo.matrices(["decoder", "encoder"])) == plain | {"decoder/moe/b"}
  assert chosen(mpo.matrices({"decoder": 1, "moe": 2})) == plain
  with pytest.raises(TypeError, match="stacked has to be a key, several, or a dict, but it is a int"):
    mpo.matrices(1)


def test_matrices_knows_the_names_in_nnx_modules():
  from flax import nnx

  class Model(nnx.Module):
    def __init__(self, rngs):
      make = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)), in_axes=0)
      self.layers = make(jax.random.split(rngs.params(), 3))
      self.head = nnx.Linear(4, 2, rngs=rngs)

  params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  low, _ = mpo.init(mpo.exact(optax.sgd(0.1)), params, where=mpo.matrices("layers"))
  dtypes = {
    jax.tree_util.keystr(path[:2], simple=True, separator="/"): x.dtype.name
    for path, x in jax.tree_util.tree_leaves_with_path(low)
  }
  assert dtypes == {
    "head/bias": "float32",
    "head/kernel": "bfloat16",
    "layers/bias": "float32",
    "layers/kernel": "bfloat16",
  }


def test_old_names_of_arguments_work_and_warn(tmp_path):
  sgd = optax.sgd(0.1, momentum=0.9)
  with pytest.warns(DeprecationWarning, match="compensated: bits is now called extra_bits"):
    tx = mpo.compensated(sgd, bits=8)
  with pytest.warns(DeprecationWarning, match="quantized_state: bits is now called state_bits"):
    small = mpo.quantized_state(sgd, bits=4)
  assert mpo.init(tx, PARAMS)[1].compensation["w"].dtype == jnp.uint8
  assert small.init(PARAMS).inner_state[0].trace["w"].values.dtype == jnp.int4
  params, _ = mpo.init(tx, PARAMS)
  with pytest.warns(DeprecationWarning, match="lost_updates: bits is now called extra_bits"):
    assert_same_bits(mpo.lost_updates(params, PARAMS, bits=8), mpo.lost_updates(params, PARAMS, 8))
  with pytest.warns(DeprecationWarning, match="Checkpointer: keep is now called max_to_keep"):
    Checkpointer(tmp_path, keep=2).close()
  with pytest.raises(TypeError, match="compensated: bits is the old name of extra_bits"):
    mpo.compensated(sgd, bits=8, extra_bits=8)
  assert list(inspect.signature(mpo.compensated).parameters) == ["inner", "extra_bits", "rounding", "seed"]
