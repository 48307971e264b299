"""The pages of the documentation: their code runs, their links lead somewhere, their figures and messages are current.

`mkdocs build --strict`, in .ci/run, checks that the site builds. External links are not checked: tests have no network.
"""

import ast
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen.dtypes
import flax.nnx.nn.dtypes
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks import figures
from tests.helpers import ROOT
from tests.house.test_readme import blocks

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
READ = [*PAGES, *sorted(DOCS.glob("api/*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
MODULES = ["flax", "_stepping.value_and_update", "_stepping.explain", "_layers.fused_step", "_layers.layer"]
MODULES += ["_transforms.with_kernels", "_transforms.compensated", "_transforms.loss_scale"]


@pytest.fixture
def no_promotion(monkeypatch):
  """Raises if a product has a low-precision and an f32 operand, or if Flax promotes one to the other."""
  bind = lax.dot_general_p.bind

  def checked_bind(x, y, **params):
    assert not mixed(x, y), (x, y)
    return bind(x, y, **params)

  monkeypatch.setattr(lax.dot_general_p, "bind", checked_bind)
  for module in (flax.linen.dtypes, flax.nnx.nn.dtypes):
    canonicalize = module.canonicalize_dtype

    def checked(*args, canonicalize=canonicalize, **options):
      dtype = canonicalize(*args, **options)
      assert dtype != jnp.float32 or not mixed(*args), args
      return dtype

    monkeypatch.setattr(module, "canonicalize_dtype", checked)


def mixed(*arrays):
  return {"bfloat16", "float32"} <= {x.dtype.name for x in arrays if x is not None}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
@pytest.mark.few(1)
def test_the_examples_of_a_page_run_and_compute_in_low_precision(page, no_promotion):
  names = {}
  for code in blocks("python", page.read_text()):
    exec(compile(code, page.name, "exec"), names)
  if page.stem == "memory":
    assert names["report"].devices == 8


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_docstrings_compute_in_low_precision(module, no_promotion):
  found = doctest.testmod(importlib.import_module(f"optax_mpo.{module}"), optionflags=doctest.NORMALIZE_WHITESPACE)
  assert found.attempted
  assert not found.failed


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_outputs_are_kept(path):
  """Each kept output is of the kind that the cell makes. Its text may differ in last digits from machine to machine.

  A process of its own runs it: the kernel's client has an event loop, whose warnings are errors here.
  """
  new = cells_of_a_run(path)
  cells = json.loads(path.read_text())["cells"]
  assert any(cell.get("outputs") for cell in cells)
  for kept, made in zip(cells, new, strict=True):
    assert kinds(kept) == kinds(made), "".join(kept["source"])


def kinds(cell):
  outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
  return {(o["output_type"], *sorted(o.get("data", {}))) for o in outputs}


def cells_of_a_run(path):
  """Returns the cells of a notebook after a run."""
  code = "import nbclient, nbformat, sys; n = nbformat.read(sys.argv[1], 4); nbclient.NotebookClient(n, timeout=600,"
  code += " kernel_name='python3').execute(); print(nbformat.writes(n))"
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)["cells"]


def anchors(path: Path) -> set[str]:
  """The anchors of a page's headings, as GitHub and MkDocs both make them."""
  text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
  titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  found = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
  return found | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_files_and_headings(page):
  text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
  for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
    name, _, anchor = target.partition("#")
    path = page.parent / name if name else page
    assert path.exists(), target
    assert not anchor or anchor in anchors(path), target


def test_every_page_is_in_the_navigation():
  nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
  listed = set(re.findall(r"\S+\.md", nav))
  notebooks = {str(path.relative_to(DOCS).with_suffix(".md")) for path in NOTEBOOKS}
  assert listed - {"changelog.md"} == notebooks | {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_that_of_the_committed_json(name):
  assert (DOCS / f"figures/{name}.svg").read_text() == str(figures.FIGURES[name]())


def public_names() -> set[str]:
  """What `import optax_mpo` and its three modules offer."""
  found = set()
  for module in ("optax_mpo", "optax_mpo.flax", "optax_mpo.checkpoint", "optax_mpo.export"):
    for name, value in vars(importlib.import_module(module)).items():
      if not name.startswith("_") and getattr(value, "__module__", "").startswith("optax_mpo"):
        found.add(f"{module}.{name}")
  return found


def test_the_reference_has_every_public_name():
  listed = {n for page in DOCS.glob("api/*.md") for n in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
  assert listed == public_names()


def messages() -> list[str]:
  """All text in the package, with `…` where a value is filled in."""
  found = []
  for path in (ROOT / "optax_mpo").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def test_the_messages_of_the_faq_are_those_of_the_source():
  headings = re.findall(r"^### `(.*)`$", (DOCS / "faq.md").read_text(), re.MULTILINE)
  known = messages()
  assert len(headings) > 20
  for heading in headings:
    pattern = ".*".join(map(re.escape, heading.strip("…").strip().split("…")))
    assert any(re.search(pattern, message, re.DOTALL) for message in known), heading
