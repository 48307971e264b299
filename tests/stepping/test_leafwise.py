"""Ordinary updates that run leaf by leaf: by rows on CPUs, with kernels, and with state in host memory."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._core import host
from optax_mpo._updates import by_leaf


def counting(inner: optax.GradientTransformation, calls: list) -> optax.GradientTransformation:
  def update(updates, state, params=None):
    calls.append(None)
    return inner.update(updates, state, params)

  return optax.GradientTransformation(inner.init, update)


# As users have them, without modes (tests/conftest.py): JAX traces again in another mode.
compensated, with_kernels = mpo.compensated.__wrapped__, mpo.with_kernels.__wrapped__
CASES = {  # a wrapper, the memory of the state, and how often the wrapper runs the update
  "rows": (lambda inner: compensated(mpo.quantized_state.__wrapped__(inner)), None, 2),
  "kernels": (lambda inner: with_kernels(compensated(inner)), None, 1),
  "state on the host": (compensated, "pinned_host", 1),
  "kernels, state on the host": (lambda inner: with_kernels(compensated(inner)), "pinned_host", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_traced_once_and_taken_apart(case, monkeypatch, default_promotion):
  calls, taken, replaced = [], by_leaf.Update.__init__, []
  wrap, memory, runs = CASES[case]
  tx = wrap(counting(optax.adamw(1e-2), calls))
  params, state = mpo.init(tx, {"w": jnp.full((1024, 512), 0.3), "b": jnp.ones(8)}, state_memory=memory)
  assert memory is None or any(map(host.is_on_host, jax.tree.leaves(state)))
  monkeypatch.setattr(by_leaf.Update, "__init__", lambda *args, **kwargs: replaced.append(taken(*args, **kwargs)))
  calls.clear()
  jax.make_jaxpr(tx.update)(params, state, params)
  assert len(replaced) == 1
  assert len(calls) == runs
