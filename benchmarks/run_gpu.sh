#!/usr/bin/env bash
# All checks and benchmarks that need a GPU, in ten minutes on one H100 or H200. Needs jax for CUDA, flatbuffers, optax
# and rich, and no network. Results go to the given folder, or to benchmarks/results. Commit them: they name the card.
# Arguments after the folder go to gpu_check.py: --resume runs what a first call did not finish. Prints a table of what
# was measured and failed, and then which claims of docs/gpu.md hold. Exits with 0 if everything was measured.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Each part is a process. The cache passes on what one compiles, such as the step of Optax, to the next.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/optax_mpo_gpu_check}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# JAX preallocates its fraction of the card, as by default: an allocator that grows leaves gaps, which count as used.
status=0
"$python" benchmarks/gpu_check.py --gpu --output-dir "$out" "${@:2}" || status=$?
[ ! -f "$out/gpu_check.json" ] || "$python" benchmarks/gpu_claims.py "$out/gpu_check.json" || true
exit "$status"
