"""Updates that need a few numbers of a whole stack of layers: its norm, or a flag whether any of its gradients is NaN.

What depends on weights alone is made before the scan, what only goes to state is put together after it, and what new
weights need of all gradients takes two passes. Bits are equal to the ordinary step's where no sum is made in parts.
"""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from tests.helpers import assert_same_bits, ordinary_step, quick_jit
from tests.stepping.test_stacks import WAYS, D, L, make, places, scan

ROUTES = [
  "first axis",
  "reversed stack",
  "cut",
  "even, then odd",
  "alternating",
  "pairs",
  "two levels",
  "unrolled scan",
]


def vector_of_maxima():
  """Keeps, for each column, the largest gradient so far: state that is read by each layer and written once."""

  def update(updates, state, params=None):
    new = jax.tree.map(lambda m, u: jnp.maximum(m, jnp.max(jnp.abs(u), axis=tuple(range(u.ndim - 1)))), state, updates)
    # Halves are exact in any order; XLA may reorder a division and the learning rate in one of two programs.
    return jax.tree.map(
      lambda u, m: jnp.where(jnp.abs(u) > jnp.broadcast_to(m, u.shape), 0.5 * u, u), updates, state
    ), new

  return optax.GradientTransformation(lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape[-1]), params), update)


FIRST = {
  "block rms": optax.scale_by_param_block_rms,
  "param norm": lambda: optax.stateless_with_tree_map(lambda u, p: u * jnp.max(jnp.abs(p.reshape(-1)))),
  "NaNs": optax.zero_nans,
  "maxima": vector_of_maxima,
  "both": lambda: optax.chain(optax.zero_nans(), optax.scale_by_param_block_rms()),
}
THEN = {"sgd": lambda: optax.sgd(0.1), "adam": lambda: optax.adam(1e-2)}


def compensated(first, then, **options):
  return mpo.compensated(optax.chain(FIRST[first](), THEN[then]()), **options)


def with_others(way, axis=0):
  """Two stacks, and leaves that are none."""
  loss_of_stacks, stacks = make(WAYS[way], axis)
  first, last = (0.1 * jax.random.normal(jax.random.key(i), (D, D)) for i in (1, 2))

  def loss(params, x):
    x = x.astype(jnp.bfloat16) @ params["first"]
    return loss_of_stacks(params, x * params["scale"][None]) + jnp.mean((x @ params["last"]).astype(jnp.float32) ** 2)

  return loss, stacks | {"first": first, "last": last, "scale": jnp.ones(D)}


def steps(loss, params, tx, nan_in=(), **options):
  """Three steps both ways; the batches `nan_in` make NaNs."""
  params, state = mpo.init(tx, params)
  one, other = quick_jit(ordinary_step(loss, tx)), quick_jit(mpo.value_and_update(loss, tx, **options))
  want, got = (None, params, state), (None, params, state)
  for i in range(3):
    x = jax.random.normal(jax.random.key(100 + i), (4, D))
    x = x.at[0, 0].set(jnp.nan) if i in nan_in else x
    want, got = one(*want[1:], x), other(*got[1:], x)
    yield got, want


def in_scan(loss, params, tx, **options):
  stepped = [place for place, _ in places(loss, params, tx, **options)]
  return stepped.count("in scan") == 2 and "at the end" not in stepped


@pytest.mark.parametrize("then", list(THEN))
@pytest.mark.parametrize("first", list(FIRST))
@pytest.mark.parametrize(("way", "axis"), [*((way, 0) for way in ROUTES), ("first axis", 1), ("cut", 2)])
@pytest.mark.few(2, full=4)
def test_stacks_are_updated_in_their_scans(first, then, way, axis):
  loss, params = with_others(way, axis)
  tx = compensated(first, then)
  assert in_scan(loss, params, tx)
  for got, want in steps(loss, params, tx):
    assert_same_bits(got, want)


@pytest.mark.parametrize("way", ["first axis", "cut", "two levels"])
@pytest.mark.few(1)
def test_flags_of_nans_are_those_of_the_ordinary_step(way):
  loss, params = with_others(way)
  flags = []
  for got, want in steps(loss, params, compensated("NaNs", "sgd"), nan_in=(1,)):
    assert_same_bits(got, want)
    flags.append(bool(got[2].inner_state[0].found_nan["w"]))
  assert flags == [False, True, False]


@pytest.mark.parametrize("first", ["block rms", "NaNs", "maxima"])
@pytest.mark.few(1)
def test_eight_bit_state(first):
  # Not Adam: where a product with the norm meets Adam's constants, XLA multiplies these first in one of two programs.
  inner = mpo.quantized_state(optax.lion(1e-2, weight_decay=0.0), min_size=1, block_size=8)
  loss, params = with_others("first axis")
  tx = mpo.compensated(optax.chain(FIRST[first](), inner), extra_bits=8)
  assert in_scan(loss, params, tx)
  for got, want in steps(loss, params, tx):
    assert_same_bits(got, want)


def norm_of_each_group():
  """Scales by a norm over the second axis and the last two, and keeps a flag for each entry of the first."""

  def update(updates, state, params=None):
    scaled = jax.tree.map(lambda u, p: u * jnp.max(jnp.abs(p), axis=(1, 2, 3), keepdims=True), updates, params)
    return scaled, jax.tree.map(lambda u: jnp.any(u > 1e-4, axis=(1, 2, 3)), updates)

  return optax.GradientTransformation(lambda p: jax.tree.map(lambda p: jnp.zeros(p.shape[0], bool), p), update)


@pytest.mark.parametrize(
  "first", [optax.scale_by_param_block_rms, optax.zero_nans, norm_of_each_group], ids=lambda f: f.__name__
)
@pytest.mark.few(1)
def test_stacks_of_stacks(first):
  stacks = {name: 0.3 * jax.random.normal(jax.random.key(k), (2, 3, D, D)) for k, name in enumerate("vw")}

  def loss(params, x):
    def outer(x, ws):
      return scan(scan(x, ws[0]), ws[1]), None

    return jnp.mean(lax.scan(outer, x.astype(jnp.bfloat16), (params["v"], params["w"]))[0].astype(jnp.float32) ** 2)

  tx = mpo.compensated(optax.chain(first(), optax.sgd(0.1)))
  assert in_scan(loss, stacks, tx)
  for got, want in steps(loss, stacks, tx, nan_in=(2,) if first is optax.zero_nans else ()):
    assert_same_bits(got, want)


def test_fused_scan_updates_them_too():
  tx = compensated("both", "adam")
  params, state = mpo.init(tx, make(scan, 0)[1])

  def layer(w, x, _):
    return jnp.tanh(x @ w), None

  def loss(run):
    return lambda params, x: jnp.mean(run(params["v"], run(params["w"], x)).astype(jnp.float32) ** 2)

  fused = loss(lambda w, x: mpo.fused_scan(layer)(w, x)[0])
  plain = loss(lambda w, x: lax.scan(lambda x, w: layer(w, x, None), x, w)[0])
  x = jax.random.normal(jax.random.key(3), (4, D), jnp.bfloat16)
  got = quick_jit(mpo.fused_value_and_update(fused, tx))(params, state, x)
  assert_same_bits(got, quick_jit(ordinary_step(plain, tx))(params, state, x))


def clip_by_largest(limit):
  # A product, and below a learning rate that is a power of two: XLA may reorder a division and the learning rate, or
  # divide by a scalar as by its reciprocal, in one of two programs.
  return optax.stateless_with_tree_map(lambda u, p: u * jnp.minimum(1.0, limit / jnp.max(jnp.abs(u))))


def ratio_of_largest():
  """As the trust ratio of LAMB does it with norms: what is measured depends on whether it is zero."""

  def largest(x):
    first = jnp.max(jnp.abs(x))
    return jnp.max(jnp.square(jnp.where(first <= 0.0, jnp.ones_like(x), x)))

  return optax.stateless_with_tree_map(lambda u, p: u * (largest(p) / (largest(u) + 1e-3)))


NEED_ALL = {  # what the reason says in one pass; the bound on the difference, since sums are made in another order
  "largest": (lambda: optax.chain(clip_by_largest(1e-3), optax.sgd(0.125)), "`reduce_max` .*mixes the layers", 0),
  "ratio": (lambda: optax.chain(ratio_of_largest(), optax.sgd(0.125)), "`reduce_max` .*mixes the layers", 0),
  "clip": (lambda: optax.chain(optax.clip_by_block_rms(1e-3), optax.sgd(0.1)), "`reduce_sum` .*mixes", 1e-6),
  "LAMB": (lambda: optax.lamb(1e-2), "`reduce_sum` mixes the layers", 1e-6),
  "Adafactor": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4), "`reduce_sum` .*mixes the layers", 1e-6),
}


@pytest.mark.parametrize("name", list(NEED_ALL))
@pytest.mark.parametrize("way", ["first axis", "cut", "two levels", "alternating"])
@pytest.mark.few(1, full=3)
def test_what_weights_need_of_all_gradients_takes_two_passes(name, way):
  make_inner, why, bound = NEED_ALL[name]
  loss, params = with_others(way)
  tx = mpo.compensated(make_inner())
  refused = [found for place, found in places(loss, params, tx) if place == "at the end"]
  assert len(refused) == 2
  assert all(re.search(why, found) for found in refused), refused
  assert in_scan(loss, params, tx, two_pass=True)
  for got, want in steps(loss, params, tx, two_pass=True):
    if not bound:
      assert_same_bits(got, want)
    for a, b in zip(*(jax.tree.leaves(mpo.master_params(*x[1:])) for x in (got, want)), strict=True):
      assert jnp.max(jnp.abs(a - b)) <= bound


REFUSED = {  # also in two passes; what the reason says
  "norm after clipping": (
    lambda: optax.chain(optax.clip_by_global_norm(0.1), clip_by_largest(1e-3)),
    "`reduce_max` .*mixes the layers",
  ),
  "NovoGrad": (optax.scale_by_novograd, f"no entry for each of the {L} layers"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_two_passes_cannot_do_says_why(name):
  make_first, why = REFUSED[name]
  loss, params = make(scan, 0)
  rows = places(loss, params, mpo.compensated(optax.chain(make_first(), optax.sgd(0.1))), two_pass=True)
  assert [place for place, _ in rows] == ["at the end"] * 2
  assert all(re.search(why, found) for _, found in rows), rows


@pytest.mark.parametrize("way", ["cut", "two levels", "alternating"])
@pytest.mark.few(1)
def test_norms_of_all_leaves_are_made_in_pieces(way):
  """Largest entries, whose order does not matter: bits are equal."""

  def clip(updates, params):
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(u)) for u in jax.tree.leaves(updates)]))
    return jax.tree.map(lambda u: u * jnp.minimum(1.0, 1e-3 / largest), updates)

  loss, params = with_others(way)
  tx = mpo.compensated(optax.chain(optax.stateless(clip), optax.sgd(0.1)))
  assert in_scan(loss, params, tx, two_pass=True)
  for got, want in steps(loss, params, tx, two_pass=True):
    assert_same_bits(got, want)
