"""Checkpoints: exact round trips in every precision, other meshes, damage, and errors that name the leaf."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from optax_mpo.checkpoint import Checkpointer
from tests.helpers import assert_same_bits
from tests.transforms.test_convert import FORMS, start, trained


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.few(2)
def test_round_trips_are_exact(name, tmp_path):
  saved = trained(name)
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, saved)
  with Checkpointer(tmp_path) as checkpoints:
    step, restored = checkpoints.restore(shapes(saved))
  assert step == 3
  assert_same_bits(restored, saved)
  assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, saved)


def test_keys_booleans_scalars_and_four_bits(tmp_path):
  tree = {
    "key": jax.random.key(3),
    "old_key": jax.random.PRNGKey(3),
    "flag": jnp.array([True, False]),
    "count": 7,
    "numpy": np.arange(3),
    "int4": jnp.array([-8, 7], jnp.int4),
    "none": None,
  }
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree)
    _, restored = checkpoints.restore(tree)
  assert jax.random.key_data(restored["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
  assert restored["flag"].tolist() == [True, False]
  assert restored["int4"].dtype == jnp.int4
  assert restored["int4"].tolist() == [-8, 7]
  assert int(restored["count"]) == 7
  assert restored["none"] is None


def test_the_last_few_are_kept_and_steps_grow(tmp_path):
  with Checkpointer(tmp_path, max_to_keep=2) as checkpoints:
    for step in (1, 2, 5):
      checkpoints.save(step, {"w": jnp.full(3, step)})
    assert checkpoints.steps() == [2, 5]
    with pytest.raises(ValueError, match="step 5 is not after 5"):
      checkpoints.save(5, {"w": jnp.zeros(3)})
    assert checkpoints.restore({"w": jnp.zeros(3, jnp.int32)}, step=2)[1]["w"].tolist() == [2, 2, 2]
    with pytest.raises(FileNotFoundError, match=r"no step 1 in .*, but \[2, 5\]"):
      checkpoints.restore({"w": jnp.zeros(3, jnp.int32)}, step=1)


def test_onto_another_mesh(tmp_path):
  masters = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-2), min_size=1), extra_bits=8)

  def put(shape, spec):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    params, state = mpo.init(tx, masters)
    params = jax.device_put(params, NamedSharding(mesh, spec))
    return params, jax.device_put(state, mpo.state_sharding(params, state))

  saved, like = put((8, 1), P("a")), put((2, 4), P("b", "a"))
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    _, restored = checkpoints.restore(like)
  assert_same_bits(restored, saved)
  for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
    assert got.sharding == want.sharding
  mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
  odd = {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=NamedSharding(mesh, P("a")))}
  with Checkpointer(tmp_path / "odd") as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"tree\['w'\] cannot have the sharding"):
      checkpoints.restore(odd)


def test_another_form_by_way_of_convert(tmp_path):
  saved = trained("f32")
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(3, saved)
    tx, *like = start("compact")
    with pytest.raises(
      ValueError, match=r"tree\[0\]\['b'\] is float32\[96\], and it is to be bfloat16\[96\]\. .*convert"
    ):
      checkpoints.restore(tuple(like))
    _, restored = checkpoints.restore(shapes(saved))
  assert_same_bits(mpo.convert(tx, *restored), mpo.convert(tx, *saved))


@pytest.mark.parametrize(
  ("like", "message"),
  [
    ({"w": jnp.zeros(4)}, r"tree\['w'\] is float32\[3\], and it is to be float32\[4\]"),
    ({"w": jnp.zeros(3), "v": jnp.zeros(3)}, r"has no tree\['v'\]"),
    ({}, r"has tree\['w'\], which has no place"),
  ],
  ids=["shape", "missing", "extra"],
)
def test_another_model_is_named(tmp_path, like, message):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=message):
      checkpoints.restore(like)


def test_another_version_is_named(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(3)})
  file = tmp_path / "1/about/metadata"
  file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(ValueError, match="has the format 99"):
    checkpoints.restore({"w": jnp.zeros(3)})


def test_codes_of_other_levels_are_named(tmp_path):
  tx = mpo.quantized_state(optax.adam(1e-3), min_size=1)
  tree = {"exact": jnp.arange(8.0), "state": tx.init(jnp.zeros((2, 8)))}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"exact": tree["exact"]})
    checkpoints.save(2, tree)
  for step in (1, 2):
    file = tmp_path / f"{step}/about/metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
  with Checkpointer(tmp_path) as checkpoints:
    _, restored = checkpoints.restore({"exact": tree["exact"]}, 1)  # has no codes
    np.testing.assert_array_equal(restored["exact"], tree["exact"])
    with pytest.raises(ValueError, match=r"\.nu\.values of step 2 .* has codes from before"):
      checkpoints.restore(tree)


def flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 0xFF
  file.write_bytes(bytes(data))


def largest(folder):
  return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGES = {
  "a byte": lambda folder: flip(largest(folder / "arrays")),
  "cut off": lambda folder: largest(folder / "arrays").write_bytes(b"123"),
  "gone": lambda folder: shutil.rmtree(folder / "arrays"),
  "names": lambda folder: (folder / "about/metadata").write_text("{"),
}


# If one read fails, Orbax closes its event loop, and the errors of tensorstore's other reads cannot be raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_with_a_warning(tmp_path, damage):
  def tree(i):
    return {"w": jnp.asarray(np.random.default_rng(i).normal(size=(256, 256)), jnp.float32)}

  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, tree(1))
    checkpoints.save(2, tree(2))
  DAMAGES[damage](tmp_path / "2")
  with Checkpointer(tmp_path) as checkpoints:
    with pytest.warns(UserWarning, match=r"the checkpoint of step 2 in .*: taking step 1"):
      step, restored = checkpoints.restore(shapes(tree(0)))
    assert step == 1
    assert_same_bits(restored, tree(1))
    assert (tmp_path / "damaged-2").is_dir()
    checkpoints.save(2, tree(2))
    assert_same_bits(checkpoints.restore(shapes(tree(0)))[1], tree(2))


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.zeros(3)})
  shutil.rmtree(tmp_path / "1/arrays")
  with Checkpointer(tmp_path) as checkpoints:
    with (
      pytest.warns(UserWarning, match="none before it"),
      pytest.raises(FileNotFoundError, match="no whole checkpoint"),
    ):
      checkpoints.restore({"w": jnp.zeros(3)}, step=1)
    assert checkpoints.steps() == [1]


def test_checksums_find_what_a_reader_would_not(tmp_path, monkeypatch):
  """For example elements in another order, which Orbax does not notice."""
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": jnp.arange(8.0)})
    restore = checkpoints._manager.restore

    def swapped(step, args):
      found = restore(step, args=args)
      return {"arrays": {"000000": found["arrays"]["000000"][::-1]}} if "arrays" in found else found

    monkeypatch.setattr(checkpoints._manager, "restore", swapped)
    with pytest.warns(UserWarning, match=r"tree\['w'\] has not the checksum"), pytest.raises(FileNotFoundError):
      checkpoints.restore({"w": jnp.zeros(8)})


def test_nothing_to_restore(tmp_path):
  with Checkpointer(tmp_path) as checkpoints, pytest.raises(FileNotFoundError, match="no whole checkpoint"):
    checkpoints.restore({"w": jnp.zeros(3)})
  with pytest.raises(ValueError, match="keep is 0"):
    Checkpointer(tmp_path, max_to_keep=0)
