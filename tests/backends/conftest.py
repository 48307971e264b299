"""Languages of kernels, for tests that compile them."""

import pytest

from optax_mpo._backends import kernel_launch
from optax_mpo._backends.kernel_launch import Language


@pytest.fixture(params=[one.name for one in Language if kernel_launch.is_there(one)])
def language(request, monkeypatch, tmp_path):
  """Kernels in this language alone. Mosaic GPU writes its PTX, and what ptxas says, to a folder of its own."""
  monkeypatch.setenv("OPTAX_MPO_KERNELS", request.param.lower())
  (tmp_path / "mosaic").mkdir()
  for name, value in {"TO": str(tmp_path / "mosaic"), "PTX": "1"}.items():
    monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)
  return request.param
