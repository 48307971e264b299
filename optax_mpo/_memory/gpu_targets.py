"""The GPUs that `gpu_memory` knows by name, with the figures that XLA:GPU reads of a card.

Why: without a card, XLA needs a `stream_executor.GpuTargetConfigProto`. It holds the figures that the compiler decides
by: compute capability, number of cores, shared memory, L2 cache and device memory.

Sources: for H100, H200, A100 and B200 the files under xla/backends/gpu/target_config/specs of the XLA project; for the
other cards CUDA's deviceQuery and NVIDIA's data sheets. `memory` is what the driver reports to programs. It is less
than the nominal size, and varies by some hundred MiB between driver versions: 143156 MiB for H200, 45373 for L40S,
24081 for RTX 4090, 22516 for A10. For RTX 3090, RTX 5090, L4 and GH200 it is the smallest "total capacity" that errors
of PyTorch report for these cards: 23.68, 31.34, 22.03 and 94.50 GiB. The other figures of RTX 5090, RTX 3090 and L4,
`flops` of A100, L40S and RTX 4090, and cores, bandwidth and bus of GH200 agree with published tables of
specifications; a GeForce card sums products in f32 at half the published rate of sums in f16. `flops` and `bus` of the
rest, and L2 cache and clock of GH200, are what data sheets are remembered to say. All are without sparsity.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
  """What XLA:GPU has to know about a card.

  Attributes:
    name: the driver's name for the card.
    compute: the compute capability, major and minor.
    cores: streaming multiprocessors.
    memory: bytes of device memory the driver reports.
    l2: bytes of L2 cache.
    shared: bytes of shared memory of a multiprocessor.
    shared_optin: bytes of shared memory a block can ask for.
    threads: the most threads a multiprocessor can hold.
    fpus: 32-bit floating-point units of a multiprocessor.
    bandwidth: memory bandwidth, in bytes per second.
    clock: in GHz.
    flops: operations per second of dense bf16 products, summed in f32. XLA does not read it.
    bus: what connects the card to its host, at best: "PCIe 4", "PCIe 5" or "NVLink-C2C". XLA does not read it either.
  """

  name: str
  compute: tuple[int, int]
  cores: int
  memory: int
  l2: int
  shared: int
  shared_optin: int
  threads: int
  fpus: int
  bandwidth: int
  clock: float
  flops: float
  bus: str = "PCIe 4"

  @property
  def config(self) -> str:
    """The card as a GpuTargetConfigProto in text format."""
    major, minor = self.compute
    feature = "ACCELERATED_FEATURES" if major in (9, 10) else "NONE"
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32
        shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
        shared_memory_per_block_optin: {self.shared_optin}
        threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: {self.fpus}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock}
        device_memory_size: {self.memory}
        cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{self.name}"
    """


def _hopper(name: str, memory: int, bandwidth: int, l2: int = 52428800, bus: str = "PCIe 5") -> Target:
  return Target(name, (9, 0), 132, memory, l2, 233472, 232448, 2048, 128, bandwidth, 1.98, 989.4e12, bus)


def _a100(name: str, memory: int, bandwidth: int) -> Target:
  return Target(name, (8, 0), 108, memory, 41943040, 167936, 166912, 2048, 64, bandwidth, 1.41, 312e12)


def _gddr(
  name: str, compute: tuple[int, int], cores: int, memory: int, l2: int, bandwidth: int, clock: float, flops: float
) -> Target:
  shared, bus = (131072, "PCIe 5") if compute == (12, 0) else (102400, "PCIe 4")
  return Target(name, compute, cores, memory, l2, shared, 101376, 1536, 128, bandwidth, clock, flops, bus)


MIB = 2**20
TARGETS = {
  "h100": _hopper("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),
  "h200": _hopper("NVIDIA H200", 143156 * MIB, 4800000000000),
  "gh200": _hopper("NVIDIA GH200 480GB", 96768 * MIB, 4022784000000, 62914560, "NVLink-C2C"),
  "b200": Target(
    *("NVIDIA B200", (10, 0), 148, 191514411008, 132644864, 233472, 232448, 2048, 128),
    *(7672320000000, 1.965, 2250e12, "PCIe 5"),
  ),
  "a100-80gb": _a100("NVIDIA A100-SXM4-80GB", 85100068864, 2039040000000),
  "a100-40gb": _a100("NVIDIA A100-SXM4-40GB", 42331013120, 1555200000000),
  "l40s": _gddr("NVIDIA L40S", (8, 9), 142, 47576711168, 100663296, 864000000000, 2.52, 362e12),
  "l4": _gddr("NVIDIA L4", (8, 9), 58, 22558 * MIB, 50331648, 300096000000, 2.04, 121e12),
  "rtx5090": _gddr("NVIDIA GeForce RTX 5090", (12, 0), 170, 32089 * MIB, 100663296, 1792000000000, 2.407, 209.5e12),
  "rtx4090": _gddr("NVIDIA GeForce RTX 4090", (8, 9), 128, 25250627584, 75497472, 1008000000000, 2.52, 165.2e12),
  "rtx3090": _gddr("NVIDIA GeForce RTX 3090", (8, 6), 82, 24248 * MIB, 6291456, 936096000000, 1.695, 71e12),
  "a10": _gddr("NVIDIA A10", (8, 6), 72, 23609475072, 6291456, 600000000000, 1.695, 125e12),
}
LOCAL = "local"


def find(target: str) -> Target | None:
  """Returns the card of that name, or None for the local card.

  Raises:
    ValueError: for an unknown name. The message lists the known ones.
  """
  key = target.lower() if isinstance(target, str) else target
  if key == LOCAL:
    return None
  if key not in TARGETS:
    raise ValueError(
      f"gpu_memory: there is no target {target!r}. Known are {', '.join(TARGETS)}, and {LOCAL!r} for the card in this "
      "machine."
    )
  return TARGETS[key]
