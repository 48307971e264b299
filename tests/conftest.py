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
