"""Hooks of MkDocs: files outside of docs/ that pages link to become part of the site.

Why: the pages are read in the repository too, where `../benchmarks/results/peak_memory.json` is a link to the file. The
site has only what is in docs/. So each file that such a link names is copied to files/, and the link is changed. The
changelog, which lies at the root, becomes a page. Docstrings name pages as files of docs/; on the site these are links.
"""

import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_SPEC: Any = importlib.util.spec_from_file_location("notebooks", Path(__file__).with_name("notebooks.py"))
notebooks = importlib.util.module_from_spec(_SPEC)  # MkDocs loads this file alone, without its folder
_SPEC.loader.exec_module(notebooks)
_LINK = re.compile(r"(\]\()((?!https?:|#)[^)\s]+)(\))")
_NAMED = re.compile(r"\bdocs/(\w+)\.md\b")
_PAGES = {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}  # files at the root: their pages


def outside(page: str, target: str) -> str | None:
  """Returns the path from the root of the repository of a link's target, or None if the target lies in docs/."""
  path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target.split("#")[0]))
  return None if path.startswith("docs/") else path


def on_files(files: Files, config: Any) -> Files:
  """Adds the changelog, the pages of notebooks, and the files outside of docs/ that pages link to."""
  for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
    page = file.src_uri.removesuffix(".ipynb")
    text, images = notebooks.to_markdown(posixpath.basename(page), file.content_string)
    files.append(File.generated(config, f"{page}.md", content=text))
    for name, image in images.items():
      files.append(File.generated(config, f"{posixpath.dirname(page)}/{name}", content=image))
  files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
  for page in [file for file in files if file.is_documentation_page()]:
    if page.src_uri == "changelog.md":
      continue
    for _, target, _ in _LINK.findall(page.content_string):
      path = outside(page.src_uri, target)
      if path in _PAGES or path is None or not (ROOT / path).is_file():
        continue
      if files.get_file_from_path(f"files/{path}") is None:
        files.append(
          File.generated(
            config, f"files/{path}.txt" if path.endswith(".md") else f"files/{path}", content=(ROOT / path).read_bytes()
          )
        )
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
  """Changes links out of docs/ to the copies. Those of the changelog start at the root."""
  here = page.file.src_uri

  def changed(match: re.Match[str]) -> str:
    target = match[2]
    if here == "changelog.md":
      path = outside("x", f"../{target}")
      return match[0] if path else f"{match[1]}{target.removeprefix('docs/')}{match[3]}"
    path = outside(here, target)
    if path is None:
      return match[0]
    new = _PAGES.get(path, f"files/{path}.txt" if path.endswith(".md") else f"files/{path}")
    return f"{match[1]}{posixpath.relpath(new, posixpath.dirname(here) or '.')}{match[3]}"

  return _LINK.sub(changed, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
  """Makes links of the pages that docstrings name, as in "(docs/numerics.md)"."""
  if not page.file.src_uri.startswith("api/"):
    return html

  def linked(match: re.Match[str]) -> str:
    file = files.get_file_from_path(f"{match[1]}.md")
    return f'<a href="{file.url_relative_to(page.file)}">{match[1].replace("_", " ")}</a>' if file else match[0]

  return _NAMED.sub(linked, html)
