"""Test-wide settings, made before JAX starts: the CPU only, eight of it for tests that shard, no fused multiply-adds.

Which of a*b + c*d LLVM takes into a fused multiply-add differs from loop to loop, in plain Optax as here, and with it
the last bit (docs/fused_layers.md); at its lowest level of optimization it even differs from one statement to the next.
Without these instructions programs with the same operations have the same bits, however XLA fuses them.
tests/test_multiply_add.py runs with them what is equal all the same.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
  flags += " --xla_force_host_platform_device_count=8"
if "xla_cpu_max_isa" not in flags and "OPTAX_MPO_TEST_MULTIPLY_ADD" not in os.environ:
  flags += " --xla_cpu_max_isa=AVX"  # ignored on other processors than x86
os.environ["XLA_FLAGS"] = flags

import functools  # noqa: E402

import jax  # noqa: E402  # with the environment above
import optax  # noqa: E402
import pytest  # noqa: E402

# The library leans on no implicit conversion and on no implicit broadcast to more axes, so that it works for users who
# forbid them. What is not ours and does, runs under `relaxed`.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def _under(dtypes, ranks, fun):
  @functools.wraps(fun)
  def under(*args, **kwargs):
    with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion(ranks):
      return fun(*args, **kwargs)

  return under


def relaxed(fun):
  """A function under JAX's own defaults, for code that is not ours: of Optax, of Flax, or a model of a test."""
  return _under("standard", "allow", fun)


def _of_relaxed_update(make):
  """An optimizer whose update runs under JAX's own defaults."""

  @functools.wraps(make)
  def optimizer(*args, **kwargs):
    tx = make(*args, **kwargs)
    return tx._replace(update=relaxed(tx.update))

  return optimizer


def _relax_optax():
  """Optax's own powers and quotients of step counts mix int32 and floats."""
  for module in (optax.tree, optax.tree_utils):
    for name in ("bias_correction", "tree_bias_correction"):
      if hasattr(module, name):
        setattr(module, name, relaxed(getattr(module, name)))
  optax.apply_updates = relaxed(optax.apply_updates)  # f32 updates to bf16 weights
  accumulate = optax.MultiSteps.__init__

  def init(self, opt, *args, **kwargs):
    inner = optax.with_extra_args_support(opt)
    strict = inner._replace(update=_under("strict", "raise", inner.update))
    accumulate(self, strict, *args, **kwargs)

  optax.MultiSteps.__init__ = init
  optax.MultiSteps.update = relaxed(optax.MultiSteps.update)
  for module, name in (
    (optax, "radam"),
    (optax, "add_noise"),
    (optax, "noisy_sgd"),
    (optax.contrib, "schedule_free_sgd"),
    (optax.contrib, "schedule_free_adamw"),
    (optax.contrib, "prodigy"),
  ):
    setattr(module, name, _of_relaxed_update(getattr(module, name)))
  schedules = [name for name in dir(optax) if name.endswith("_schedule") and not name.startswith("scale_by")]
  schedules.append("exponential_decay")
  for name in schedules:
    make = getattr(optax, name)
    setattr(optax, name, functools.wraps(make)(lambda *args, make=make, **kwargs: relaxed(make(*args, **kwargs))))


_relax_optax()


LOOSE = frozenset(
  """test_advice test_checkpoint test_donation test_exactness test_export test_flax test_fused_memory
  test_fused_misuse test_gradient_layout test_kernel test_layer test_memory test_microbatch test_multiply_add
  test_nnx_states test_optax_contract test_peak_memory test_probes test_quantized_training test_readme
  test_release test_release_forms test_release_models test_release_property test_rows test_sharded_memory
  test_sharded_modes test_sharding test_small_stacks test_stack_copies test_stacked test_state_flow
  test_train_digits test_train_lm test_train_lm_processes test_train_lm_resume test_upcast test_update_traffic
  test_wide_blocks test_wrappers""".split()
)
"""Files whose models add biases to batches and mix f32 data with bf16 weights, as models of users do.

tests/test_primitives.py and tests/test_x64.py go over all routes with models that do not.
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Loose files, and examples in docstrings, run under JAX's own defaults."""
  if item.path.parent.name == "tests" and item.path.stem not in LOOSE:
    return (yield)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    return (yield)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file():
  """Each file starts with no compiled program: JAX keeps 8192, and then forgets the new ones instead of the old."""
  yield
  jax.clear_caches()
