"""benchmarks/jax_versions.py records what pytest wrote, an entry for each JAX, Python and tier."""

import json

import jax
import pytest

from benchmarks import jax_versions

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_bad[x]"><failure message="no"/></testcase>
<testcase classname="tests.a" name="test_broken"><error message="no"/></testcase>
<testcase classname="tests.a" name="test_left_out"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(("code", "complete"), [("1", True), ("2", False)], ids=["failed", "stopped"])
def test_a_run_is_recorded_in_place_of_the_one_before(tmp_path, code, complete):
  junit, path = tmp_path / "junit.xml", tmp_path / "versions.json"
  junit.write_text(JUNIT)
  other = {"jax": "0.1", "python": "3.0", "tier": "fast", "passed": 7}
  path.write_text(json.dumps([other]))
  for _ in range(2):
    jax_versions.main([str(junit), "fast", str(path), code])
  first, entry = json.loads(path.read_text())
  assert first == other
  assert entry["jax"] == jax.__version__
  assert entry["failed"] == ["tests.a::test_bad[x]", "tests.a::test_broken"]
  assert (entry["tier"], entry["passed"], entry["skipped"], entry["complete"]) == ("fast", 1, 1, complete)
