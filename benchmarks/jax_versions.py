"""Records a run of the tests with the Python and JAX that run this: benchmarks/try_jax.sh calls it.

    python benchmarks/jax_versions.py junit.xml fast benchmarks/results/jax_versions.json 0

An entry of the JSON has the versions, the tier, the counts of tests, the names of those that failed, and whether all of
them ran, by the exit code of pytest. A new run of the same JAX, Python and tier replaces its entry.
"""

import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def entry_of(junit: Path, tier: str, code: int) -> dict[str, Any]:
  """Returns the entry of a run that pytest wrote to `junit`, in JUnit's XML, and ended with an exit code."""
  cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
  failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
  skipped = sum(c.find("skipped") is not None for c in cases)
  return {
    "jax": version("jax"),
    "jaxlib": version("jaxlib"),
    "optax": version("optax"),
    "python": platform.python_version(),
    "tier": tier,
    "complete": code in (0, 1),  # not stopped
    "passed": len(cases) - len(failed) - skipped,
    "skipped": skipped,
    "failed": sorted({f"{c.get('classname')}::{c.get('name')}" for c in failed}),
  }


def recorded(entries: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the entries with a new one, which replaces that of the same JAX, Python and tier."""

  def key(entry: dict[str, Any]) -> tuple[str, ...]:
    return tuple(entry[name] for name in ("jax", "python", "tier"))

  return sorted([*(e for e in entries if key(e) != key(new)), new], key=key)


def main(argv: Sequence[str] | None = None) -> int:
  junit, tier, results, code = sys.argv[1:] if argv is None else argv
  path = Path(results)
  entries = json.loads(path.read_text()) if path.exists() else []
  path.write_text(json.dumps(recorded(entries, entry_of(Path(junit), tier, int(code))), indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
