"""optax_mpo: memory-efficient mixed-precision training for Optax and JAX.

Storage: bf16, fp16 or float8 params with packed compensation bits instead of f32 master weights.
Gradient release: weights are updated inside the backward pass, and each gradient is freed at once.
Compact state: moments and momentum of any Optax transformation in 8 bits.
Memory: the peak memory of any step on a GPU, without that GPU.
"""

import importlib as _importlib
import sys as _sys
from types import ModuleType as _ModuleType

from optax_mpo._codecs.apply import apply_updates as apply_updates
from optax_mpo._codecs.blocks import Quantized as Quantized
from optax_mpo._codecs.cast import cast as cast
from optax_mpo._codecs.codec import ScaledBits as ScaledBits
from optax_mpo._codecs.masters import CompensatedState as CompensatedState
from optax_mpo._codecs.masters import decoded as decoded
from optax_mpo._codecs.masters import master_params as master_params
from optax_mpo._core.packing import PackedState as PackedState
from optax_mpo._layers.fused_step import fused_value_and_update as fused_value_and_update
from optax_mpo._layers.handles import FusedError as FusedError
from optax_mpo._layers.layer import fused_layer as fused_layer
from optax_mpo._layers.layer import fused_scan as fused_scan
from optax_mpo._layers.layer import fused_value as fused_value
from optax_mpo._memory.gpu_memory import gpu_memory as gpu_memory
from optax_mpo._memory.report import Buffer as Buffer
from optax_mpo._memory.report import MemoryReport as MemoryReport
from optax_mpo._stepping.explain import Explanation as Explanation
from optax_mpo._stepping.explain import explain as explain
from optax_mpo._stepping.microbatches import Microbatches as Microbatches
from optax_mpo._stepping.streamed import streamed as streamed
from optax_mpo._stepping.value_and_update import value_and_update as value_and_update
from optax_mpo._transforms.compensated import RoundingState as RoundingState
from optax_mpo._transforms.compensated import compensated as compensated
from optax_mpo._transforms.compensated import init as init
from optax_mpo._transforms.convert import convert as convert
from optax_mpo._transforms.loss_scale import LossScaleState as LossScaleState
from optax_mpo._transforms.loss_scale import loss_scale as loss_scale
from optax_mpo._transforms.loss_scale import loss_scaled as loss_scaled
from optax_mpo._transforms.lost_updates import lost_updates as lost_updates
from optax_mpo._transforms.norms import DelayedNormState as DelayedNormState
from optax_mpo._transforms.norms import RecordedNorms as RecordedNorms
from optax_mpo._transforms.norms import clip_by_delayed_norm as clip_by_delayed_norm
from optax_mpo._transforms.norms import record_norms as record_norms
from optax_mpo._transforms.norms import recorded as recorded
from optax_mpo._transforms.packed import packed as packed
from optax_mpo._transforms.packed import unpacked as unpacked
from optax_mpo._transforms.per_layer import PerLayerState as PerLayerState
from optax_mpo._transforms.per_layer import per_layer as per_layer
from optax_mpo._transforms.presets import compact as compact
from optax_mpo._transforms.presets import exact as exact
from optax_mpo._transforms.presets import matrices as matrices
from optax_mpo._transforms.quantized import QuantizedState as QuantizedState
from optax_mpo._transforms.quantized import dequantized as dequantized
from optax_mpo._transforms.quantized import quantized_state as quantized_state
from optax_mpo._transforms.sharding import state_sharding as state_sharding
from optax_mpo._transforms.with_kernels import with_kernels as with_kernels

__version__ = "0.1.0"

# Public classes name this module as their own, so that pickles do not depend on the layout of the folders.
_CLASSES = (
  *(Buffer, CompensatedState, DelayedNormState, Explanation, FusedError, LossScaleState, MemoryReport, Microbatches),
  *(PackedState, PerLayerState, Quantized, QuantizedState, RecordedNorms, RoundingState, ScaledBits),
)
_BEFORE_THE_FOLDERS = {  # pickles made before the move into folders name these modules
  "_blocks": "_codecs.blocks",
  "_compensated": "_transforms.compensated",
  "_explain": "_stepping.explain",
  "_handles": "_layers.handles",
  "_loss_scale": "_transforms.loss_scale",
  "_memory_report": "_memory.report",
  "_quantized": "_transforms.quantized",
}
for _class in _CLASSES:
  _class.__module__ = __name__
for _old, _new in _BEFORE_THE_FOLDERS.items():
  _sys.modules[f"{__name__}.{_old}"] = _sys.modules[f"{__name__}.{_new}"]


def __getattr__(name: str) -> _ModuleType:
  """Imports `flax` (needs Flax), `checkpoint` (Orbax) and `export` (safetensors) on first use."""
  if name in ("checkpoint", "export", "flax"):
    return _importlib.import_module(f"optax_mpo.{name}")
  raise AttributeError(f"module 'optax_mpo' has no attribute {name!r}")
