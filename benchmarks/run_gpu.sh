#!/usr/bin/env bash
# All checks and benchmarks that need a GPU, in ten minutes on one H100 or H200. Needs jax for CUDA, flatbuffers, optax
# and rich, and no network. Results go to the given folder, or to benchmarks/results. Commit them: they name the card.
# Arguments after the folder go to gpu_check.py: --resume runs what a first call did not finish.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Each part is a process. The cache passes on what one compiles, such as the step of Optax, to the next.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# JAX preallocates its fraction of the card, as by default: an allocator that grows leaves gaps, which count as used.
"$python" -c 'import jax; assert jax.default_backend() == "gpu", "no GPU: " + jax.default_backend()'
"$python" benchmarks/gpu_check.py --output-dir "$out" "${@:2}"
