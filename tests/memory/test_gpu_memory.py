"""gpu_memory against XLA's own figures and against hand-counted bytes. Needs no GPU."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import optax_mpo as mpo
from optax_mpo._memory import compiling, gpu_targets, worker, xla_dump
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
@pytest.mark.few(1)
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
  "bf16 + 16 bits": (mpo.compensated(optax.adamw(1e-3), bits=16), "init", 12),
  "bf16 + 8 bits": (mpo.compensated(optax.adamw(1e-3), bits=8), "init", 11),
  "bf16 + 4 bits": (mpo.compensated(optax.adamw(1e-3), bits=4), "init", 10.5),
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


# --- Several devices --------------------------------------------------------------------------------------------------


def sharded(mesh, spec, tree):
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec)), tree)


def fsdp_shapes():
  return [jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)] * 3, [f32(1024, 1024)] * 3, f32(64, 1024)


def fsdp_step(params, momentum, x):
  def loss(params):
    h = x.astype(jnp.bfloat16)
    for w in params:
      h = jnp.tanh(h @ w)
    return jnp.mean(h.astype(jnp.float32) ** 2)

  momentum = jax.tree.map(lambda m, g: 0.9 * m + g.astype(m.dtype), momentum, jax.grad(loss)(params))
  return jax.tree.map(lambda p, m: p - (0.01 * m).astype(p.dtype), params, momentum), momentum


ABSTRACT = AbstractMesh((8,), ("d",), axis_types=(AxisType.Auto,))
PERSISTENT = 3 * 1024 * 1024 * 6


@functools.cache
def fsdp_direct():
  return direct(fsdp_step, *sharded(ABSTRACT, P("d"), fsdp_shapes()), donate=(0, 1), devices=8)


@pytest.mark.parametrize("over", ["abstract mesh", "cpu mesh", "jit"])
@pytest.mark.few(1)
def test_fsdp_by_every_way_to_say_it(over):
  mesh = ABSTRACT if over == "abstract mesh" else Mesh(np.array(jax.devices()[:8]), ("d",))
  args = fsdp_shapes()
  if over == "jit":
    layout = NamedSharding(mesh, P("d"))
    step = jax.jit(fsdp_step, in_shardings=layout, donate_argnums=(0, 1))
    report = gpu_memory(step, *args, devices=8, params_argnum=0)
  else:
    args = sharded(mesh, P("d"), args)
    report = gpu_memory(fsdp_step, *args, donate_argnums=(0, 1), devices=8, params_argnum=0)
  assert figures(report) == fsdp_direct()
  assert report.argument_bytes == (PERSISTENT + nbytes(fsdp_shapes()[2])) // 8
  assert report.aliased_bytes == PERSISTENT // 8
  assert report.per_parameter(report.aliased_bytes) == 6
  assert report.bytes_per_parameter == 8 * report.total_bytes / (3 * 1024 * 1024)
  assert "each of 8 x NVIDIA H100" in str(report)


def test_arrays_on_cpu_devices_are_laid_out_alike_on_the_target():
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
  w = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh, P(None, "model")))
  x = jax.device_put(jnp.ones((64, 512)), NamedSharding(mesh, P("data")))
  report = gpu_memory(lambda w, x: x @ w, w, x, devices=8)
  assert report.argument_bytes == 512 * 512 * 4 // 2 + 64 * 512 * 4 // 4
  assert report.output_bytes == 64 * 512 * 4 // 8


def test_a_function_may_hold_its_own_mesh():
  mesh = Mesh(np.array(jax.devices()[:4]), ("d",))

  def fn(w, x):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P("d")))
    return jax.shard_map(
      lambda w, x: jax.lax.psum(x @ w.T, "d"), mesh=mesh, in_specs=(P(None, "d"), P(None, "d")), out_specs=P()
    )(w, x)

  report = gpu_memory(fn, f32(64, 512), f32(16, 512), devices=4)
  assert report.argument_bytes == 4 * (64 * 512 + 16 * 512)  # without shardings: replicated


def test_explicit_axes():
  mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Auto))
  args = sharded(mesh, P("a"), (f32(64, 64), f32(64, 64)))
  report = gpu_memory(lambda x, y: x + y, *args, devices=8)
  assert report.argument_bytes == 2 * 64 * 64 * 4 // 4


def test_without_shardings_all_is_replicated():
  report = gpu_memory(lambda w: 2 * w, f32(1024), devices=16, params_argnum=0)
  assert figures(report) == (4096, 4096, 0, 0)
  assert report.bytes_per_parameter == 16 * 8


def test_layouts_that_are_not_over_the_devices():
  args = sharded(ABSTRACT, P("d"), (f32(64),))
  with pytest.raises(ValueError, match=r"w\['a'\] is laid out over 8 devices, but devices=1\. Pass devices=8"):
    gpu_memory(lambda w: w, {"a": args[0]})
  step = jax.jit(lambda w: w, in_shardings=NamedSharding(ABSTRACT, P("d")))
  with pytest.raises(ValueError, match="laid out over 8 devices, but devices=4"):
    gpu_memory(step, f32(64), devices=4)
  other = AbstractMesh((8,), ("e",), axis_types=(AxisType.Auto,))
  with pytest.raises(ValueError, match="over more than one mesh"):
    gpu_memory(lambda v, w: v + w, *args, *sharded(other, P("e"), (f32(64),)), devices=8)


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


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_unknown_target():
  with pytest.raises(ValueError, match=r"no target 'h101'\. Known are h100, h200, a100-80gb, .*'local'"):
    gpu_memory(lambda x: x, f32(8), target="h101")


def test_no_local_gpu():
  with pytest.raises(RuntimeError, match=r"target='local' .*JAX finds none .*Name the card.*h100"):
    gpu_memory(lambda x: x, f32(8), target="local")


def test_a_function_that_does_not_trace():
  def broken(x):
    return x if x[0] > 0 else -x

  with pytest.raises(
    ValueError, match="broken does not trace with these arguments: TracerBoolConversionError"
  ) as error:
    gpu_memory(broken, f32(8))
  assert isinstance(error.value.__cause__, jax.errors.TracerBoolConversionError)


def test_a_function_without_arguments():
  assert gpu_memory(lambda: jnp.zeros((1024,)), devices=4).total_bytes == 4096


def test_callbacks_cannot_be_lowered():
  def chatty(x):
    jax.debug.print("{}", x)
    return x

  with pytest.raises(
    ValueError, match=r"chatty traces, but cannot be lowered .*Take out calls back to Python"
  ) as error:
    gpu_memory(chatty, f32(8))
  assert error.value.__cause__ is not None


def test_arguments_that_are_not_arrays():
  with pytest.raises(TypeError, match=r"params\['w'\] is a str, not an array"):
    gpu_memory(lambda params: params, {"w": "weights"})
  with pytest.raises(TypeError, match=r"args\[1\]\[0\] is a object, not an array"):
    gpu_memory(lambda *args: args, f32(8), [object()])
  with pytest.raises(ValueError, match="does not trace"):
    gpu_memory(jax.jit(lambda x: x), "weights")
  with pytest.raises(TypeError, match="fn has to be a function, but it is a dict"):
    gpu_memory({}, f32(8))


def test_numbers_that_make_no_sense():
  with pytest.raises(ValueError, match="devices has to be a number of devices"):
    gpu_memory(lambda x: x, f32(8), devices=0)
  with pytest.raises(ValueError, match="params_argnum is 1, but fn gets 1 arguments"):
    gpu_memory(lambda x: x, f32(8), params_argnum=1)
  with pytest.raises(ValueError, match="has no arrays in it"):
    gpu_memory(lambda x, y: x, f32(8), {}, params_argnum=1)


VERSION = compiling._installed("jaxlib")


@pytest.mark.parametrize(
  ("jaxlib", "packages"),
  [
    ("0.10.2", "jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12 flatbuffers"),
    ("0.12.0.1", "jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 nvidia-cuda-nvcc nvidia-nvvm flatbuffers"),
  ],
)
def test_without_the_plugin_the_error_has_the_command(monkeypatch, jaxlib, packages):
  monkeypatch.setattr(compiling, "_installed", {"jaxlib": jaxlib, "flatbuffers": "25"}.get)
  with pytest.raises(ImportError) as error:
    gpu_memory(lambda x: x, f32(8))
  python = f"{sys.version_info.major}.{sys.version_info.minor}"
  assert str(error.value).endswith(
    f"For Python {python} with jaxlib {jaxlib}: {sys.executable} -m pip install {packages}"
  )


def test_a_plugin_of_another_version(monkeypatch):
  versions = {"jaxlib": "0.12.0.1", "jax-cuda12-plugin": "0.11.2", "jax-cuda12-pjrt": "0.11.2"}
  monkeypatch.setattr(compiling, "_installed", versions.get)
  with pytest.raises(
    ImportError, match=r"jax-cuda12-plugin is 0\.11\.2, but jaxlib is 0\.12\.0\.1.*jax-cuda12-plugin=="
  ):
    gpu_memory(lambda x: x, f32(8))
  versions |= {"jax-cuda12-plugin": "0.12.0.1"}
  del versions["jax-cuda12-pjrt"]
  with pytest.raises(ImportError, match="jax-cuda12-pjrt is not installed, but jaxlib is"):
    gpu_memory(lambda x: x, f32(8))
  versions |= {"jax-cuda12-pjrt": "0.12.0.1"}
  with pytest.raises(ImportError, match="needs flatbuffers"):
    gpu_memory(lambda x: x, f32(8))


def test_a_compiler_that_dies(monkeypatch, tmp_path):
  script = tmp_path / "dies.py"
  script.write_text("import sys; sys.exit('out of something')")
  monkeypatch.setattr(compiling, "_WORKER", script)
  with pytest.raises(RuntimeError, match=r"ended with code 1 before it was done.*\nout of something"):
    gpu_memory(lambda x: x, f32(8))


# --- Other processes --------------------------------------------------------------------------------------------------


def run_python(program, **environment):
  kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  root = os.path.dirname(os.path.dirname(mpo.__file__))
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)],
    env={**kept, "PYTHONPATH": root, **environment},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize("environment", [{}, {"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "cuda,cpu"}], ids=str)
@pytest.mark.few(1)
def test_jax_may_be_in_use_before_and_is_left_as_it_was(environment):
  done = run_python(
    """
    import os, jax, jax.numpy as jnp
    before = jnp.ones(3).devices(), jax.default_backend(), dict(os.environ)
    from optax_mpo._memory.gpu_memory import gpu_memory
    report = gpu_memory(lambda x: x + 1, jnp.ones(1000), donate_argnums=0)
    assert before == (jnp.ones(3).devices(), jax.default_backend(), dict(os.environ))
    print(jax.default_backend(), report.total_bytes)
    """,
    **environment,
  )
  assert done.stdout.split() == ["cpu", "4000"], done.stderr


def test_where_jax_cannot_start_the_error_says_what_to_set():
  done = run_python(
    """
    import jax, jax.numpy as jnp
    from optax_mpo._memory.gpu_memory import gpu_memory
    gpu_memory(lambda x: x + 1, jax.ShapeDtypeStruct((8,), jnp.float32))
    """,
    JAX_PLATFORMS="cuda",
  )
  assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: gpu_memory: JAX cannot start in this process")
  assert "Set JAX_PLATFORMS=cpu before JAX is imported" in done.stderr


# --- Reading XLA's texts ----------------------------------------------------------------------------------------------


def test_a_dump_of_another_form_gives_no_buffers(tmp_path):
  assert xla_dump.read(tmp_path, 0, []) == ()
  (tmp_path / "m.gpu_after_optimizations-buffer-assignment.txt").write_text("something else\n")
  assert xla_dump.read(tmp_path, 0, []) == ()


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
  assert xla_dump.read(tmp_path, 100, ["params['w']"]) == (
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
