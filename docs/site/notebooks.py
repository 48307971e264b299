"""Notebooks as pages: their text, code and kept outputs, as Markdown. A plug-in would bring all of Jupyter along."""

import base64
import json
from typing import Any


def _output(output: dict[str, Any]) -> tuple[str, str]:
  """Returns the text and the PNG image, in base64, of an output. Either may be empty."""
  data = output.get("data", {})
  if "image/png" in data:
    return "", "".join(data["image/png"])
  return "".join(output.get("text", data.get("text/plain", []))), ""


def to_markdown(name: str, notebook: str) -> tuple[str, dict[str, bytes]]:
  """Returns the page of a notebook, and the images that it shows, by file name."""
  parts, images = [], {}
  for cell in json.loads(notebook)["cells"]:
    source = "".join(cell["source"])
    parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    for output in cell.get("outputs", []):
      text, image = _output(output)
      if text:
        parts.append(f"```text\n{text.rstrip()}\n```")
      if image:
        images[f"{name}_{len(images)}.png"] = base64.b64decode(image)
        parts.append(f"![Output of the cell]({name}_{len(images) - 1}.png)")
  return "\n\n".join(parts) + "\n", images
