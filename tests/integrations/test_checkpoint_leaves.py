"""Checkpoints of leaves of every kind: each is restored exactly, or raises an error that names it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_mpo.checkpoint import Checkpointer
from tests.helpers import assert_same_bits

DTYPES = (
  "float8_e3m4 float8_e4m3 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
  "float4_e2m1fn float16 bfloat16 float32 int2 uint2 int4 uint4 int8 uint8 int16 uint16 int32 uint32 bool complex64"
).split()


def sharded(x, *spec):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return jax.device_put(x, NamedSharding(mesh, P(*spec)))


LEAVES = {
  **{name: lambda name=name: jnp.array([0, 1, 1]).astype(name) for name in DTYPES},
  "key": lambda: jax.random.key(0),
  "keys": lambda: jax.random.split(jax.random.key(0), 3),
  "rbg": lambda: jax.random.key(1, impl="rbg"),
  "unsafe_rbg": lambda: jax.random.split(jax.random.key(1, impl="unsafe_rbg"), (2, 2)),
  "sharded keys": lambda: sharded(jax.random.split(jax.random.key(0), 8), "data"),
  "replicated key": lambda: sharded(jax.random.key(0)),
  "no keys": lambda: jax.random.split(jax.random.key(0), 8)[:0],
  "empty": lambda: jnp.zeros((0, 3)),
  "empty int4": lambda: jnp.zeros((3, 0), jnp.int4),
  "empty sharded": lambda: sharded(jnp.zeros((0, 8)), None, "data"),
  "complex scalar": lambda: jnp.asarray(1 + 2j),
  "not finite": lambda: jnp.array([jnp.nan, -jnp.inf, -0.0]),
  "scalar": lambda: jnp.float32(3),
  "flag": lambda: jnp.array(True),
  "nnx.State": lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
  "nnx.Rngs": lambda: nnx.state(nnx.Rngs(0)),
}

OF_THE_HOST = {
  "int": 7,
  "large int": 2**40,
  "float": 0.1,
  "bool": True,
  "complex": 1 + 0.1j,
  "np.float32": np.float32(0.1),
  "np.float64": np.float64(0.1),
  "np.bool": np.bool_(True),
  "np.uint64": np.uint64(2**63),
  "int64 array": np.arange(3) + 2**40,
  "float64 array": np.array([[0.1], [np.nan]]),
  "complex128 array": np.array([0.1j]),
  "empty array": np.zeros((0, 2)),
  "transposed": np.arange(6.0).reshape(2, 3).T,
}


def saved_and_restored(folder, tree, like):
  with Checkpointer(folder) as checkpoints:
    checkpoints.save(1, tree)
  with Checkpointer(folder) as checkpoints:
    return checkpoints.restore(like)[1]


@pytest.mark.parametrize("like", ["arrays", "shapes"])
@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.few(27)
def test_every_leaf_comes_back(name, like, tmp_path):
  tree = {"other": jnp.ones(2), "leaf": LEAVES[name]()}
  got = saved_and_restored(tmp_path, tree, tree if like == "arrays" else jax.eval_shape(lambda: tree))
  assert_same_bits(got, tree)
  if like == "arrays":
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, tree)


@pytest.mark.parametrize("name", OF_THE_HOST)
def test_numbers_of_the_host_come_back_in_full(name, tmp_path):
  want = OF_THE_HOST[name]
  got = saved_and_restored(tmp_path, [want], [want])[0]
  assert type(got) is type(want)
  np.testing.assert_array_equal(got, want)
  assert np.asarray(got).dtype == np.asarray(want).dtype
  if np.asarray(want).dtype != np.uint64 and np.max(np.abs(want), initial=0) < 2**31:
    shapes = jax.eval_shape(lambda: jnp.asarray(want))
    got = saved_and_restored(tmp_path / "jax", [want], [shapes])[0]
    assert_same_bits(got, jnp.asarray(want))


def test_numbers_that_jax_cannot_hold_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"tree\['n'\] was saved as int64 and has numbers beyond int32.*NumPy array"):
    saved_and_restored(tmp_path, {"n": 2**40}, {"n": jnp.zeros([], jnp.int32)})
  with Checkpointer(tmp_path) as checkpoints:  # what the error recommends
    assert checkpoints.restore({"n": np.zeros([], np.int64)})[1]["n"] == 2**40


def test_sixty_four_bits(tmp_path):
  with jax.enable_x64(True):
    tree = {"f": jnp.array([0.1]), "i": jnp.array(2**40), "c": jnp.array([[0.1j]]), "python": 0.1, "e": jnp.zeros((0,))}
    got = saved_and_restored(tmp_path, tree, tree)
    assert isinstance(got.pop("python"), float)
    del tree["python"]
    assert_same_bits(got, tree)
    assert {k: x.dtype.name for k, x in got.items()} == {
      "f": "float64",
      "i": "int64",
      "c": "complex128",
      "e": "float64",
    }


@pytest.mark.parametrize("tree", [{}, [], None, {"a": None}, {"a": jnp.zeros((0,))}, {"a": jnp.zeros((0,)), "b": ()}])
def test_trees_without_anything_to_write(tree, tmp_path):
  assert_same_bits(saved_and_restored(tmp_path, tree, tree), tree)


@pytest.mark.parametrize("leaf", ["text", print, np.zeros(2, jax.dtypes.float0), np.array(["a"]), object()])
def test_what_is_no_number_is_named(leaf, tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(TypeError, match=r"save: tree\['a'\]\[1\] is of the dtype"):
      checkpoints.save(1, {"a": [1, leaf]})
    assert checkpoints.steps() == []


def test_another_implementation_of_keys_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"tree\['key'\] is key<fry>\[\], and it is to be key<rbg>\[\]"):
    saved_and_restored(tmp_path, {"key": jax.random.key(0)}, {"key": jax.random.key(0, impl="rbg")})


def test_keys_onto_a_mesh(tmp_path):
  keys = jax.random.split(jax.random.key(0), 8)
  like = sharded(keys, "data")
  for i, form in enumerate((like, jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding))):
    got = saved_and_restored(tmp_path / str(i), [keys], [form])[0]
    assert got.sharding == like.sharding
    assert_same_bits(got, keys)
