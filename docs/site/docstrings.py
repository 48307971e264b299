"""A Griffe extension: the marks of our docstrings that its Google style does not know.

Links are written as `text <https://...>`_. `Memory:` and `References:` are sections, `Example:` is one with a doctest,
and `Raises:` may have sentences beside its exceptions. All of these become Markdown before Griffe reads the rest.
"""

import re
import textwrap
from typing import Any

import griffe

_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_", re.DOTALL)
_SECTION = re.compile(r"^(Examples?|Raises|Memory|References):[ ]*(.*)$")
_EXCEPTION = re.compile(r"^([A-Z]\w+(?:(?:,| or) [A-Z]\w+)*):")


def _raises(body: str) -> str:
  lines = []
  for line in body.splitlines():
    if _EXCEPTION.match(line):
      lines.append(_EXCEPTION.sub(r"- `\1`:", line))
    elif line and not line[0].isspace() and lines and lines[-1].startswith(("-", " ")):
      lines += ["", line]
    else:
      lines.append(line)
  deeper = [line.replace("  ", "    ", 1) if line.startswith("  ") else line for line in lines]  # within an item
  return "\n".join(["**Raises**", "", *deeper])


def to_markdown(docstring: str) -> str:
  """Returns a docstring, dedented, whose sections other than Args, Returns and Attributes are Markdown."""
  lines, out = _LINK.sub(r"[\1](\2)", docstring).splitlines(), []
  i = 0
  while i < len(lines):
    found = _SECTION.match(lines[i])
    i += 1
    if found is None:
      out.append(lines[i - 1])
      continue
    start = i
    while i < len(lines) and (not lines[i] or lines[i].startswith(" ")):
      i += 1
    name, first = found.groups()
    body = textwrap.dedent("\n".join(lines[start:i])).strip("\n")
    if name.startswith("Example"):
      section = f"**Example**\n\n{first}\n\n```pycon\n{body}\n```"
    elif name == "Raises":
      section = _raises(body)
    else:
      section = f"**{name}**\n\n{first}\n{body}"
    out += ["", section, ""]
  return "\n".join(out)


class Docstrings(griffe.Extension):
  """Rewrites each docstring before it is parsed."""

  def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Changes the docstring of `obj`."""
    if obj.docstring is not None:
      obj.docstring.value = to_markdown(obj.docstring.value)
