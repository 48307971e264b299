"""Steps with the kernel: what XLA:GPU compiles of them, and that they stay what they are on other machines."""

import collections
import importlib.util
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from benchmarks import hlo
from benchmarks.modes import Training
from optax_mpo._backends import kernel_launch
from optax_mpo._backends.kernel_launch import Language
from optax_mpo._planner import fsdp
from tests.backends.test_gpu_kernel import EXACT, STORAGES, bits, compact

LAYERS, WIDTH, HIDDEN = 3, 128, 384


def block(p, x, whole=lambda w: w):
  return x + jax.nn.relu((x * p["scale"][None]) @ whole(p["up"])) @ whole(p["down"])


def scanned(params, x):
  x, _ = lax.scan(jax.checkpoint(lambda x, p: (block(p, x), None)), x, params)
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


def fused_scanned(params, x):
  x, _ = mpo.fused_scan(lambda p, x, _: (block(p, x), None))(params, x)
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


def unrolled(params, x):
  for i in range(LAYERS):
    x = block(params[i], x)
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


def fused_unrolled(params, x):
  layer = mpo.fused_layer(block, remat=True)
  for i in range(LAYERS):
    x = layer(params[i], x)
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


LOSSES = {
  "auto scanned": (mpo.value_and_update, scanned),
  "layer scanned": (mpo.fused_value_and_update, fused_scanned),
  "auto unrolled": (mpo.value_and_update, unrolled),
  "layer unrolled": (mpo.fused_value_and_update, fused_unrolled),
}


def layers(stacked, width=WIDTH, hidden=HIDDEN):
  shapes = {"scale": (width,), "up": (width, hidden), "down": (hidden, width)}

  def one(key):
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {n: jax.random.normal(keys[n], s) / np.sqrt(s[0]) for n, s in shapes.items()}

  each = [one(jax.random.key(i)) for i in range(LAYERS)]
  return jax.tree.map(lambda *w: jnp.stack(w), *each) if stacked else each


@pytest.mark.parametrize("storage", ["16 bits", "compact"])
@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.few(1, full=3)
def test_without_a_gpu_steps_are_what_they_are_without_kernels(case, storage):
  make, loss = LOSSES[case]
  tx = STORAGES[storage]()
  x = jax.random.normal(jax.random.key(9), (16, WIDTH)).astype(jnp.bfloat16)
  results = []
  for kernels in (False, True):
    params, state = mpo.init(tx, layers("scanned" in case))
    step = jax.jit(make(loss, mpo.with_kernels(tx) if kernels else tx), donate_argnums=(0, 1))
    for _ in range(3):
      value, params, state = step(params, state, x)
    results.append(jax.tree.leaves((value, params, state)))
  for one, other in zip(*results, strict=True):
    np.testing.assert_array_equal(bits(one), bits(other))


def test_two_passes_are_what_they_are_without_kernels():
  tx = mpo.compensated(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
  x = jax.random.normal(jax.random.key(9), (16, WIDTH)).astype(jnp.bfloat16)
  results = []
  for made in (tx, mpo.with_kernels(tx)):
    params, state = mpo.init(made, layers(True))
    step = jax.jit(mpo.value_and_update(scanned, made, two_pass=True))
    for _ in range(3):
      value, params, state = step(params, state, x)
    results.append(jax.tree.leaves((value, params, state)))
  for one, other in zip(*results, strict=True):
    np.testing.assert_array_equal(bits(one), bits(other))
  table = mpo.explain(scanned, made, params, state, x, two_pass=True)
  assert {leaf.stepped for leaf in table if leaf.parameters > 1024} == {"in scan, by a kernel"}


@pytest.fixture(autouse=True)
def _xla_gpu_optimizes_as_usual(monkeypatch):
  """The flags of tests/conftest.py are for CPUs, but the process that compiles for a GPU would read them too."""
  monkeypatch.setenv("XLA_FLAGS", "")


OURS = ("pallas_call", "mpmd_map", "step_weight")  # what XLA calls our kernels


def ptx_in(folder):
  return "\n".join(path.read_text() for path in folder.rglob("*.ptx"))


def test_languages_of_this_jax():
  """JAX 0.10 has an earlier form of Mosaic GPU, which is not used."""
  known = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)
  assert [kernel_launch.is_there(one) for one in Language] == [True, known]


@pytest.mark.parametrize(
  ("there", "capability", "expected"),
  [
    (list(Language), 9.0, Language.TRITON),
    (list(Language), 8.9, Language.TRITON),
    (list(Language), 7.5, None),
    ([Language.MOSAIC], 10.0, Language.MOSAIC),
    ([Language.MOSAIC], 8.9, None),
  ],
)
def test_the_language_by_card_and_jax(monkeypatch, there, capability, expected):
  monkeypatch.setattr(kernel_launch, "is_there", lambda one: one in there)
  monkeypatch.setattr(kernel_launch, "_capability", lambda: capability)
  monkeypatch.setattr(kernel_launch, "_is_for_mosaic", lambda kernels: True)
  assert kernel_launch.chosen([], 1) is expected
  assert kernel_launch.chosen([], 8) is None
  assert kernel_launch.chosen([], None) is None
  monkeypatch.setenv("OPTAX_MPO_KERNELS", "cuda")
  with pytest.raises(ValueError, match="OPTAX_MPO_KERNELS has to be triton or mosaic, but it is 'cuda'"):
    kernel_launch.chosen([], 1)


def compiled(case, storage, folder, card="h200"):
  """Compiles a step for a GPU. Returns the report, XLA's program, and params and state."""
  make, loss = LOSSES[case]
  tx = STORAGES[storage]()
  shapes = jax.eval_shape(lambda: mpo.init(tx, layers("scanned" in case, 1024, 3072)))
  x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)
  step = make(loss, mpo.with_kernels(tx))
  report = mpo.gpu_memory(step, *shapes, x, target=card, donate_argnums=(0, 1), dump_to=folder)
  text = max((p.read_text() for p in folder.glob("*gpu_after_optimizations.txt")), key=len)
  return report, text, shapes


@pytest.mark.full
@pytest.mark.usefixtures("language")
def test_on_a_gpu_small_weights_are_batched(tmp_path):
  """48 vectors take two launches, in place, and each byte is read and written once. XLA updates what has no tiles."""
  tx = mpo.with_kernels(EXACT())
  sizes = [512] * 45 + [256, 2**16, 128, 1000, 96]
  params, state = jax.eval_shape(lambda: mpo.init(tx, [jnp.zeros(n) for n in sizes]))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return mpo.apply_updates(params, updates), state

  folder = tmp_path / "xla"
  report = mpo.gpu_memory(step, params, state, params, target="h200", donate_argnums=(0, 1), dump_to=folder)
  text = max((p.read_text() for p in folder.glob("*gpu_after_optimizations.txt")), key=len)
  kernels = hlo.kernels(text, [])
  assert len([k for k in kernels if k.name.startswith(OURS)]) == 2
  assert sum(k.launches for k in kernels) <= 6  # 1000 and 96 alone, and two for the step count
  assert 1 <= sum(k.bytes for k in kernels) / (26 * sum(sizes)) < 1.01
  assert report.aliased_bytes >= 12 * sum(sizes)


@pytest.mark.parametrize("storage", ["16 bits", "compact"])
@pytest.mark.parametrize("case", ["auto scanned", "layer scanned"])
@pytest.mark.usefixtures("language")
@pytest.mark.few(1)
def test_on_a_gpu_one_kernel_steps_a_layer_at_the_floor(case, storage, tmp_path):
  report, text, (params, state) = compiled(case, storage, tmp_path / "xla")
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
  count = sum(x.size for x in jax.tree.leaves(params))
  first = len(jax.tree.leaves(params))
  kernels = hlo.kernels(text, range(first, first + len(jax.tree.leaves(state))))
  ours = [k for k in kernels if k.name.startswith(OURS)]
  assert [k.launches for k in ours] == [LAYERS] * 2  # the scale is small, and updated after the scan
  # The other kernels are the scale's and those of the step count: none for each leaf or layer.
  assert sum(k.launches for k in kernels if k.of_state) <= 2 * LAYERS + 6
  moved = sum(k.bytes for k in kernels if k.of_state)
  assert 1 <= moved / (2 * held + 2 * count) < 1.01
  # No stack is copied, and no new values exist beside the old ones: temporaries are the gradients of a layer.
  assert report.aliased_bytes >= held - 1024
  assert report.temporary_bytes < 40e6
  assert not [k for k in kernels if k.opcode == "copy" and k.bytes > 2e6]


@pytest.mark.parametrize("case", ["auto unrolled", "layer unrolled"])
@pytest.mark.full
def test_on_a_gpu_weights_with_8_bit_state_are_stepped_at_the_floor(case, tmp_path):
  _, text, (params, state) = compiled(case, "compact", tmp_path)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
  count, first = sum(x.size for x in jax.tree.leaves(params)), len(jax.tree.leaves(params))
  kernels = hlo.kernels(text, range(first, first + len(jax.tree.leaves(state))))
  assert 1 <= sum(k.bytes for k in kernels if k.of_state) / (2 * held + 2 * count) < 1.02


@pytest.mark.parametrize("add", [mpo.apply_updates, optax.apply_updates])
@pytest.mark.few(1)
def test_on_a_gpu_ordinary_updates_of_8_bit_state_are_at_the_floor(add, tmp_path):
  tx = mpo.with_kernels(compact())
  params, state = jax.eval_shape(lambda: mpo.init(tx, {"w": jnp.zeros((2048, 1024)), "b": jnp.zeros(96)}))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return add(params, updates), state

  mpo.gpu_memory(step, params, state, params, target="h200", donate_argnums=(0, 1), dump_to=tmp_path)
  text = max((p.read_text() for p in tmp_path.glob("*gpu_after_optimizations.txt")), key=len)
  moved = sum(k.bytes for k in hlo.kernels(text, [])) / (2048 * 1024)
  # optax.apply_updates adds the difference to the old weights, so these have to be kept.
  assert 12.25 <= moved < (12.26 if add is mpo.apply_updates else 25)


@pytest.mark.parametrize("add", [mpo.apply_updates, optax.apply_updates])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.few(1, full=4)
def test_ordinary_updates_are_what_they_are_without_kernels(storage, add):
  tx, grads = STORAGES[storage](), layers(True)
  results = []
  for made in (tx, mpo.with_kernels(tx), optax.chain(mpo.with_kernels(tx))):
    params, state = mpo.init(made, layers(True))

    @jax.jit
    def step(params, state, made=made):
      updates, state = made.update(mpo.cast(grads), state, params)
      return add(params, updates), state

    for _ in range(3):
      params, state = step(params, state)
    results.append(jax.tree.leaves((params, state)))
  for one, other, third in zip(*results, strict=True):
    np.testing.assert_array_equal(bits(one), bits(other))
    np.testing.assert_array_equal(bits(one), bits(third))


def test_outside_of_jit_and_of_what_can_be_taken_apart_nothing_changes(capsys):
  def update(updates, state, params=None):
    jax.debug.print("stepped")
    return updates, state

  noisy = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
  tx = mpo.with_kernels(mpo.compensated(optax.chain(optax.sgd(0.1), noisy)))
  params, state = mpo.init(tx, {"w": jnp.ones((8, 128))})
  grads = {"w": jnp.ones((8, 128), jnp.bfloat16)}
  for run in (tx.update, jax.jit(tx.update)):
    updates, _ = run(grads, state, params)
    np.testing.assert_array_equal(updates["w"].astype(jnp.float32), jnp.full((8, 128), -0.1015625))
  jax.effects_barrier()
  assert capsys.readouterr().out == "stepped\n" * 2
  with pytest.raises(TypeError, match="with_kernels: tx has to be an Optax transformation"):
    mpo.with_kernels(None)
  with pytest.raises(ValueError, match="compensated: update needs the params"):
    tx.update(grads, state)


def test_explain_says_what_is_stepped_by_a_kernel():
  tx = mpo.with_kernels(EXACT())
  params = layers(True) | {"odd": jnp.ones((LAYERS, 1023))}
  params, state = mpo.init(tx, params)

  def loss(params, x):
    odd = params.pop("odd")
    y, _ = lax.scan(lambda y, p: (block(p[0], y) + p[1].sum(), None), x, (params, odd))
    return jnp.mean(y.astype(jnp.float32))

  table = mpo.explain(loss, tx, params, state, jnp.ones((4, WIDTH), jnp.bfloat16))
  found = {leaf.name: (leaf.stepped, leaf.why) for leaf in table}
  assert found["params['up']"] == ("in scan, by a kernel", "")
  assert found["params['odd']"] == ("in scan", "no kernel: 1023 elements do not make tiles of 128 or more")


def test_small_leaves_of_a_fused_step_are_stepped_together():
  params, state = mpo.init(tx := mpo.with_kernels(EXACT()), layers(False))
  table = mpo.explain(unrolled, tx, params, state, jnp.ones((4, WIDTH), jnp.bfloat16))
  stepped = {leaf.name: leaf.stepped for leaf in table}
  assert [stepped[f"params[{i}]['{name}']"] for i in range(LAYERS) for name in ("scale", "up")] == (
    ["together", "at once"] * LAYERS
  )


@pytest.mark.parametrize(("case", "launches"), [("auto unrolled", 1), ("layer unrolled", 0)])
@pytest.mark.few(1)
def test_on_a_gpu_small_leaves_of_a_fused_step_take_one_launch(case, launches, tmp_path):
  """By layers there is no common launch: each layer has one small leaf, and updates it when the layer is done."""
  _, text, (params, _) = compiled(case, "16 bits", tmp_path)
  small = [k for k in hlo.kernels(text, []) if k.name.startswith(OURS)]
  assert [k.launches for k in small] == [1] * launches
  if launches:
    assert 1 <= small[0].bytes / (26 * sum(p["scale"].size for p in params)) < 1.01


FLOATS = re.compile(r"\b((?:div|sqrt|rsqrt|rcp|fma|mul|add|sub)\.[a-z0-9_.]*f32)\b")


def test_its_instructions_are_those_of_xla(language, tmp_path):
  """Both use the same approximations for divisions and roots, and no fused multiply-adds, so the bits agree.

  A difference is the sum with the negative, and rounds alike. LLVM writes either, and Mosaic GPU what the update has.
  """
  compiled("auto scanned", "16 bits", tmp_path / "ours")
  tx = EXACT()
  params, state = jax.eval_shape(lambda: mpo.init(tx, {"w": jnp.zeros((1024, 3072))}))

  def unfused(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return mpo.apply_updates(params, updates), state

  mpo.gpu_memory(unfused, params, state, params, target="h200", donate_argnums=(0, 1), dump_to=tmp_path / "xla")
  found = []
  for name in ("mosaic" if language == "MOSAIC" else "ours", "xla"):
    # Take the kernel with square roots. Each of its threads updates as many elements as it takes roots.
    (entry, *_) = [e for e in re.split(r"\.entry", ptx_in(tmp_path / name)) if "sqrt" in e]
    counts = collections.Counter(FLOATS.findall(entry.replace("sub.rn", "add.rn")))
    elements = sum(n for name, n in counts.items() if name.startswith("sqrt"))
    found.append({name: n / elements for name, n in counts.items()})
  assert found[0] == found[1]
  assert set(found[0]) == {"div.full.f32", "sqrt.approx.f32", "mul.rn.f32", "add.rn.f32"}


def test_with_8_bit_state_too_its_instructions_are_those_of_xla(language, tmp_path):
  """Neither has an exponential, a logarithm or a fused multiply-add, in which the two could differ."""
  params, state = jax.eval_shape(lambda: mpo.init(compact(), {"w": jnp.zeros((1024, 3072))}))
  found = []
  for name, tx in (("ours", mpo.with_kernels(compact())), ("xla", compact())):

    def unfused(params, state, grads, tx=tx):
      updates, state = tx.update(grads, state, params)
      return mpo.apply_updates(params, updates), state

    mpo.gpu_memory(unfused, params, state, params, target="h200", donate_argnums=(0, 1), dump_to=tmp_path / name)
    own = language == "MOSAIC" and name == "ours"
    text = ptx_in(tmp_path / ("mosaic" if own else name))
    entries = [e for e in re.split(r"\.entry", text) if "sqrt" in e]
    found.append({name for entry in entries for name in FLOATS.findall(entry)})
    assert not re.search(r"\b(ex2|lg2)\.", "".join(entries))
  assert found[0] == found[1]
  assert found[0] == {"div.full.f32", "sqrt.approx.f32", "rsqrt.approx.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32"}


CARDS = {"h200": "sm_90a", "a100-80gb": "sm_80", "rtx4090": "sm_89"}


@pytest.mark.parametrize("storage", ["16 bits", "compact"])
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.few(1, full=3)
def test_it_spills_no_registers_and_moves_16_bytes_at_once(storage, card, language, tmp_path):
  if language == "MOSAIC":
    card = "h200"  # it is for Hopper and later
  _, text, _ = compiled("auto scanned", storage, tmp_path / "xla", card)
  ours = [k for k in hlo.kernels(text, []) if k.name.startswith(OURS)]
  assert [k.launches for k in ours] == [LAYERS] * 2
  nvidia = importlib.util.find_spec("nvidia")
  assert nvidia is not None
  (ptxas, *_) = [p for folder in nvidia.submodule_search_locations or () for p in Path(folder).rglob("bin/ptxas")]
  found = []
  for ptx in (tmp_path / ("mosaic" if language == "MOSAIC" else "xla")).glob("*.ptx"):
    command = [ptxas, "-v", f"-arch={CARDS[card]}", ptx, "-o", tmp_path / "none"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found += re.findall(
      r"'step_weight\w*' for.*?(\d+) bytes spill stores, (\d+) bytes.*?Used (\d+) registers", text, re.S
    )
  assert found
  for stores, loads, registers in found:
    assert (stores, loads) == ("0", "0")
    assert int(registers) <= 128, "16 warps and more on each multiprocessor"
  for ptx in (tmp_path / ("mosaic" if language == "MOSAIC" else "xla")).glob("*.ptx"):
    for entry in re.findall(r"\.entry (?=step_weight).*", ptx.read_text(), re.S):
      assert entry.count("ld.global.v4.b32") >= 2
      assert not re.search(r"\bld\.local|\bst\.local", entry)


def test_a_jax_without_triton_steps_as_it_does_without_kernels_and_says_so(monkeypatch, tmp_path):
  monkeypatch.setattr(kernel_launch, "is_there", lambda one: False)
  with pytest.warns(UserWarning, match="with_kernels: JAX .* has no Triton or Mosaic GPU backend"):
    _, text, _ = compiled("auto scanned", "16 bits", tmp_path / "xla")
  assert "step_weight/pallas_call" not in text
  assert "dynamic-update-slice" in text


@pytest.mark.few(1)
def test_several_devices_are_left_to_xla(tmp_path):
  tx = mpo.with_kernels(EXACT())
  params, state = jax.eval_shape(lambda: mpo.init(tx, layers(True, 1024, 3072)))
  training = Training(mpo.value_and_update(scanned, tx), params, state)
  step, *arguments = fsdp.shard(training, jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16), 8)
  mpo.gpu_memory(step, *arguments, target="h200", devices=8, dump_to=tmp_path)
  text = max((p.read_text() for p in tmp_path.glob("*gpu_after_optimizations.txt")), key=len)
  assert "num_partitions=8" in text
  assert "step_weight/pallas_call" not in text
