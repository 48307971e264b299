"""Our primitives, and training steps that use them, under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from optax_mpo._backends.backend import Backend
from optax_mpo._core import primitives
from tests.helpers import ordinary_step

# --- Each primitive ---------------------------------------------------------------------------------------------------

SHAPE = (4, 3)


def number(i):
  return jnp.float32(0.5 + i)


def array(i, dtype=jnp.float32):
  return (jnp.arange(12.0).reshape(SHAPE) / 8 + 0.5 + i).astype(dtype)


def pure(grad, stacks, shared, index):
  weight, moment = stacks
  moment = moment * shared[0] + grad**2 + index.astype(jnp.float32)
  return [weight - jnp.sin(moment), moment]


STEP = {"pure": pure, "backend": Backend(), "stacks": 2}
TOGETHER = {"pures": (pure, pure), "kernels": (None, None), "counts": ((2, 1), (2, 1))}

# The operands and params of each primitive.
EXAMPLES = {
  "after": ([jnp.int32(2), number(0), number(1)], {"count": 3}),
  "hidden": ([jnp.int32(2), number(0)], {}),
  "held": ([array(0), array(1, jnp.bfloat16)], {}),
  "row_major": ([array(0)], {}),
  "as_they_lie": ([array(0)], {}),
  "laid_out": ([array(0)], {}),
  "typed_memory": ([array(0)], {"space": jax.memory.Space.Device}),
  "tie": ([array(0), number(1), jnp.int32(2)], {}),
  "together": ([array(0), number(1)], {}),
  "step_weight": ([jnp.int32(0), array(0), array(1), array(2), number(0)], STEP),
  "step_weights": ([array(0), array(1), array(2), number(0), array(3), array(4), array(5), number(0)], TOGETHER),
}


def test_every_primitive_has_an_example():
  assert set(EXAMPLES) == set(primitives.MADE)


@pytest.fixture(params=sorted(EXAMPLES))
def primitive(request):
  """A primitive as a function from operands to a list of results, the same function in plain JAX, and operands."""
  operands, params = EXAMPLES[request.param]
  made = primitives.MADE[request.param]

  def plainly(*operands):
    if request.param == "step_weight":
      index, grad, *rest = operands
      return pure(grad, rest[:2], rest[2:], index)
    if request.param == "step_weights":
      given = (operands[:4], operands[4:])
      return [x for grad, *rest in given for x in pure(grad, rest[:2], rest[2:], jnp.int32(0))]
    return list(operands) if request.param in ("tie", "together") else [operands[0]]

  return lambda *operands: jax.tree.leaves(made.bind(*operands, **params)), plainly, operands


def floating(values):
  return [i for i, x in enumerate(values) if jnp.issubdtype(x.dtype, jnp.floating)]


def assert_same(got, want):
  """Compares up to the last bits, which a fused multiply-add or a vectorised sine can change."""
  for x, y in zip(got, want, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-6, atol=1e-6)


def test_it_computes_what_it_says(primitive):
  fun, plain, operands = primitive
  assert_same(fun(*operands), plain(*operands))
  assert_same(jax.jit(fun)(*operands), plain(*operands))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_it_is_mapped(primitive, jit):
  """Maps over each operand alone, over all but one and over all, along the first and the last axis."""
  fun, plain, operands = primitive
  wrap = jax.jit if jit else lambda f: f
  places = range(len(operands))
  chosen = {frozenset(places), *(frozenset([i]) for i in places), *(frozenset(places) - {i} for i in places)} - {
    frozenset()
  }
  for mapped in sorted(chosen, key=sorted):
    axes = [(-1 if i % 2 else 0) if i in mapped else None for i in places]
    stacks = [x if a is None else jnp.stack([x, x + 1, x + 2], axis=a) for x, a in zip(operands, axes, strict=True)]
    got = wrap(jax.vmap(fun, axes))(*stacks)
    want = [plain(*(x + k if i in mapped else x for i, x in enumerate(operands))) for k in range(3)]
    assert_same(got, [jnp.stack(xs) for xs in zip(*want, strict=True)])


def test_it_is_mapped_twice_and_in_a_loop(primitive):
  fun, plain, operands = primitive
  stacks = [jnp.stack([jnp.stack([x + i + 2 * k for i in range(2)]) for k in range(3)]) for x in operands]
  want = jax.vmap(jax.vmap(plain))(*stacks)
  assert_same(jax.jit(jax.vmap(jax.vmap(fun)))(*stacks), want)
  assert_same(jax.jit(lambda xs: lax.map(lambda x: jax.vmap(fun)(*x), xs))(stacks), want)


def objective(fun, operands):
  """Returns a scalar function of the floating-point operands, and these operands."""
  places = floating(operands)

  def of_floats(*values):
    given = list(operands)
    for i, value in zip(places, values, strict=True):
      given[i] = value
    results = [x.astype(jnp.float32) for x in fun(*given)]
    return sum((jnp.sum(jnp.sin(x)) for x in results), jnp.float32(0))

  return of_floats, [operands[i] for i in places]


@pytest.mark.parametrize(
  "wrap",
  [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))],
  ids="eager jit remat both".split(),
)
@pytest.mark.few(6, full=20)
def test_it_is_differentiated(primitive, wrap):
  fun, plain, operands = primitive
  (got, values), (want, _) = objective(fun, operands), objective(plain, operands)
  if not values:
    return
  every = tuple(range(len(values)))
  assert_same(jax.grad(wrap(got), every)(*values), jax.grad(want, every)(*values))
  tangents = [jnp.ones_like(v) for v in values]
  assert_same(jax.jvp(wrap(got), values, tangents), jax.jvp(want, values, tangents))
  for i in every:  # the other tangents are symbolic zeros
    assert_same([jax.grad(wrap(got), i)(*values)], [jax.grad(want, i)(*values)])
  got, want = (jax.vmap(jax.grad(f, every)) for f in (wrap(got), want))
  stacks = [jnp.stack([v, 2 * v]) for v in values]
  assert_same(got(*stacks), want(*stacks))
  twice, plainly = (
    jax.grad(lambda *v, f=f: jnp.sum(jax.grad(f)(*v).astype(jnp.float32))) for f in objectives(primitive)
  )
  assert_same([twice(*values)], [plainly(*values)])


def objectives(primitive):
  fun, plain, operands = primitive
  return objective(fun, operands)[0], objective(plain, operands)[0]


@pytest.mark.parametrize("name", ["held", "row_major", "as_they_lie", "laid_out", "tie", "together"])
def test_a_hint_is_transposed(name):
  operands, params = EXAMPLES[name]
  _, *others = operands

  def linear(x):
    return jax.tree.leaves(primitives.MADE[name].bind(x, *others, **params))[0]

  (got,) = jax.linear_transpose(linear, operands[0])(array(7))
  np.testing.assert_array_equal(got, array(7))


# --- Steps ------------------------------------------------------------------------------------------------------------

X = jax.random.normal(jax.random.key(1), (3, 4, 32))  # a batch for each of three ensemble members


def make_params(layers, scale, width=32):
  keys = jax.random.split(jax.random.key(0), layers)
  weights = [scale * jax.random.normal(k, (width, width)) / width**0.5 for k in keys]
  return {"layers": jnp.stack(weights), "head": jnp.full((width, 8), 0.1), "bias": jnp.zeros(8)}


def scanned(params, x):
  y, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(params["layers"].dtype), params["layers"])
  return jnp.mean((y @ params["head"] + params["bias"][None]).astype(jnp.float32) ** 2)


def unrolled(params, x):
  y = x.astype(params["layers"].dtype)
  for i in range(len(params["layers"])):
    y = jnp.tanh(y @ params["layers"][i])
  return jnp.mean((y @ params["head"] + params["bias"][None]).astype(jnp.float32) ** 2)


STORED = {
  "16 bits": lambda tx: mpo.compensated(tx),
  "fp16": lambda tx: mpo.compensated(tx),
  "8 bits": lambda tx: mpo.compensated(mpo.quantized_state(tx, min_size=16), extra_bits=8),
  "stochastic": lambda tx: mpo.compensated(mpo.quantized_state(tx, min_size=16), extra_bits=0, rounding="stochastic"),
}
ROUTES = {
  "ordinary": ordinary_step,
  "released": mpo.value_and_update,
  "two passes": functools.partial(mpo.value_and_update, two_pass=True),
  "ordinary with kernels": lambda loss, tx: ordinary_step(loss, mpo.with_kernels(tx)),
  "released with kernels": lambda loss, tx: mpo.value_and_update(loss, mpo.with_kernels(tx)),
}


def make(route, stored, rate, loss, clipped, params):
  """Returns a step of one kind, with params and state."""
  inner = optax.adamw(rate)
  tx = STORED[stored](optax.chain(optax.clip_by_global_norm(0.05), inner) if clipped else inner)
  low, state = mpo.init(tx, params, dtype=jnp.float16 if stored == "fp16" else jnp.bfloat16)
  return ROUTES[route](loss, tx), low, state


def trained(route, stored, loss, clipped):
  """The function to differentiate: the loss of a step plus the loss after it, as a function of all its inputs."""

  def fun(rate, x, scale):
    step, params, state = make(route, stored, rate, loss, clipped, make_params(2, scale, 16))
    value, params, _ = step(params, state, x)
    return value + loss(params, x)

  return fun


POINT = 1e-2, X[0, :, :16], 1.0
EVERY = 0, 1, 2
TRANSFORMATIONS = {
  "grad": lambda fun: jax.grad(fun, EVERY)(*POINT),
  "jvp": lambda fun: jax.jvp(fun, POINT, (1.0, jnp.ones_like(POINT[1]), 1.0)),
  "remat": lambda fun: jax.grad(jax.checkpoint(fun), EVERY)(*POINT),
  "vmap": lambda fun: jax.vmap(jax.grad(fun), (0, None, None))(jnp.array([1e-2, 2e-2]), *POINT[1:]),
  "map": lambda fun: lax.map(lambda rate: jax.grad(fun)(rate, *POINT[1:]), jnp.array([1e-2, 2e-2])),
}


def check_derivative(transformed, route, stored, loss):
  # Derivatives by a hyperparameter that the transformation closes over, by the data and by the initial weights.
  fun = functools.partial(trained, stored=stored, loss=loss, clipped=route == "two passes")
  got, want = (jax.tree.leaves(jax.jit(lambda r=r: transformed(fun(r)))()) for r in (route, "ordinary"))
  assert all(np.any(np.abs(y) > 1e-4) for y in want)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-4 * np.max(np.abs(y)))


@pytest.mark.parametrize("stored", ["8 bits", *(pytest.param(x, marks=pytest.mark.full) for x in ("16 bits", "fp16"))])
@pytest.mark.parametrize("route", list(ROUTES)[1:])
@pytest.mark.few(1, full=4)
def test_steps_are_differentiated_like_ordinary_ones(route, stored):
  check_derivative(TRANSFORMATIONS["grad"], route, stored, scanned)


@pytest.mark.parametrize("loss", [scanned, pytest.param(unrolled, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.few(1, full=5)
def test_steps_are_differentiated_in_any_way(name, loss):
  check_derivative(TRANSFORMATIONS[name], "released", "8 bits", loss)


def stacked_params(layers, width):
  return jax.vmap(lambda scale: make_params(layers, scale, width))(jnp.array([1.0, 0.75, 1.25]))


def elementwise(params, x):
  """A loss whose gradients need no sums over the batch or over features: vmap would change their order."""
  x = x.astype(params["layers"].dtype)
  y, _ = lax.scan(lambda y, w: (y * w[:4] + x, None), x, params["layers"])
  return (
    jnp.sum(y.astype(jnp.float32))
    + jnp.sum((params["head"] * 2).astype(jnp.float32))
    + jnp.sum(params["bias"].astype(jnp.float32))
  )


CASES = [
  *((elementwise, route, stored) for route in list(ROUTES)[:3] for stored in STORED),
  *((elementwise, route, "8 bits") for route in list(ROUTES)[3:]),
  *((scanned, route, "8 bits") for route in list(ROUTES)[:3]),
]


@pytest.mark.parametrize(
  ("loss", "route", "stored"),
  [pytest.param(*c, marks=[pytest.mark.full] * (c[1:] != ("released", "8 bits"))) for c in CASES],
)
@pytest.mark.few(1, full=2)
def test_ensembles_are_trained_like_their_members(loss, route, stored):
  """Bit for bit, unless a sum changes its order, as in matrix products and norms, in a batch or another program."""
  check_ensemble(loss, route, stored, 3, 32)


@pytest.mark.full
@pytest.mark.parametrize("route", list(ROUTES)[:3])
@pytest.mark.parametrize("loss", [scanned, unrolled])
@pytest.mark.few(0, full=1)
def test_ensembles_of_large_weights(loss, route):
  """Large weights are updated by rows on a CPU, but not under `vmap`."""
  check_ensemble(loss, route, "8 bits", 1 if loss is unrolled else 2, 736)


def check_ensemble(loss, route, stored, layers, width):
  masters = stacked_params(layers, width)
  x = jax.random.normal(jax.random.key(1), (3, 4, width))

  def train(params, x):
    step, params, state = make(route, stored, 1e-2, loss, route == "two passes", params)
    values = []
    for _ in range(2):
      value, params, state = step(params, state, x)
      values.append(value)
    return mpo.master_params(params, state), params, state, values

  alone = [jax.jit(train)(*jax.tree.map(lambda v, i=i: v[i], (masters, x))) for i in range(3)]
  want = jax.tree.map(lambda *v: jnp.stack(v), *alone)
  mapped = jax.jit(lambda *given: lax.map(lambda g: train(*g), given))(masters, x)
  together = jax.jit(jax.vmap(train))(masters, x)
  for got in (mapped, together):
    if loss is elementwise and (got is mapped or route != "two passes"):
      jax.tree.map(np.testing.assert_array_equal, got, want)
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      # XLA divides by the numbers of an ensemble in another way. A last bit may turn an 8-bit code, in few elements.
      is_close = np.isclose(a, b, rtol=2**-7 if stored == "stochastic" else 2**-15, atol=2**-16)
      assert np.mean(~is_close) <= (1e-4 if stored == "8 bits" else 0)


# --- What a fused step cannot do --------------------------------------------------------------------------------------


@pytest.mark.few(1)
def test_fused_steps_are_mapped_in_a_loop_and_refuse_the_rest_by_name():
  layer = mpo.fused_scan(lambda w, y, _: (jnp.tanh(y @ w), None), remat=True)
  tx = STORED["8 bits"](optax.adamw(1e-2))

  def loss(params, x):
    y, _ = layer(params["layers"], x.astype(jnp.bfloat16))
    head, bias = mpo.fused_value(params["head"]), mpo.fused_value(params["bias"])
    return jnp.mean((y @ head + bias[None]).astype(jnp.float32) ** 2)

  step = mpo.fused_value_and_update(loss, tx)
  params, state = jax.vmap(lambda p: mpo.init(tx, p))(stacked_params(3, 32))
  mapped = jax.jit(lambda *given: lax.map(lambda g: step(*g), given))(params, state, X)
  alone = [jax.jit(step)(*jax.tree.map(lambda v, i=i: v[i], (params, state, X))) for i in range(3)]
  jax.tree.map(np.testing.assert_array_equal, mapped, jax.tree.map(lambda *v: jnp.stack(v), *alone))
  with pytest.raises(mpo.FusedError, match="vmap"):
    jax.vmap(step)(params, state, X)
  one = jax.tree.map(lambda v: v[0], (params, state))
  with pytest.raises(mpo.FusedError, match="cannot be differentiated"):
    jax.grad(lambda x: step(*one, x)[0])(X[0])
  with pytest.raises(mpo.FusedError, match="cannot be differentiated"):
    jax.grad(jax.checkpoint(lambda x: step(*one, x)[0]))(X[0])
  value, *_ = jax.jit(jax.checkpoint(step))(*one, X[0])  # remat without a derivative works
  np.testing.assert_array_equal(value, alone[0][0])
