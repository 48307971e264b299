"""Master weights as safetensors files: exact to the bit, and errors that name the weight."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from optax_mpo.export import load_safetensors, save_safetensors
from tests.helpers import assert_same_bits


def masters():
  odd = jnp.array([0.1, -0.0, jnp.inf, -jnp.inf, 1e-40, 3.4e38, 1 / 3, 2.0**-126], jnp.float32)
  return {"blocks": [{"w": odd}, {"w": odd[::-1]}], "head": jax.random.normal(jax.random.key(0), (16, 8))}


@pytest.mark.parametrize("bits", [16, 8, 0])
def test_masters_come_back_bit_for_bit(tmp_path, bits):
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)), extra_bits=bits)
  params, state = mpo.init(tx, masters(), where=lambda path, leaf: path[-1].key != "head")
  save_safetensors(tmp_path / "m.safetensors", params, state, {"step": "7"})
  want = mpo.master_params(params, state)
  got = load_safetensors(tmp_path / "m.safetensors", params)
  assert_same_bits(got, want)
  again = mpo.master_params(*mpo.init(tx, got, where=lambda path, leaf: path[-1].key != "head"))
  assert_same_bits(again, want)
  plain = safetensors.numpy.load_file(tmp_path / "m.safetensors")
  assert sorted(plain) == ["blocks.0.w", "blocks.1.w", "head"]
  assert all(x.dtype == np.float32 for x in plain.values())
  if bits == 16:
    assert_same_bits(got, masters())


def test_float8_is_written_as_masters(tmp_path):
  tx = mpo.compensated(optax.adamw(1e-3))
  params, state = mpo.init(tx, {"w": jax.random.normal(jax.random.key(0), (16, 40))}, dtype=jnp.float8_e4m3fn)
  save_safetensors(tmp_path / "m.safetensors", params, state)
  got = load_safetensors(tmp_path / "m.safetensors", params)
  assert_same_bits(got, mpo.master_params(params, state))
  assert_same_bits(mpo.init(tx, got, dtype=jnp.float8_e4m3fn), (params, state))


def test_bf16_weights_of_other_tools_stay_what_they_are(tmp_path):
  weights = {"w": jnp.linspace(-1, 1, 64).astype(jnp.bfloat16)}
  safetensors.numpy.save_file({"w": np.asarray(weights["w"])}, tmp_path / "m.safetensors")
  got = load_safetensors(tmp_path / "m.safetensors", jax.eval_shape(lambda: weights))
  assert_same_bits(got, weights)
  params, _ = mpo.init(mpo.compensated(optax.sgd(0.1), extra_bits=8), got)
  assert_same_bits(params, weights)


def test_onto_a_mesh(tmp_path):
  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jax.random.normal(jax.random.key(0), (16, 8))})
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharded = jax.device_put(params, NamedSharding(mesh, P("data")))
  save_safetensors(tmp_path / "m.safetensors", sharded, jax.device_put(state, mpo.state_sharding(sharded, state)))
  got = load_safetensors(tmp_path / "m.safetensors", sharded)
  assert got["w"].sharding == sharded["w"].sharding
  assert_same_bits(jax.device_get(got), jax.device_get(mpo.master_params(params, state)))


@pytest.mark.parametrize(
  ("like", "message"),
  [
    ({"w": jnp.ones(3), "b": jnp.ones(1)}, r"has no b\. Is it of this model"),
    ({}, r"also has w\. Is it"),
    ({"w": jnp.ones(4)}, r"w has shape \[3\], and it is to be \[4\]"),
  ],
)
def test_a_file_of_another_model_is_an_error_that_names_the_weight(tmp_path, like, message):
  tx = mpo.compensated(optax.sgd(0.1))
  save_safetensors(tmp_path / "m.safetensors", *mpo.init(tx, {"w": jnp.ones(3)}))
  with pytest.raises(ValueError, match=message):
    load_safetensors(tmp_path / "m.safetensors", like)


def test_names_that_collide_and_files_that_are_torn(tmp_path):
  tx = mpo.compensated(optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"two leaves would be named a\.b"):
    save_safetensors(tmp_path / "m.safetensors", *mpo.init(tx, {"a": {"b": jnp.ones(3)}, "a.b": jnp.ones(3)}))
  assert not list(tmp_path.iterdir())
  state = mpo.init(tx, {"w": jnp.ones(3)})
  save_safetensors(tmp_path / "m.safetensors", *state)
  whole = (tmp_path / "m.safetensors").read_bytes()
  (tmp_path / "m.safetensors").write_bytes(whole[:-1])
  with pytest.raises(ValueError, match=r"m\.safetensors cannot be read .* is it whole"):
    load_safetensors(tmp_path / "m.safetensors", state[0])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  tx = mpo.compensated(optax.sgd(0.1))
  state = mpo.init(tx, {"w": jnp.ones(3)})
  save_safetensors(tmp_path / "m.safetensors", *state)
  before = (tmp_path / "m.safetensors").read_bytes()
  monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
  with pytest.raises(OSError, match="disk full"):
    save_safetensors(tmp_path / "m.safetensors", *mpo.init(tx, {"w": jnp.zeros(3)}))
  assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
  assert (tmp_path / "m.safetensors").read_bytes() == before
