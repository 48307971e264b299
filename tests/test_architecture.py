"""The house rules that a test can hold: which module may import which, and where private JAX may appear."""

import ast
import pathlib

import optax_mpo

PACKAGE = pathlib.Path(optax_mpo.__file__).parent

# Each module, with what it may import from this package and from outside the standard library.
ARROWS = {
  "_tree": (set(), {"jax"}),
  "_codec": (set(), {"jax", "numpy"}),
  "_wrapping": (set(), {"optax"}),
  "_made": (set(), {"jax"}),
  "_fp16": ({"_codec"}, {"jax"}),
  "_formats": ({"_codec", "_fp16"}, {"jax"}),
  "_cast": ({"_formats", "_tree"}, {"jax"}),
  "_rounding": (set(), {"jax"}),
  "_checks": ({"_codec", "_formats", "_tree"}, {"jax", "optax"}),
  "_apply": ({"_checks", "_formats", "_made", "_tree"}, {"jax", "optax"}),
  "_compensated": (
    {"_blocks", "_cast", "_checks", "_codec", "_formats", "_leafwise", "_made", "_order", "_rounding", "_rows"}
    | {"_step_weight", "_tree", "_types", "_wrapping"},
    {"jax", "optax"},
  ),
  "_blocks": ({"_order"}, {"jax", "numpy"}),
  "_state_kinds": (set(), {"jax"}),
  "_quantized": ({"_blocks", "_state_kinds", "_tree", "_wrapping"}, {"jax", "optax"}),
  "_convert": ({"_blocks", "_compensated", "_formats", "_quantized", "_tree"}, {"jax", "optax"}),
  "flax": ({"_apply", "_compensated", "_fused", "_release"}, {"flax", "jax", "optax"}),
  "checkpoint": ({"_tree"}, {"jax", "numpy", "orbax"}),
  "export": ({"_compensated", "_tree"}, {"jax", "numpy", "optax", "safetensors"}),
  "_sharding": ({"_blocks", "_tree"}, {"jax"}),
  "_loss_scale": ({"_wrapping"}, {"jax", "optax"}),
  "_numerics": ({"_codec", "_compensated", "_formats", "_tree"}, {"jax", "optax"}),
  "_types": (set(), {"jax"}),
  "_primitives": (set(), {"jax"}),
  "_order": ({"_primitives", "_types"}, {"jax"}),
  "_jaxpr": ({"_order"}, {"jax", "numpy"}),
  "_stacked": ({"_jaxpr", "_order"}, {"jax"}),
  "_elements": ({"_jaxpr"}, {"jax", "numpy"}),
  "_kernel": ({"_elements", "_jaxpr"}, {"jax"}),
  "_rows": ({"_jaxpr", "_stacked"}, {"jax"}),
  "_step_weight": ({"_kernel", "_order", "_primitives", "_rows"}, {"jax"}),
  "_leafwise": (
    {"_formats", "_made", "_separable", "_site", "_step_weight", "_tree", "_two_pass"},
    {"jax", "optax"},
  ),
  "_with_kernels": ({"_leafwise", "_step_weight", "_wrapping"}, {"optax"}),
  "_separable": ({"_apply", "_jaxpr", "_stacked", "_step_weight", "_tree", "_types"}, {"jax", "optax"}),
  "_handles": ({"_separable", "_tree"}, {"jax"}),
  "_pullback": ({"_jaxpr"}, {"jax"}),
  "_modules": (set(), set()),  # Flax is looked up, not imported
  "_fused_call": (
    {"_handles", "_order", "_rows", "_separable", "_site", "_step_weight", "_tree", "_types"},
    {"jax", "numpy"},
  ),
  "_site": ({"_elements", "_jaxpr", "_kernel", "_order", "_rows", "_stacked", "_step_weight", "_types"}, {"jax"}),
  "_plan": ({"_jaxpr", "_site", "_stacked", "_types"}, {"jax"}),
  "_evaluate": ({"_jaxpr", "_order", "_plan", "_site"}, {"jax"}),
  "_microbatch": ({"_tree"}, {"jax"}),
  "_layer": (
    {"_evaluate", "_fused_call", "_handles", "_jaxpr", "_microbatch", "_modules", "_order", "_plan", "_pullback"}
    | {"_site", "_types"},
    {"jax"},
  ),
  "_fused": ({"_fused_call", "_handles", "_separable", "_tree", "_wrapping"}, {"jax", "optax"}),
  "_two_pass": ({"_jaxpr", "_separable", "_site", "_stacked", "_tree", "_types"}, {"jax"}),
  "_release": (
    {"_evaluate", "_jaxpr", "_order", "_plan", "_primitives", "_separable", "_site", "_tree", "_two_pass"}
    | {"_wrapping"},
    {"jax", "optax"},
  ),
  "_explain": ({"_plan", "_release", "_separable", "_two_pass"}, {"jax", "optax"}),
  "_gpu_targets": (set(), set()),
  "_memory_report": (set(), {"matplotlib"}),  # inside plot
  "_memory_dump": ({"_memory_report"}, set()),
  "_memory_worker": (set(), {"jax", "numpy"}),  # a process of its own
  "_memory_compile": ({"_gpu_targets"}, {"jax"}),
  "_memory": ({"_gpu_targets", "_memory_compile", "_memory_dump", "_memory_report", "_tree"}, {"jax"}),
}


def imports(module: str) -> tuple[set[str], set[str]]:
  """Returns the modules of this package, and the outside packages, that a module imports anywhere."""
  own, outside = set(), set()
  for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
    if isinstance(node, ast.Import):
      outside |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      package, *rest = (node.module or "").split(".")
      if package == "optax_mpo":
        own |= set(rest) or {alias.name for alias in node.names}
      else:
        outside.add(package)
  return own, outside


def test_imports_point_one_way():
  import sys

  modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
  assert modules == set(ARROWS)
  for module, (own_allowed, outside_allowed) in ARROWS.items():
    own, outside = imports(module)
    assert own <= own_allowed, module
    assert outside - set(sys.stdlib_module_names) <= outside_allowed, module


def test_private_jax_stays_in_one_module():
  assert [path.name for path in PACKAGE.glob("*.py") if "jax._src" in path.read_text()] in ([], ["_jaxpr.py"])


def test_primitives_are_made_by_one_module():
  """With all rules that JAX asks for."""
  makers = [path.name for path in PACKAGE.glob("*.py") if " Primitive(" in path.read_text()]
  assert makers == ["_primitives.py"]


def test_the_public_api_is_listed_by_name():
  names = {name for name in vars(optax_mpo) if not name.startswith("_")}
  assert {"compensated", "init", "cast", "master_params", "apply_updates", "CompensatedState", "gpu_memory"} <= names
  for name in names:
    assert (getattr(optax_mpo, name).__doc__ or "").strip(), name


def test_files_stay_small():
  for path in PACKAGE.glob("*.py"):
    assert len(path.read_text().splitlines()) <= 500, path.name
