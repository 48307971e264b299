#!/usr/bin/env bash
# Runs the tests with another JAX or Python, in a new virtual environment, and records the result.
#
#     benchmarks/try_jax.sh 0.11.2 python3.12          # a version of JAX
#     benchmarks/try_jax.sh newest python3.13 fast     # the newest JAX that pip finds, the fast tier alone
#
# Tiers: fast (what `python -m pytest` runs) and gpu (tests/memory and tests/backends with `-m full`: steps compiled for a
# GPU, without one). Default: both. The counts, and the names of what failed, go to benchmarks/results/jax_versions.json,
# an entry for each JAX, Python and tier. If pytest is stopped (SIGINT), what has run until then counts as incomplete.
# Exits with 1 if anything failed. WORKERS=2 runs two tests at a time (default 1).
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: benchmarks/try_jax.sh VERSION|newest [PYTHON] [TIER...]}
python=${2:-python3}
tiers=("${@:3}")
[ ${#tiers[@]} -gt 0 ] || tiers=(fast gpu)
results=$PWD/benchmarks/results/jax_versions.json
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONPATH=$PWD

"$python" -m venv "$work/venv"
if [ "$version" = newest ]; then pins=(); else pins=("jax==$version" "jaxlib==$version"); fi
"$work/venv/bin/pip" install -q -e '.[test]' "${pins[@]}"

status=0
for tier in "${tiers[@]}"; do
  case $tier in
    fast) chosen=() ;;
    gpu) chosen=(tests/memory tests/backends -m "full and not slow") ;;
    *) echo "there is no tier $tier" >&2; exit 2 ;;
  esac
  code=0  # of pytest: 1 if a test failed, 2 if it was stopped
  "$work/venv/bin/python" -m pytest -q -n "${WORKERS:-1}" --junitxml "$work/$tier.xml" "${chosen[@]}" || code=$?
  [ $code = 0 ] || status=1
  "$work/venv/bin/python" benchmarks/jax_versions.py "$work/$tier.xml" "$tier" "$results" "$code"
done
exit $status
