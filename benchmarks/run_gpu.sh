#!/usr/bin/env bash
# All checks and benchmarks that need a GPU, in ten minutes on one H100 or H200, with jax for CUDA, optax and flax, and no
# network. Results go to the folder that is given, or to benchmarks/results: commit them, the card is in them. What
# follows the folder is handed to gpu_check.py: --resume goes on with what a first call left.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Parts are processes: what one compiles, such as the step of Optax, the next finds.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# JAX takes its share of the card at once, as it does by default: an allocator that grows leaves gaps, which count as used.
"$python" -c 'import jax; assert jax.default_backend() == "gpu", "no GPU: " + jax.default_backend()'
"$python" benchmarks/gpu_check.py --output-dir "$out" "${@:2}"
