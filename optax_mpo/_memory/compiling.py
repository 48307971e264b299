"""Runs XLA:GPU in a separate process, and says what is missing if that fails. `gpu_memory` explains why."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import jax

from optax_mpo._memory import gpu_targets

_WORKER = pathlib.Path(__file__).with_name("worker.py")


def _installed(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _plugin() -> tuple[int, str, list[str | None]]:
  """Returns the plugin's CUDA version (installed, or to install), jaxlib's version, and those of its two packages."""
  version = _installed("jaxlib") or jax.__version__
  # Every supported JAX has plugins for both CUDA versions. From JAX 0.11 on its own default is the newer one.
  choices = (12, 13) if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (0, 11) else (13, 12)
  parts = {cuda: [_installed(f"jax-cuda{cuda}-{part}") for part in ("plugin", "pjrt")] for cuda in choices}
  cuda = next((cuda for cuda in choices if any(parts[cuda])), choices[0])
  return cuda, version, parts[cuda]


def install_command() -> str:
  """Returns the command that installs what `gpu_memory` needs in addition to this JAX, for this Python."""
  cuda, version, _ = _plugin()
  compiler = "nvidia-cuda-nvcc-cu12" if cuda == 12 else "nvidia-cuda-nvcc nvidia-nvvm"
  packages = f"jax-cuda{cuda}-plugin=={version} jax-cuda{cuda}-pjrt=={version} {compiler} flatbuffers"
  return f"{sys.executable or 'python'} -m pip install {packages}"


def check_toolchain() -> None:
  """Checks that JAX's CUDA plugin, of jaxlib's version, and flatbuffers are installed.

  Raises:
    ImportError: if they are not. The message has the command to install them.
  """
  cuda, version, parts = _plugin()
  python = ".".join(str(n) for n in sys.version_info[:2])
  if not any(parts):
    raise ImportError(
      "gpu_memory: JAX's CUDA plugin, whose compiler is used, is not installed. It needs no GPU and no driver. For "
      f"Python {python} with jaxlib {version}: {install_command()}"
    )
  for part, found in zip(("plugin", "pjrt"), parts, strict=True):
    if found != version:
      raise ImportError(
        f"gpu_memory: jax-cuda{cuda}-{part} is {found or 'not installed'}, but jaxlib is {version}, and JAX takes "
        f"plugins of its own version only. For Python {python}: {install_command()}"
      )
  if _installed("flatbuffers") is None:
    raise ImportError(f"gpu_memory: jax.export needs flatbuffers to write a function down. {install_command()}")


def run(
  folder: pathlib.Path, request: dict[str, object], module: bytes | bytearray, card: gpu_targets.Target | None
) -> dict[str, int]:
  """Compiles the function and returns XLA's sizes. Leaves XLA's dump in `folder`.

  Args:
    folder: an empty folder.
    request: see `worker`.
    module: the function, as `jax.export` serializes it.
    card: the card to compile for; None for the local one.

  Raises:
    RuntimeError: if the function does not compile, or the process dies.
    ValueError: if the layout of the arguments does not fit the target.
  """
  (folder / "request.json").write_text(json.dumps(request))
  (folder / "module.bin").write_bytes(module)
  # Drop JAX's settings: the plugin needs its own, and a hit in the compilation cache would give no dump.
  environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
  environment |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONWARNINGS": "ignore"}
  environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  done = subprocess.run(
    [sys.executable, "-P", str(_WORKER), str(folder)],
    env=environment,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    errors="replace",
    check=False,
  )
  path = folder / "result.json"
  if not path.exists():
    said = "\n".join(done.stderr.strip().splitlines()[-8:]) or "nothing"
    raise RuntimeError(
      f"gpu_memory: the process that compiles ended with code {done.returncode} before it was done. If packages are "
      f"missing: {install_command()}. It said:\n{said}"
    )
  result = json.loads(path.read_text())
  if "error" not in result:
    return result
  stage, error = result["stage"], result["error"]
  if stage == "topology" and card is None:
    raise RuntimeError(
      f"gpu_memory: target='local' compiles for the NVIDIA GPU of this machine, and JAX finds none ({error}). Name the "
      f"card to compile for instead: {', '.join(gpu_targets.TARGETS)}."
    )
  if stage == "topology":
    raise RuntimeError(f"gpu_memory: JAX's CUDA plugin does not offer a topology ({error}). Try: {install_command()}")
  if stage == "layout":
    raise ValueError(f"gpu_memory: {error}")
  where = card.name if card else "the local card"
  missing = (
    f" The CUDA compiler's files are missing: {install_command()}."
    if re.search("libdevice|ptxas|nvlink", error)
    else ""
  )
  raise RuntimeError(f"gpu_memory: XLA:GPU could not compile it for {where}.{missing}\n{error}")
