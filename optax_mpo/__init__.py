"""optax_mpo: memory-efficient mixed-precision training for Optax and JAX.

Storage: bf16 params with packed compensation bits in place of f32 master weights.
"""

from optax_mpo._compensated import CompensatedState as CompensatedState
from optax_mpo._compensated import apply_updates as apply_updates
from optax_mpo._compensated import cast as cast
from optax_mpo._compensated import compensated as compensated
from optax_mpo._compensated import init as init
from optax_mpo._compensated import master_params as master_params

__version__ = "0.1.0"
