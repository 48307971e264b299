"""optax_mpo: memory-efficient mixed-precision training for Optax and JAX.

Storage: bf16 or fp16 params with packed compensation bits in place of f32 master weights.
Fused: the optimizer step inside the backward pass, so that no gradients are kept.
Compact state: moments and momentum of any Optax transformation in 8 bits.
Memory: the peak of any step on a GPU that need not be there.
"""

import importlib as _importlib
from typing import Any as _Any

from optax_mpo._apply import apply_updates as apply_updates
from optax_mpo._blocks import Quantized as Quantized
from optax_mpo._cast import cast as cast
from optax_mpo._compensated import CompensatedState as CompensatedState
from optax_mpo._compensated import RoundingState as RoundingState
from optax_mpo._compensated import compensated as compensated
from optax_mpo._compensated import init as init
from optax_mpo._compensated import master_params as master_params
from optax_mpo._convert import convert as convert
from optax_mpo._explain import Explanation as Explanation
from optax_mpo._explain import explain as explain
from optax_mpo._fused import fused_value_and_update as fused_value_and_update
from optax_mpo._handles import FusedError as FusedError
from optax_mpo._layer import fused_layer as fused_layer
from optax_mpo._layer import fused_scan as fused_scan
from optax_mpo._layer import fused_value as fused_value
from optax_mpo._loss_scale import LossScaleState as LossScaleState
from optax_mpo._loss_scale import loss_scale as loss_scale
from optax_mpo._loss_scale import loss_scaled as loss_scaled
from optax_mpo._memory import gpu_memory as gpu_memory
from optax_mpo._memory_report import Buffer as Buffer
from optax_mpo._memory_report import MemoryReport as MemoryReport
from optax_mpo._numerics import lost_updates as lost_updates
from optax_mpo._quantized import QuantizedState as QuantizedState
from optax_mpo._quantized import dequantized as dequantized
from optax_mpo._quantized import quantized_state as quantized_state
from optax_mpo._release import value_and_update as value_and_update
from optax_mpo._sharding import state_sharding as state_sharding
from optax_mpo._with_kernels import with_kernels as with_kernels

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
  """Imports the submodules that need Flax and Orbax when they are first asked for."""
  if name in ("checkpoint", "flax"):
    return _importlib.import_module(f"optax_mpo.{name}")
  raise AttributeError(f"module 'optax_mpo' has no attribute {name!r}")
