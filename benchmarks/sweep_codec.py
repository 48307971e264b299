"""Tests the codec on all 2^32 f32 bit patterns, for 16, 8 and 4 bits. Run: python benchmarks/sweep_codec.py

Counts the patterns that break a law, prints the counts (with --output, writes them as JSON) and fails if there are any.
The laws:

- With 16 bits every pattern but a NaN comes back unchanged.
- With 8 and 4 bits the number that comes back is at most half a unit away. Finite numbers stay finite, so just below
  infinity it may be almost a unit away.
- The number that comes back splits to the same pair again.
- A NaN comes back as the canonical NaN, and its bf16 half is a NaN.
"""

import argparse
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.progress import track

from optax_mpo._codecs import bf16

CHUNK = 1 << 26
INF = 0x7F80_0000


def count_violations(start: jax.Array, bits: int) -> jax.Array:
  """Returns how many of the CHUNK patterns starting at `start: uint32[]` break a law."""
  pattern = start + jnp.arange(CHUNK, dtype=jnp.uint32)
  magnitude = pattern & 0x7FFF_FFFF
  is_nan = magnitude > INF
  low, kept = bf16.split(lax.bitcast_convert_type(pattern, jnp.float32), bits)
  back = bf16.join(low, kept)
  back_pattern = lax.bitcast_convert_type(back, jnp.uint32)
  low_again, kept_again = bf16.split(back, bits)

  def bits_of(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16)

  unit = 1 << (16 - bits)
  distance = jnp.abs(back_pattern.astype(jnp.int32) - pattern.astype(jnp.int32))  # large if the signs differ
  at_top = (magnitude >= INF - unit) & (magnitude < INF)  # must not round to infinity, so almost a unit away
  wrong = (distance > jnp.where(at_top, unit - 1, unit // 2)) | (jnp.isfinite(back) != (magnitude < INF))
  nan_wrong = (back_pattern != 0x7FC0_0000) | ~jnp.isnan(low.astype(jnp.float32))
  drifts = (bits_of(low_again) != bits_of(low)) | (kept_again != kept)
  return jnp.sum(jnp.where(is_nan, nan_wrong, wrong) | drifts)


def violations(bits: int, patterns: int = 1 << 32) -> int:
  """Returns how many of the first `patterns` (a multiple of CHUNK) break a law."""
  count = jax.jit(count_violations, static_argnums=1)
  starts = np.arange(0, patterns, CHUNK, dtype=np.uint64).astype(np.uint32)
  return sum(int(count(start, bits)) for start in track(starts, f"{bits:2d} bits", console=Console(stderr=True)))


def main() -> None:
  parser = argparse.ArgumentParser(description="Tries the codec on all 2^32 f32 bit patterns.")
  parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4], choices=[16, 8, 4])
  parser.add_argument("--output", type=pathlib.Path, help="where to write the counts as JSON")
  args = parser.parse_args()

  results = {"jax": jax.__version__, "backend": jax.default_backend(), "machine": platform.machine(), "sweeps": []}
  for bits in args.bits:
    started = time.perf_counter()
    found = violations(bits)
    seconds = time.perf_counter() - started
    results["sweeps"].append({"bits": bits, "patterns": 1 << 32, "violations": found, "seconds": round(seconds, 1)})
    print(f"{bits:2d} bits: {found} of {1 << 32} patterns break a law ({seconds:.0f} s)")
  if args.output:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
  if any(sweep["violations"] for sweep in results["sweeps"]):
    raise SystemExit(1)


if __name__ == "__main__":
  main()
