"""Architecture rules: which folder may import which, where private JAX may appear, and file sizes."""

import ast
import pathlib
import sys

import optax_mpo

PACKAGE = pathlib.Path(optax_mpo.__file__).parent

# For each folder: the folders of this package and the outside packages that its modules may import. A folder may import
# only folders that are listed before it.
GROUND = {"_core"}
FLOORS = {
  "_core": (set(), {"jax", "numpy", "optax"}),
  "_codecs": (GROUND, {"jax", "numpy", "optax"}),
  "_program": (GROUND, {"jax", "numpy"}),
  "_backends": ({"_program"} | GROUND, {"jax"}),
  "_updates": ({"_backends", "_program", "_codecs"} | GROUND, {"jax", "optax"}),
  "_stepping": ({"_updates", "_backends", "_program", "_codecs"} | GROUND, {"jax", "optax", "numpy"}),
  "_layers": ({"_stepping", "_updates", "_backends", "_program"} | GROUND, {"jax", "numpy", "optax"}),
  "_transforms": ({"_stepping", "_backends", "_program", "_codecs"} | GROUND, {"jax", "numpy", "optax"}),
  "_flax": ({"_layers", "_stepping", "_transforms", "_codecs"} | GROUND, {"flax", "jax", "optax"}),
  "_memory": (GROUND, {"jax", "numpy", "matplotlib", "jaxlib"}),
  "_planner": ({"_memory", "_stepping", "_transforms", "_codecs"} | GROUND, {"jax", "optax"}),
}
DOORS = {  # what users import or run
  "__main__": ({"_planner"}, set()),
  "flax": ({"_flax"}, set()),
  "checkpoint": (GROUND, {"jax", "numpy", "orbax"}),
  "export": ({"_codecs"} | GROUND, {"jax", "numpy", "optax", "safetensors"}),
}


def imports(path: pathlib.Path) -> tuple[set[str], set[str]]:
  """Returns the folders of this package and the outside packages that a module imports anywhere."""
  own, outside = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      outside |= {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      package, *rest = (node.module or "").split(".")
      if package != "optax_mpo":
        outside.add(package)
      elif rest:
        own.add(rest[0] if rest[0] in {*FLOORS, *DOORS} else node.module)
      else:
        own |= {alias.name for alias in node.names}
  return own, outside - set(sys.stdlib_module_names)


def test_every_module_is_in_a_folder_or_is_a_door():
  assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)
  assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *DOORS}
  assert len(FLOORS) + len(DOORS) <= 18  # the top level is a table of contents


def test_imports_point_one_way():
  for position, (folder, (below, outside_allowed)) in enumerate(FLOORS.items()):
    assert below <= set(list(FLOORS)[:position]), folder
    for path in (PACKAGE / folder).glob("*.py"):
      own, outside = imports(path)
      assert own <= below | {folder}, path
      assert outside <= outside_allowed, path
  for door, (below, outside_allowed) in DOORS.items():
    own, outside = imports(PACKAGE / f"{door}.py")
    assert own <= below, door
    assert outside <= outside_allowed, door


def test_modules_of_a_folder_import_each_other_without_circles():
  for folder in FLOORS:
    arrows = {}
    for path in (PACKAGE / folder).glob("*.py"):
      tree = ast.parse(path.read_text())
      names = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
      arrows[path.stem] = {a.name for n in names if n.module == f"optax_mpo.{folder}" for a in n.names}
      arrows[path.stem] |= {n.module.rsplit(".", 1)[1] for n in names if n.module.startswith(f"optax_mpo.{folder}.")}
    while ready := {m for m, needs in arrows.items() if not needs}:
      arrows = {m: needs - ready for m, needs in arrows.items() if m not in ready}
    assert not arrows, folder


def modules_with(text: str) -> list[str]:
  return [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if text in path.read_text()]


def test_what_one_jax_writes_stays_in_one_module():
  assert modules_with("jax._src") in ([], ["_program/jax_forms.py"])
  for name in ("length", "reverse", "unroll", "jaxpr", "call_jaxpr", "cond_jaxpr", "num_consts", "branches"):
    assert set(modules_with(f'params["{name}"]')) <= {"_program/jax_forms.py"}, name


def test_primitives_are_made_by_one_module():
  """This module gives them all rules that JAX needs."""
  assert modules_with(" Primitive(") == ["_core/primitives.py"]


def test_the_public_api_is_listed_by_name():
  names = {name for name in vars(optax_mpo) if not name.startswith("_")}
  assert {"compensated", "init", "cast", "master_params", "apply_updates", "CompensatedState", "gpu_memory"} <= names
  for name in names:
    assert (getattr(optax_mpo, name).__doc__ or "").strip(), name


def test_only_backends_know_which_machine_it_is():
  """And `_memory`, which compiles for another one."""
  assert {name.split("/")[0] for name in modules_with("default_backend")} == {"_backends", "_memory"}


def test_files_and_classes_stay_small():
  for path in PACKAGE.rglob("*.py"):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, path.name
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.ClassDef):
        assert _lines(node) <= 200, node.name


def _lines(node: ast.ClassDef) -> int:
  """The lines of a class without docstrings."""
  documented = [n for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(n)]
  inside = sum(n.body[0].end_lineno - n.body[0].lineno + 1 for n in documented)
  return node.end_lineno - node.lineno + 1 - inside
