#!/usr/bin/env bash
# All checks and benchmarks that need a GPU, in ten minutes on one H100 or H200, with jax for CUDA, optax and flax, and no
# network. Results go to the folder that is given, or to benchmarks/results: commit them, the card is in them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false

"$python" -c 'import jax; assert jax.default_backend() == "gpu", "no GPU: " + jax.default_backend()'
"$python" benchmarks/gpu_check.py --output-dir "$out"
