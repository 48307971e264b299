"""Small stacks in a scan, such as biases and norms, are updated as a whole after it, and equal the ordinary step.

Both sides are compiled as in stepping/test_value_and_update.py, which explains why.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from benchmarks import hlo
from optax_mpo._stepping.site import small_stacks
from tests.helpers import assert_same_bits, ordinary_step, quick_jit

LAYERS, WIDTH = 4, 256


def params(layers=LAYERS, width=WIDTH, nested=False):
  keys = jax.random.split(jax.random.key(0), 2)
  stack = {
    "up": jax.random.normal(keys[0], (layers, width, 2 * width)) * width**-0.5,
    "bias": jnp.zeros((layers, width)),
    "down": jax.random.normal(keys[1], (layers, 2 * width, width)) * width**-0.5,
    "gain": jnp.ones((layers,)),
  }
  if nested:
    stack = jax.tree.map(lambda a: a.reshape(2, layers // 2, *a.shape[1:]), stack)
  return {"stack": stack, "out": jnp.ones((width, 2))}


def block(p, x):
  return x + p["gain"] * (jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None])


def loss(p, x, reverse=False):
  y, _ = lax.scan(lambda y, q: (jax.checkpoint(block)(q, y), None), x, p["stack"], reverse=reverse)
  return jnp.mean(jnp.square((y @ p["out"]).astype(jnp.float32)))


def backwards(p, x):
  return loss(p, x, reverse=True)


def shared(p, x):
  """The stack is scanned twice, so its gradients are summed after the second backward scan."""
  return loss(p, x) + loss(p, jnp.flip(x))


def nested(p, x):
  """A scan of scans. The inner scan stacks small gradients, and the outer scan updates their weights."""

  def group(y, q):
    return lax.scan(lambda y, q: (block(q, y), None), y, q)[0], None

  return jnp.mean(jnp.square((lax.scan(group, x, p["stack"])[0] @ p["out"]).astype(jnp.float32)))


def fused(reverse):
  stack = mpo.fused_scan(lambda p, y, _: (block(p, y), None), reverse=reverse)
  out = mpo.fused_layer(lambda w, y: jnp.mean(jnp.square((y @ w).astype(jnp.float32))))

  def fused_loss(p, x):
    return out(p["out"], stack(p["stack"], x)[0])

  return fused_loss


def batch(seed, width=WIDTH):
  return jax.random.normal(jax.random.key(seed), (4, width)).astype(jnp.bfloat16)


# Has no division by a scalar: see OPTIMIZERS in stepping/test_value_and_update.py.
def momentum():
  return optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(1e-1, momentum=0.9))


STEPS = {
  "auto": (loss, lambda tx: mpo.value_and_update(loss, tx)),
  "auto backwards": (backwards, lambda tx: mpo.value_and_update(backwards, tx)),
  "auto shared": (shared, lambda tx: mpo.value_and_update(shared, tx)),
  "auto nested": (nested, lambda tx: mpo.value_and_update(nested, tx)),
  "layers": (loss, lambda tx: mpo.fused_value_and_update(fused(False), tx)),
  "layers backwards": (backwards, lambda tx: mpo.fused_value_and_update(fused(True), tx)),
}


def run(step, params, state, steps=3):
  value = None
  for i in range(steps):
    value, params, state = step(params, state, batch(i))
  return value, params, state


@pytest.mark.parametrize(("case", "bits"), [*((case, 16) for case in STEPS), ("auto", 4), ("layers", 4)])
@pytest.mark.few(1, full=3)
def test_they_are_stepped_as_ever(case, bits):
  unfused, make = STEPS[case]
  tx = mpo.compensated(momentum(), extra_bits=bits)
  start = mpo.init(tx, params(nested="nested" in case))
  got, want = run(quick_jit(make(tx)), *start), run(quick_jit(ordinary_step(unfused, tx)), *start)
  assert_same_bits(got, want)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), start[0], got[1])
  assert all(jax.tree.leaves(moved)), moved


@pytest.mark.full
def test_with_kernels_too():
  """On a CPU there are no kernels, but small leaves are still grouped for them."""
  tx = mpo.compensated(momentum())
  for case in ("auto", "auto shared", "layers"):
    unfused, make = STEPS[case]
    start = mpo.init(tx, params())
    got = run(quick_jit(make(mpo.with_kernels(tx))), *start, steps=1)
    chex.assert_trees_all_equal(got, run(quick_jit(ordinary_step(unfused, tx)), *start, steps=1), custom_message=case)


def test_in_two_passes():
  """The norm is summed in other parts than in the ordinary step, so its last bit may differ, by 1e-6 at most."""
  tx = mpo.compensated(optax.chain(optax.clip_by_global_norm(0.1), momentum()))
  start = mpo.init(tx, params())
  got = run(quick_jit(mpo.value_and_update(loss, tx, two_pass=True)), *start, steps=1)
  want = run(quick_jit(ordinary_step(loss, tx)), *start, steps=1)
  masters = [mpo.master_params(p, s) for _, p, s in (got, want)]
  chex.assert_trees_all_close(*masters, rtol=1e-6, atol=1e-9)
  assert not np.array_equal(masters[0]["stack"]["bias"], start[0]["stack"]["bias"])


@pytest.mark.parametrize("case", ["auto", "auto nested"])
def test_explain_says_so(case):
  tx = mpo.compensated(momentum())
  start = mpo.init(tx, params(nested="nested" in case))
  found = {leaf.name: leaf for leaf in mpo.explain(STEPS[case][0], tx, *start, batch(0))}
  where = {name: leaf.stepped for name, leaf in found.items()}
  assert where["params['stack']['up']"] == where["params['stack']['down']"] == "in scan"
  small = [found[f"params['stack']['{name}']"] for name in ("bias", "gain")]
  assert [leaf.stepped for leaf in small] == ["after the scan"] * 2
  assert all("small" in leaf.why for leaf in small)
  # The largest gradient held is still that of a matrix of one layer.
  assert max(leaf.gradient_bytes for leaf in found.values()) == 2 * WIDTH * 2 * WIDTH


@pytest.mark.parametrize(
  ("sizes", "length", "small"),
  [
    ([1000, 3, 1000], 1, {1}),
    ([1000, 8, 1000], 1, set()),  # more than a 256th
    ([1000, 4, 3, 1000], 1, {1, 2}),
    ([1000, 5, 3, 1000], 1, {2}),  # together more than a 256th: only the smallest
    ([2**30, 2**20], 64, {1}),
    ([2**30, 2**20], 63, set()),  # too large for one layer
    ([7], 3, set()),
    ([], 3, set()),
  ],
)
def test_what_is_small(sizes, length, small):
  assert small_stacks(sizes, length) == small


@pytest.mark.parametrize("case", ["auto", "layers"])
@pytest.mark.parametrize("kernels", [False, True], ids=["xla", "kernels"])
@pytest.mark.few(0, full=2)
def test_on_a_gpu_they_take_no_launch_in_a_layer(case, kernels, tmp_path):
  tx = mpo.compensated(optax.adamw(1e-3))
  tx = mpo.with_kernels(tx) if kernels else tx
  launches = []
  for without in ((), ("bias", "gain")):

    def some(without=without):
      made = params(8, 512)
      return made | {"stack": {k: v for k, v in made["stack"].items() if k not in without}}

    def plain(p, y, _, without=without):
      ones = {"bias": jnp.ones(512, jnp.bfloat16), "gain": jnp.bfloat16(1)}
      return block(p | {name: ones[name] for name in without}, y), None

    def scanned(p, x, plain=plain):
      y = (mpo.fused_scan(plain) if case == "layers" else lambda p, x: lax.scan(lambda y, q: plain(q, y, 0), x, p))(
        p["stack"], x
      )[0]
      out = mpo.fused_layer(lambda w, y: jnp.mean(jnp.square((y @ w).astype(jnp.float32))))
      return out(p["out"], y)

    make = mpo.fused_value_and_update if case == "layers" else mpo.value_and_update
    start = jax.eval_shape(lambda some=some: mpo.init(tx, some()))
    folder = tmp_path / str(len(launches))
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    mpo.gpu_memory(make(scanned, tx), *start, x, donate_argnums=(0, 1), target="h200", dump_to=folder)
    text = max((p.read_text() for p in folder.glob("*gpu_after_optimizations.txt")), key=len)
    counts = [len(jax.tree.leaves(part)) for part in start]
    found = hlo.kernels(text, range(counts[0], sum(counts)))
    launches.append(sum(k.launches for k in found if k.of_state))
  # Each of 8 layers needs two launches for the gradients of two leaves. Updates there would need eight more launches.
  assert 0 < launches[0] - launches[1] < 3 * 8, launches
