"""gpu_memory against XLA's own figures and against hand-counted bytes. Needs no GPU."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_mpo as mpo
from optax_mpo._memory import gpu_targets, worker, xla_dump
from optax_mpo._memory.gpu_memory import gpu_memory
from optax_mpo._memory.report import Buffer, MemoryReport

P = PartitionSpec


def f32(*shape, sharding=None):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def nbytes(tree):
  return sum(int(leaf.size * leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def loss_fn(params, x):
  def layer(x, w):
    return x + jnp.tanh(x @ w), None

  x, _ = lax.scan(layer, x.astype(params["head"].dtype), params["layers"])
  return jnp.mean(jnp.square((x @ params["head"]).astype(jnp.float32)))


SHAPES = {"layers": f32(6, 256, 256), "head": f32(256, 512)}
COUNT = 6 * 256 * 256 + 256 * 512
X = f32(64, 256)


def make_step(tx, apply_updates=optax.apply_updates):
  def step(params, state, x):
    grads = jax.grad(loss_fn)(params, x)
    updates, state = tx.update(grads, state, params)
    return apply_updates(params, updates), state

  return step


@functools.cache
def sgd_report(**options):
  tx = optax.sgd(0.1, momentum=0.9)
  state = jax.eval_shape(tx.init, SHAPES)
  return gpu_memory(make_step(tx), SHAPES, state, X, donate_argnums=(0, 1), params_argnum=0, **options)


def direct(fn, *args, donate=(), devices=1, target="h100"):
  """XLA's figures from lowering for the target's devices in this process: no export, no second process."""
  config = gpu_targets.TARGETS[target].config
  topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{devices}")
  mesh = Mesh(np.array(topology.devices), ("d",))

  def struct(leaf):
    spec = leaf.sharding.spec if leaf.sharding else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  compiled = jax.jit(fn, donate_argnums=donate).lower(*jax.tree.map(struct, args)).compile()
  m = compiled.memory_analysis()
  return m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes, m.temp_size_in_bytes


def figures(report):
  return report.argument_bytes, report.output_bytes, report.aliased_bytes, report.temporary_bytes


# --- The figures ------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_report():
  first = sgd_report()
  sgd_report.cache_clear()
  assert sgd_report() == first
  assert first.temporary_bytes > 0


def test_figures_are_those_of_compiling_directly_for_the_target():
  tx = optax.sgd(0.1, momentum=0.9)
  state = jax.eval_shape(tx.init, SHAPES)
  assert figures(sgd_report()) == direct(make_step(tx), SHAPES, state, X, donate=(0, 1))


def test_an_elementwise_function_has_no_temporaries():
  report = gpu_memory(lambda a, b: (2 * a + b) / 3, f32(1000, 1000), f32(1000, 1000))
  assert figures(report) == (8_000_000, 4_000_000, 0, 0)
  assert report.total_bytes == 12_000_000
  report = gpu_memory(lambda a, b: (2 * a + b) / 3, f32(1000, 1000), f32(1000, 1000), donate_argnums=1)
  assert figures(report) == (8_000_000, 4_000_000, 4_000_000, 0)
  assert report.total_bytes == 8_000_000


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
def test_the_buffers_explain_temporaries_and_total(remat):
  def loss(params, x):
    layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w)) if remat else lambda x, w: x + jnp.tanh(x @ w)
    for w in params:
      x = layer(x, w)
    return jnp.sum(x * x)

  args = [f32(512, 512)] * 5, f32(256, 512)
  report = gpu_memory(lambda params, x: jax.value_and_grad(loss)(params, x), *args)
  temporaries = [b for b in report.buffers if b.kind == "temporary"]
  assert report.temporary_bytes > 2**20
  assert sum(b.bytes for b in temporaries) == pytest.approx(report.temporary_bytes, rel=0.01)
  assert sum(b.bytes for b in report.buffers) == pytest.approx(report.total_bytes, rel=0.01)
  assert sum(b.bytes for b in report.buffers if b.kind == "argument") == report.argument_bytes
  assert [b.bytes for b in report.buffers] == sorted((b.bytes for b in report.buffers), reverse=True)
  assert any(b.at_peak for b in temporaries)


def test_lines_of_the_package_and_of_libraries_are_not_the_users():
  package = Path(mpo.__file__).parent
  for file in (package / "_stepping" / "evaluate.py", Path(json.__file__), Path(jax.__file__)):
    assert xla_dump._is_library(str(file)), file
  assert not xla_dump._is_library(__file__)


def test_buffers_are_named_by_argument_operation_and_source_line():
  buffers = sgd_report().buffers
  arguments = {b.name: b for b in buffers if b.kind == "argument"}
  assert arguments["params['layers']"].bytes == 6 * 256 * 256 * 4
  assert arguments["params['layers']"].shape == "f32[6,256,256]"
  assert arguments["params['layers']"].reused
  assert not arguments["x"].reused
  largest = next(b for b in buffers if b.kind == "temporary")
  assert largest.shape == "f32[6,256,256]"  # the stacked gradient
  assert "transpose(jvp())/while" in largest.op_name
  assert "call_exported" not in largest.op_name
  file, _, rest = largest.source.partition(":")
  line, _, function = rest.partition(" in ")
  assert (file, function) == (__file__, "loss_fn")
  with open(__file__) as source:
    assert "lax.scan" in source.readlines()[int(line) - 1]


def test_donated_arguments_that_are_unused_give_no_room_but_are_counted():
  # jit drops an unused argument, so no output can reuse its memory. But the array still exists.
  report = gpu_memory(lambda a, b: 2 * b, f32(1000), f32(1000), donate_argnums=0)
  assert figures(report) == (8000, 4000, 0, 0)


def test_captured_arrays_count_as_arguments():
  captured = jnp.ones((128, 128))
  assert gpu_memory(lambda x: x @ captured, f32(128, 128)).argument_bytes == 2 * 128 * 128 * 4


def test_scalars_keys_and_numpy_arrays_are_arguments():
  def fn(x, key, rate):
    return x + rate * jax.random.normal(key, x.shape)

  report = gpu_memory(fn, np.ones((64, 64), np.float32), jax.random.key(0), 0.1)
  assert report.argument_bytes == 64 * 64 * 4 + 8 + 4


def test_sixty_four_bit_types_stay_what_they_are():
  with jax.enable_x64(True):
    report = gpu_memory(lambda x: x * 2, jax.ShapeDtypeStruct((100,), jnp.float64))
  assert report.argument_bytes == 800


@pytest.mark.parametrize("target", list(gpu_targets.TARGETS))
@pytest.mark.few(1, full=6)
def test_every_target_compiles(target):
  report = gpu_memory(jax.grad(loss_fn), SHAPES, X, target=target.upper())
  assert (report.target, report.device_bytes) == (target, gpu_targets.TARGETS[target].memory)
  assert report.argument_bytes == nbytes((SHAPES, X))
  assert report.fits


def test_a_model_that_is_too_large_does_not_fit():
  report = gpu_memory(lambda x: x + 1, f32(4 * 2**30), target="a10")
  assert report.total_bytes == 32 * 2**30
  assert not report.fits
  assert "does not fit" in str(report)


# --- The storage modes: bytes counted by hand -------------------------------------------------------------------------

MODES = {
  "f32 master": (optax.adamw(1e-3), None, 12),
  "pure bf16": (optax.adamw(1e-3), "cast", 6),
  "bf16 + 16 bits": (mpo.compensated(optax.adamw(1e-3), extra_bits=16), "init", 12),
  "bf16 + 8 bits": (mpo.compensated(optax.adamw(1e-3), extra_bits=8), "init", 11),
  "bf16 + 4 bits": (mpo.compensated(optax.adamw(1e-3), extra_bits=4), "init", 10.5),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.few(1)
def test_persistent_bytes_are_exact_and_all_aliased(mode):
  tx, how, expected = MODES[mode]

  def make(masters):
    if how == "init":
      return mpo.init(tx, masters)
    params = mpo.cast(masters) if how == "cast" else masters
    return params, tx.init(params)

  params, state = jax.eval_shape(make, SHAPES)
  step = make_step(tx, mpo.apply_updates if how == "init" else optax.apply_updates)
  report = gpu_memory(step, params, state, X, donate_argnums=(0, 1), params_argnum=0)
  step_count = 4
  assert report.parameter_count == COUNT
  assert report.argument_bytes == expected * COUNT + step_count + nbytes(X)
  assert report.aliased_bytes == report.argument_bytes - nbytes(X)
  # For results, XLA adds a table of their addresses, with 8 bytes for each.
  assert 0 <= report.output_bytes - report.aliased_bytes <= 8 * (len(jax.tree.leaves((params, state))) + 1)
  assert {b.name.partition("[")[0].partition(".")[0] for b in report.buffers if b.reused} == {"params", "state"}


# --- Jitted functions -------------------------------------------------------------------------------------------------


def test_a_jitted_function_keeps_its_donated_and_static_arguments():
  @functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
  def fn(repeats, state, x):
    for _ in range(repeats):
      state = state + x
    return state

  assert figures(gpu_memory(fn, 3, f32(1000), f32(1000))) == (8000, 4000, 4000, 0)


def test_donation_cannot_be_set_twice():
  with pytest.raises(ValueError, match="is jitted and donates what it was jitted"):
    gpu_memory(jax.jit(lambda x: x), f32(8), donate_argnums=0)


def test_compiler_options_reach_the_compiler():
  def fn(x):
    return x @ x

  x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
  assert gpu_memory(fn, x).temporary_bytes == 0
  cublas = gpu_memory(fn, x, compiler_options={"xla_gpu_enable_triton_gemm": False})
  assert cublas.temporary_bytes > 2**20  # cuBLAS's workspace
  with pytest.raises(RuntimeError, match=r"could not compile it for NVIDIA H100.*\n.*xla_gpu_nonsense"):
    gpu_memory(fn, x, compiler_options={"xla_gpu_nonsense": 1})
  with pytest.raises(ValueError, match="xla_dump_to cannot be set"):
    gpu_memory(fn, x, compiler_options={"xla_dump_to": "/tmp"})
  with pytest.raises(ValueError, match="jitted with compiler_options, which cannot be read from it"):
    gpu_memory(jax.jit(fn, compiler_options={"xla_gpu_enable_triton_gemm": False}), x)


def test_where_tritons_default_tiles_do_not_fit_cublas_is_taken(tmp_path):
  class Lowered:
    def compile(self, options):
      if options.get("xla_gpu_enable_triton_gemm", True):
        raise RuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo")
      return "program"

  options = {"xla_dump_to": str(tmp_path / "dump")}
  assert worker.compiled(Lowered(), options) == ("program", True)
  with pytest.raises(RuntimeError, match="output tile sizes"):
    worker.compiled(Lowered(), {**options, "xla_gpu_enable_triton_gemm": True})


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_table():
  lines = str(sgd_report()).splitlines()
  assert lines[0] == f"Memory on NVIDIA H100 80GB HBM3 (h100, JAX {jax.__version__}), {COUNT:,} parameters"
  assert lines[1].split() == ["arguments", "4.06", "MiB", "8.12", "bytes/parameter"]
  assert any("f32[6,256,256]" in line and "test_gpu_memory.py:" in line and "in loss_fn" in line for line in lines)
  assert {"params", "state", "x"} <= {line.split()[-1] for line in lines}
  assert any(line.startswith("  fits: 0.0") for line in lines)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_chart(tmp_path, suffix):
  path = tmp_path / f"report.{suffix}"
  sgd_report().plot(path)
  assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


def test_the_chart_without_matplotlib(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
    sgd_report().plot(tmp_path / "report.png")


def test_json():
  report = sgd_report()
  data = json.loads(report.to_json())
  assert (
    data["total_bytes"] == report.total_bytes == sum(figures(report)[:2]) - report.aliased_bytes + figures(report)[3]
  )
  assert data["fits"] is True
  assert [Buffer(**b) for b in data["buffers"]] == list(report.buffers)


def test_a_report_without_what_is_optional():
  report = MemoryReport("h100", "NVIDIA H100", 1, 2**30, 100, 20, 10, 1, None, "0.10.2", without_triton=True)
  assert "cuBLAS for all matrix products" in str(report)
  assert report.bytes_per_parameter is None
  assert report.total_bytes == 111
  assert "no list of buffers" in str(report)
  assert "bytes/parameter" not in str(report)


# --- Reading XLA's texts ----------------------------------------------------------------------------------------------


def test_a_dump_of_another_form_gives_no_buffers(tmp_path):
  assert xla_dump.read(tmp_path, 0, []).buffers == ()
  (tmp_path / "m.gpu_after_optimizations-buffer-assignment.txt").write_text("something else\n")
  assert xla_dump.read(tmp_path, 0, []).buffers == ()


def test_bytes_go_to_what_is_there_at_the_peak_first(tmp_path):
  prefix = "m.sm_9.0a_gpu_after_optimizations"
  (tmp_path / f"{prefix}-buffer-assignment.txt").write_text(
    "BufferAssignment:\n"
    "allocation 0: size 40, page 0, parameter 0, shape |f32[10]| at ShapeIndex {}, maybe-live-out:\n"
    " value: <1 x.1 @0> (size=40,offset=0): f32[10]{0}\n"
    "allocation 1: size 100, page 0, preallocated-temp:\n"
    " value: <2 peak @0> (size=40,offset=0): f32[10]{0}\n"
    " value: <3 state{1} (phi) @0> (size=40,offset=0): f32[10]{0}\n"
    " value: <4 early @0> (size=80,offset=0): f32[20]{0}\n"
    " value: <5 late @0> (size=60,offset=40): f32[15]{0}\n"
    "\nTotal bytes used: 140\n"
  )
  (tmp_path / f"{prefix}-live-range.txt").write_text(
    "  BufferLiveRange:\n  Live ranges at 3 (peak):\n    x.1{}: 40 bytes (cumulative: 40 bytes)\n"
    "    state{1}: 40 bytes (cumulative: 80 bytes)\n  Stack trace breakdown\n"
  )
  (tmp_path / f"{prefix}.txt").write_text(
    # Frame 3 is in a library. Frame 2, in the user's model, called it, and frame 1 called frame 2.
    'FileNames\n1 "/home/me/model.py"\n2 "/venv/lib/site-packages/optax/losses.py"\n\n'
    'FunctionNames\n1 "loss.<locals>.layer"\n2 "cross_entropy"\n3 "step"\n\n'
    "FileLocations\n1 {file_name_id=1 function_name_id=3 line=20 end_line=20}\n"
    "2 {file_name_id=1 function_name_id=1 line=7 end_line=7}\n"
    "3 {file_name_id=2 function_name_id=2 line=99 end_line=99}\n\n"
    "StackFrames\n1 {file_location_id=1 parent_frame_id=1}\n2 {file_location_id=2 parent_frame_id=2}\n"
    "3 {file_location_id=3 parent_frame_id=3}\n\n"
    '  %peak = f32[10]{0} add(%a, %b), metadata={op_name="jit(call)/call_exported/jit(step)/add" stack_frame_id=3}\n'
  )
  assert xla_dump.read(tmp_path, 100, ["params['w']"]).buffers == (
    Buffer("params['w']", "argument", 40, "f32[10]", "", "", True, True),
    Buffer("early", "temporary", 40, "f32[20]", "", "", False),
    Buffer("peak", "temporary", 40, "f32[10]", "jit(step)/add", "/home/me/model.py:7 in layer", True),
    Buffer("late", "temporary", 20, "f32[15]", "", "", False),
  )


def test_the_axes_of_a_lowered_module():
  assert worker.mesh_axes('sdy.mesh @empty_mesh = <[]>\n sdy.mesh @mesh = <["data"=4, "model"=2]>') == [
    ("data", 4),
    ("model", 2),
  ]
  assert worker.mesh_axes("module @jit_f {}") == []


def test_the_local_card_is_read_from_the_dump(tmp_path):
  path = tmp_path / "module_0001.jit_call.gpu_target_config.pbtxt"
  path.write_text('gpu_device_info {\n  device_memory_size: 1234\n}\ndevice_description_str: "NVIDIA X"\n')
  assert xla_dump.read_device(tmp_path) == ("NVIDIA X", 1234)
  path.write_text("")
  with pytest.raises(RuntimeError, match="does not tell the local card"):
    xla_dump.read_device(tmp_path)
