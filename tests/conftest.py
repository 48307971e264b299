"""Settings for all tests, made before JAX starts: only CPUs, eight of them for sharding, and no fused multiply-adds.

For a*b + c*d, LLVM chooses in each loop which product becomes part of a fused multiply-add, in plain Optax too. The
choice affects the last bit (docs/fused_layers.md). At its lowest optimization level it even differs between statements.
Without these instructions, programs with the same operations give the same bits, however XLA fuses them.
tests/house/test_multiply_add.py runs those tests with them that must be equal anyway.
"""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
  flags += " --xla_force_host_platform_device_count=8"
if "xla_cpu_max_isa" not in flags and "OPTAX_MPO_TEST_MULTIPLY_ADD" not in os.environ:
  flags += " --xla_cpu_max_isa=AVX"  # has no effect on processors other than x86
if "xla_cpu_parallel_codegen_split_count" not in flags:
  # Each part that XLA compiles in parallel costs some milliseconds, and these programs are small.
  flags += " --xla_cpu_parallel_codegen_split_count=1"
if "xla_backend_optimization_level" not in flags and "OPTAX_MPO_TEST_OPTIMIZED" not in os.environ:
  flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # LLVM's: compiles faster
  if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones know no other emitters than those of MLIR
    # The others compile a step in a quarter of the time. For size, they sum element by element, whatever the shape.
    flags += " --xla_cpu_use_fusion_emitters=false --xla_backend_extra_options=xla_cpu_optimize_for_size=1"
os.environ["XLA_FLAGS"] = flags

import functools  # noqa: E402
import gc  # noqa: E402

import flax.linen  # noqa: E402
import jax  # noqa: E402  # with the environment above
import optax  # noqa: E402
import pytest  # noqa: E402

import optax_mpo  # noqa: E402
from tests.helpers import relaxed, strict  # noqa: E402

# The library relies on no implicit dtype or rank promotion, so that it works for users who forbid them. Optax and Flax
# rely on them, so they run under JAX's defaults. Our transformations inside Optax's run under the strict modes again.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def _making(mode, make):
  """Wraps a function that makes transformations or schedules, so that its results run in a mode."""

  @functools.wraps(make)
  def made(*args, **kwargs):
    result = mode(make)(*args, **kwargs)
    if isinstance(result, optax.GradientTransformation):
      return result._replace(init=mode(result.init), update=mode(result.update))
    return _making(mode, result) if callable(result) else result

  return made


def _set_modes():
  for module in (optax, optax.contrib, optax.schedules):
    for name, make in vars(module).items():
      returned = str(getattr(make, "__annotations__", {}).get("return", ""))
      if "GradientTransformation" in returned or "Schedule" in returned:
        setattr(module, name, _making(relaxed, make))
  optax.MultiSteps.update = relaxed(optax.MultiSteps.update)
  optax.apply_updates = relaxed(optax.apply_updates)  # f32 updates to bf16 weights
  for module in (optax.tree, optax.tree_utils):
    for name in ("bias_correction", "tree_bias_correction"):
      if hasattr(module, name):
        setattr(module, name, relaxed(getattr(module, name)))
  for name in ("init", "apply"):
    setattr(flax.linen.Module, name, relaxed(getattr(flax.linen.Module, name)))
  for name in ("compensated", "quantized_state", "per_layer", "loss_scaled", "with_kernels"):
    setattr(optax_mpo, name, _making(strict, getattr(optax_mpo, name)))


_set_modes()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Of a test with `few(n)`, the fast tier runs n cases, spread over its table; the others are marked `full`.

  With `few(n, full=m)`, the fuller tier runs m of these, spread likewise, and the rest are marked `slow`.
  """
  tables: dict = {}
  for item in items:
    if marker := item.get_closest_marker("few"):
      tables.setdefault((item.path, item.originalname), (marker, []))[1].append(item)
  for marker, cases in tables.values():
    fast = _spread(cases, marker.args[0])
    others = [item for item in cases if item not in fast]
    full = _spread(others, marker.kwargs.get("full", len(others)))
    for item in others:
      item.add_marker(pytest.mark.full if item in full else pytest.mark.slow)


def _spread(cases, count):
  return [cases[k] for k in sorted({round(k * (len(cases) - 1) / max(count - 1, 1)) for k in range(count)})]


@pytest.fixture
def default_promotion():
  """JAX's defaults, for tests of implicit conversions."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Runs examples in docstrings under JAX's defaults, as readers do."""
  if not isinstance(item, pytest.DoctestItem):
    return (yield)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return (yield)


class _Compiled:
  """Counts programs that JAX has compiled since its caches were cleared."""

  count = 0

  @classmethod
  def add(cls, event, *_, **__):
    cls.count += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_Compiled.add)


@pytest.fixture
def compiled():
  """Counts the programs that JAX compiles, as `compiled.count`."""
  return _Compiled


@pytest.fixture(autouse=True, scope="module")
def _programs_of_few_files():
  """Clears compiled programs, each of which takes about a megabyte, after every few hundred of them."""
  yield
  if _Compiled.count > 300:
    jax.clear_caches()
    _Compiled.count = 0


def pytest_collection_finish():
  """Leaves what is imported out of garbage collection, which would go through it again and again."""
  gc.collect()
  gc.freeze()
