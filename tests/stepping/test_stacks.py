"""Stacks of layers as people store and scan them: on any axis, reversed, cut, reshaped, shared.

Each is updated inside its scans, and equals the ordinary step bit for bit. Both sides are compiled as in
`test_property`. There are two stacks: where a scalar divides only one array, XLA multiplies with its reciprocal.
"""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

import optax_mpo as mpo
from tests import random_stacks
from tests.helpers import assert_same_bits, ordinary_step, quick_jit
from tests.random_stacks import alternating, layer, pairs, scan, two_levels

L, D = 8, 16


def exact():
  return mpo.compensated(optax.adamw(1e-2))


def eight_bit():
  return mpo.compensated(mpo.quantized_state(optax.lion(1e-2), min_size=1, block_size=8), extra_bits=8)


def frozen(n, like):
  return jnp.full((n, *like.shape[1:]), 0.1, like.dtype)


def groups(run, x, w):
  """Runs two groups of layers, each with a checkpoint."""
  return lax.scan(jax.checkpoint(lambda x, w: (run(x, w), None)), x, w.reshape(2, -1, *w.shape[1:]))[0]


def masked(w):
  """Trains every other layer."""
  return jnp.where((jnp.arange(L) % 2 == 0)[:, None, None], lax.stop_gradient(w), w)


def padded(x, w):
  """Scans two layers more than there are, which are switched off."""
  more = jnp.concatenate([w, jnp.ones((2, *w.shape[1:]), w.dtype)])
  on = jnp.arange(len(more)) < len(w)
  return lax.scan(lambda x, c: (jnp.where(c[1], layer(x, c[0])[0], x), None), x, (more, on))[0]


WAYS: dict[str, Callable[[Any, Any], Any]] = {
  "first axis": scan,
  "reversed stack": lambda x, w: scan(x, w[::-1]),
  "reversed scan": lambda x, w: scan(x, w, reverse=True),
  "cut": lambda x, w: scan(scan(x, w[:3]), w[3:]),
  "cut in three, one reversed": lambda x, w: scan(scan(scan(x, w[:2]), w[2:5], reverse=True), w[5:]),
  "even, then odd": lambda x, w: scan(scan(x, w[::2]), w[1::2]),
  "alternating": alternating,
  "pairs": pairs,
  "reversed pairs": lambda x, w: pairs(x, w[::-1]),
  "two levels": two_levels,
  "cut, then pairs": lambda x, w: pairs(scan(x, w[:2]), w[2:]),
  "cast": lambda x, w: scan(x.astype(jnp.float32), w.astype(jnp.float32)).astype(x.dtype),
  "unrolled scan": lambda x, w: scan(x, w, unroll=2),
  "transposed layers": lambda x, w: scan(x, jnp.swapaxes(w, 1, 2)),
  "two levels, reversed": lambda x, w: two_levels(x, w[::-1]),
  "two levels, reversed inside": lambda x, w: groups(lambda x, w: scan(x, w[::-1]), x, w),
  "two levels, transposed layers": lambda x, w: two_levels(x, jnp.swapaxes(w, 1, 2)),
  "two levels, cast": lambda x, w: two_levels(x.astype(jnp.float32), w.astype(jnp.float32)).astype(x.dtype),
  "two levels, cast inside": lambda x, w: groups(lambda x, w: scan(x, w * jnp.bfloat16(2)), x, w),
  "three levels": lambda x, w: groups(two_levels, x, w),
  "shared in groups": lambda x, w: groups(lambda x, w: scan(scan(x, w), w), x, w),
  "shared in groups, reversed": lambda x, w: groups(lambda x, w: scan(scan(x, w), w[::-1]), x, w),
  "split": lambda x, w: scan(scan(x, jnp.split(w, [3])[0]), jnp.split(w, [3])[1]),
  "padded": padded,
  "after frozen layers": lambda x, w: scan(x, jnp.concatenate([frozen(2, w), w])),
  "between frozen layers": lambda x, w: scan(x, jnp.concatenate([frozen(1, w), w, frozen(2, w)])),
  "pairs after frozen layers": lambda x, w: pairs(x, jnp.concatenate([frozen(2, w), w])),
  "two levels after frozen layers": lambda x, w: two_levels(x, jnp.concatenate([frozen(2, w), w])),
  "some frozen": lambda x, w: scan(x, jnp.concatenate([lax.stop_gradient(w[:2]), w[2:]])),
  "some frozen, in two scans": lambda x, w: scan(scan(x, lax.stop_gradient(w[:2])), w[2:]),
  "a scan of one layer": lambda x, w: scan(scan(x, w[:1]), w[1:]),
  "first alone": lambda x, w: scan(layer(x, w[0])[0], w[1:]),
  "last alone": lambda x, w: layer(scan(x, w[:-1]), w[-1])[0],
  "first alone, at the end": lambda x, w: layer(scan(x, w[1:]), w[0])[0],
  "one in the middle alone": lambda x, w: scan(layer(scan(x, w[:3]), w[3])[0], w[4:]),
  "first and last alone": lambda x, w: layer(scan(layer(x, w[0])[0], w[1:-1]), w[-1])[0],
  "one alone, twice": lambda x, w: layer(scan(layer(x, w[0])[0], w[1:]), w[0])[0],
  "three together": lambda x, w: scan(x, w[3:]) + jnp.einsum("bi,kij->bj", x, w[:3]),
  "one alone in each group": lambda x, w: lax.scan(
    lambda x, w: (scan(layer(x, w[0])[0], w[1:]), None), x, w.reshape(2, -1, *w.shape[1:])
  )[0],
  "masked": lambda x, w: scan(x, masked(w)),
  "masked, in pairs": lambda x, w: pairs(x, masked(w[::-1])),
  "masked, two levels": lambda x, w: two_levels(x, masked(w)),
  "times a number for each layer": lambda x, w: scan(x, w * (1 + jnp.arange(L, dtype=w.dtype)[:, None, None])),
  "times a number for each column": lambda x, w: scan(x, w * (1 + jnp.arange(D, dtype=w.dtype))[None, None]),
  "one pair": lambda x, w: scan(pairs(x, w[:2]), w[2:]),
  "some unused": lambda x, w: scan(scan(x, w[:3]), w[5:]),
  "every other unused": lambda x, w: scan(x, w[::2]),
}
AT_END = {  # what the reason says
  "rolled": (lambda x, w: scan(x, jnp.roll(w, 1, 0)), "takes some of the layers"),
  "one also alone": (lambda x, w: scan(layer(x, w[0])[0], w), "its gradient gets another part after the scan"),
}


def _params(length, axis):
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    name: jnp.moveaxis(jax.random.normal(key, (length, D, D)) * D**-0.5, 0, axis)
    for name, key in zip(("v", "w"), keys, strict=True)
  }


def _loss(run, axis):
  def loss(params, x):
    v, w = (jnp.moveaxis(params[name], axis, 0) for name in ("v", "w"))
    x = run(x, w) * scan(x.astype(v.dtype), v)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))

  return loss


def make(way, axis, dtype=jnp.bfloat16):
  return _loss(lambda x, w: way(x.astype(dtype), w), axis), _params(L, axis)


def assert_equal_to_ordinary(loss, params, tx, steps=3):
  params, state = mpo.init(tx, params)
  one, other = quick_jit(ordinary_step(loss, tx)), quick_jit(mpo.value_and_update(loss, tx))
  want, got = (None, params, state), (None, params, state)
  for i in range(steps):
    x = jax.random.normal(jax.random.key(100 + i), (4, D))
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got, want)


def places(loss, params, tx, **options):
  params, state = jax.eval_shape(lambda: mpo.init(tx, params))
  return [(leaf.stepped, leaf.why) for leaf in mpo.explain(loss, tx, params, state, jnp.ones((4, D)), **options)]


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(
  ("optimizer", "axis"),
  [(exact, 0), (exact, 1), (exact, 2), (eight_bit, 0), (eight_bit, 1)],
  ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.few(4, full=6)
def test_every_way_is_updated_in_its_scans(way, optimizer, axis):
  loss, params = make(WAYS[way], axis)
  tx = optimizer()
  assert [place for place, _ in places(loss, params, tx)] == ["in scan"] * 2
  assert_equal_to_ordinary(loss, params, tx)


@pytest.mark.parametrize("way", list(AT_END))
def test_what_is_not_updated_in_a_scan_says_why(way):
  run, why = AT_END[way]
  loss, params = make(run, 0)
  _, (place, found) = places(loss, params, exact())
  assert place == "at the end"
  assert why in found
  assert ": " in found.split("; ")[0]  # what to change
  assert_equal_to_ordinary(loss, params, exact())


def test_blocks_of_state_along_the_layers_are_not_taken_apart():
  loss, params = make(scan, 2)
  assert all(p == "at the end" and "no entry for each" in why for p, why in places(loss, params, eight_bit()))
  assert_equal_to_ordinary(loss, params, eight_bit())


@pytest.mark.parametrize(
  "way", [lambda x, w: scan(scan(x, w), w), lambda x, w: scan(scan(scan(x, w[:3]), w[3:]), w)], ids=["whole", "cut"]
)
def test_a_stack_in_several_scans_is_updated_in_the_last_one(way):
  loss, params = make(way, 1)
  (v_place, v_why), (w_place, w_why) = places(loss, params, exact())
  assert (v_place, v_why, w_place) == ("in scan", "", "in scan")
  assert "from `scan` (scan, random_stacks.py" in w_why
  assert "is held until then: use its layers in one scan only" in w_why
  assert_equal_to_ordinary(loss, params, exact())


def test_a_scan_of_one_layer_may_read_a_random_key():
  def loss(params, x, key):
    def dropped(x, w):
      return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), layer(x, w)[0], 0), None

    return jnp.mean(jnp.square(scan(lax.scan(dropped, x, params["w"][:1])[0], params["w"][1:])))

  params, x, tx = {"w": _params(L, 0)["w"]}, jnp.ones((4, D)), optax.sgd(1e-2)
  args = params, tx.init(params), x, jax.random.key(1)
  got, want = (quick_jit(step)(*args) for step in (mpo.value_and_update(loss, tx), ordinary_step(loss, tx)))
  assert_same_bits(got, want)


def in_a_cond(x, w):
  return lax.cond(x[0, 0] > 0, lambda x, w: scan(x, w), lambda x, w: x, x, w)


NOT_FOLLOWED = {  # what the reason says of a stack that is scanned after other operations
  "picked": (lambda x, w: scan(x, w[jnp.arange(L)[::-1]]), "`scatter-add` (<lambda>, test_stacks.py:"),
  "sorted": (lambda x, w: scan(x, jnp.sort(w, 0)), "`scatter-add` (<lambda>, test_stacks.py:"),
  "summed up": (lambda x, w: scan(x, jnp.cumsum(w, 0)), "`cumsum` (<lambda>, test_stacks.py:"),
  "multiplied": (lambda x, w: scan(x, jnp.einsum("lij,lkj->lik", w, w)), "`dot_general` (<lambda>, test_stacks.py:"),
  "in a cond": (in_a_cond, "move the scan out of it"),
  "used whole": (
    lambda x, w: lax.fori_loop(0, 3, lambda _, x: scan(x, w), x),
    "is summed in `scan` (<lambda>, test_stacks.py:",
  ),
}


@pytest.mark.parametrize("name", list(NOT_FOLLOWED))
def test_a_stack_whose_gradient_is_not_followed_says_why(name):
  run, why = NOT_FOLLOWED[name]
  loss, params = make(run, 0)
  (v_place, v_why), (w_place, w_why) = places(loss, params, exact())
  assert (v_place, v_why, w_place) == ("in scan", "", "at once")
  assert why in w_why
  assert ": " in w_why.split("; ")[0]  # what to change


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
  random_stacks.segments,
  st.sampled_from([(exact, 0), (exact, 1), (exact, 2), (eight_bit, 0), (eight_bit, 1)]),
  st.booleans(),
  st.booleans(),
)
@pytest.mark.full
def test_random_stacks(parts, how, is_reversed, is_shared):
  optimizer, axis = how
  loss = _loss(functools.partial(random_stacks.run, parts, is_reversed, is_shared), axis)
  params = _params(sum(part.length for part in parts), axis)
  assert [place for place, _ in places(loss, params, optimizer())] == ["in scan"] * 2
  assert_equal_to_ordinary(loss, params, optimizer())
