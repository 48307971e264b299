"""What gpu_memory says of bad input and of a missing or dying compiler, and what it leaves alone in the process."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

import optax_mpo as mpo
from optax_mpo._memory import compiling
from optax_mpo._memory.gpu_memory import gpu_memory
from tests.memory.test_gpu_memory import f32


def test_unknown_target():
  with pytest.raises(ValueError, match=r"no target 'h101'\. Known are h100, h200, .*a100-80gb, .*'local'"):
    gpu_memory(lambda x: x, f32(8), target="h101")


def test_no_local_gpu():
  with pytest.raises(RuntimeError, match=r"target='local' .*JAX finds none .*Name the card.*h100"):
    gpu_memory(lambda x: x, f32(8), target="local")


def test_a_function_that_does_not_trace():
  def broken(x):
    return x if x[0] > 0 else -x

  with pytest.raises(
    ValueError, match="broken does not trace with these arguments: TracerBoolConversionError"
  ) as error:
    gpu_memory(broken, f32(8))
  assert isinstance(error.value.__cause__, jax.errors.TracerBoolConversionError)


def test_a_function_without_arguments():
  assert gpu_memory(lambda: jnp.zeros((1024,)), devices=4).total_bytes == 4096


def test_callbacks_cannot_be_lowered():
  def chatty(x):
    jax.debug.print("{}", x)
    return x

  with pytest.raises(
    ValueError, match=r"chatty traces, but cannot be lowered .*Take out calls back to Python"
  ) as error:
    gpu_memory(chatty, f32(8))
  assert error.value.__cause__ is not None


def test_arguments_that_are_not_arrays():
  with pytest.raises(TypeError, match=r"params\['w'\] is a str, not an array"):
    gpu_memory(lambda params: params, {"w": "weights"})
  with pytest.raises(TypeError, match=r"args\[1\]\[0\] is a object, not an array"):
    gpu_memory(lambda *args: args, f32(8), [object()])
  with pytest.raises(ValueError, match="does not trace"):
    gpu_memory(jax.jit(lambda x: x), "weights")
  with pytest.raises(TypeError, match="fn has to be a function, but it is a dict"):
    gpu_memory({}, f32(8))


def test_numbers_that_make_no_sense():
  with pytest.raises(ValueError, match="devices has to be a number of devices"):
    gpu_memory(lambda x: x, f32(8), devices=0)
  with pytest.raises(ValueError, match="params_argnum is 1, but fn gets 1 arguments"):
    gpu_memory(lambda x: x, f32(8), params_argnum=1)
  with pytest.raises(ValueError, match="has no arrays in it"):
    gpu_memory(lambda x, y: x, f32(8), {}, params_argnum=1)


VERSION = compiling._installed("jaxlib")


@pytest.mark.parametrize(
  ("jaxlib", "packages"),
  [
    ("0.10.2", "jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12 flatbuffers"),
    ("0.12.0.1", "jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 nvidia-cuda-nvcc nvidia-nvvm flatbuffers"),
  ],
)
def test_without_the_plugin_the_error_has_the_command(monkeypatch, jaxlib, packages):
  monkeypatch.setattr(compiling, "_installed", {"jaxlib": jaxlib, "flatbuffers": "25"}.get)
  with pytest.raises(ImportError) as error:
    gpu_memory(lambda x: x, f32(8))
  python = f"{sys.version_info.major}.{sys.version_info.minor}"
  assert str(error.value).endswith(
    f"For Python {python} with jaxlib {jaxlib}: {sys.executable} -m pip install {packages}"
  )


def test_a_plugin_of_another_version(monkeypatch):
  versions = {"jaxlib": "0.12.0.1", "jax-cuda12-plugin": "0.11.2", "jax-cuda12-pjrt": "0.11.2"}
  monkeypatch.setattr(compiling, "_installed", versions.get)
  with pytest.raises(
    ImportError, match=r"jax-cuda12-plugin is 0\.11\.2, but jaxlib is 0\.12\.0\.1.*jax-cuda12-plugin=="
  ):
    gpu_memory(lambda x: x, f32(8))
  versions |= {"jax-cuda12-plugin": "0.12.0.1"}
  del versions["jax-cuda12-pjrt"]
  with pytest.raises(ImportError, match="jax-cuda12-pjrt is not installed, but jaxlib is"):
    gpu_memory(lambda x: x, f32(8))
  versions |= {"jax-cuda12-pjrt": "0.12.0.1"}
  with pytest.raises(ImportError, match="needs flatbuffers"):
    gpu_memory(lambda x: x, f32(8))


def test_a_compiler_that_dies(monkeypatch, tmp_path):
  script = tmp_path / "dies.py"
  script.write_text("import sys; sys.exit('out of something')")
  monkeypatch.setattr(compiling, "_WORKER", script)
  with pytest.raises(RuntimeError, match=r"ended with code 1 before it was done.*\nout of something"):
    gpu_memory(lambda x: x, f32(8))


# --- Other processes --------------------------------------------------------------------------------------------------


def run_python(program, **environment):
  kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
  root = os.path.dirname(os.path.dirname(mpo.__file__))
  return subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)],
    env={**kept, "PYTHONPATH": root, **environment},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize("environment", [{}, {"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "cuda,cpu"}], ids=str)
@pytest.mark.few(1)
def test_jax_may_be_in_use_before_and_is_left_as_it_was(environment):
  done = run_python(
    """
    import os, jax, jax.numpy as jnp
    before = jnp.ones(3).devices(), jax.default_backend(), dict(os.environ)
    from optax_mpo._memory.gpu_memory import gpu_memory
    report = gpu_memory(lambda x: x + 1, jnp.ones(1000), donate_argnums=0)
    assert before == (jnp.ones(3).devices(), jax.default_backend(), dict(os.environ))
    print(jax.default_backend(), report.total_bytes)
    """,
    **environment,
  )
  assert done.stdout.split() == ["cpu", "4000"], done.stderr


def test_where_jax_cannot_start_the_error_says_what_to_set():
  done = run_python(
    """
    import jax, jax.numpy as jnp
    from optax_mpo._memory.gpu_memory import gpu_memory
    gpu_memory(lambda x: x + 1, jax.ShapeDtypeStruct((8,), jnp.float32))
    """,
    JAX_PLATFORMS="cuda",
  )
  assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: gpu_memory: JAX cannot start in this process")
  assert "Set JAX_PLATFORMS=cpu before JAX is imported" in done.stderr
