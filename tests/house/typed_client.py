"""A small client with types, which pyright and mypy check (.ci/run): the package's annotations as a user meets them."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import optax_mpo as mpo

Params = dict[str, jax.Array]


def loss_fn(params: Params, x: jax.Array) -> jax.Array:
  return jnp.mean((x @ params["w"]).astype(jnp.float32) ** 2)


def train(masters: Params, x: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
  chain = optax.chain(mpo.record_norms("grad_norm"), mpo.clip_by_delayed_norm(1.0), optax.adamw(1e-3))
  tx = mpo.exact(chain)
  assert_type(tx, optax.GradientTransformationExtraArgs)
  assert_type(
    mpo.compensated(mpo.quantized_state(chain, state_bits=8), extra_bits=8), optax.GradientTransformationExtraArgs
  )
  params, opt_state = mpo.init(tx, masters, where=mpo.matrices("layers"))

  table = mpo.explain(loss_fn, tx, params, opt_state, x)
  assert_type(table, mpo.Explanation)
  assert_type(table[0].name, str)

  step = jax.jit(mpo.value_and_update(loss_fn, tx), donate_argnums=(0, 1))
  value, params, opt_state = step(params, opt_state, x)
  report = mpo.gpu_memory(step, params, opt_state, x, target="h100")
  assert_type(report, mpo.MemoryReport)
  assert_type(report.total_bytes, int)

  weights: Params = mpo.master_params(params, opt_state)
  numbers: dict[str, Any] = mpo.recorded(opt_state)
  return weights, {**numbers, "loss": value}
