"""The process in which `gpu_memory` compiles: reads a request, runs XLA:GPU, writes the result. Run as a script.

`gpu_memory` explains why this is a separate process. Its only argument is a folder with the request:

  request.json   the target's text (null: the local card), the topology, the donated arguments, the compiler options,
                 JAX's settings, and whether to dump the kernels
  module.bin     the function, lowered for CUDA, as `jax.export` serializes it

It writes `result.json` there, with XLA's figures, or an error and the stage where it happened; and XLA's dump.
"""

import itertools
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxlib.mlir import ir

jax.ffi.register_ffi_target_as_batch_partitionable("LayoutConstraint")  # as in _core/order.py, in this process too

SIZES = tuple(f"{memory}{size}" for memory in ("", "host_") for size in ("argument", "output", "alias", "temp"))


def mesh_axes(module: str) -> list[tuple[str, int]]:
  """Returns the names and sizes of the mesh axes of a lowered module; [] without a mesh."""
  for axes in re.findall(r"sdy\.mesh @\S+ = <\[([^\]]*)\]", module):
    found = re.findall(r'"([^"]+)"\s*=\s*(\d+)', axes)
    if found:
      return [(axis, int(size)) for axis, size in found]
  return []


def shardings(exported: export.Exported, devices: Sequence[object]) -> tuple[NamedSharding, list[Sharding]]:
  """Returns the replicated sharding over the target's devices, and the argument shardings (by default replicated)."""
  axes = mesh_axes(exported.mlir_module()) if exported.nr_devices > 1 else []
  names = tuple(axis for axis, _ in axes) or ("devices",)
  grid = np.array(devices).reshape([size for _, size in axes] or [len(devices)])
  if not axes:
    replicated = NamedSharding(Mesh(grid, names), PartitionSpec())
    return replicated, [replicated] * len(exported.in_avals)
  error = None
  # The module has the names and sizes of the axes, but not their types.
  for types in itertools.product((AxisType.Auto, AxisType.Explicit, AxisType.Manual), repeat=len(names)):
    replicated = NamedSharding(Mesh(grid, names, axis_types=types), PartitionSpec())
    try:
      return replicated, [s or replicated for s in exported.in_shardings_jax(replicated.mesh)]
    except ValueError as e:
      error = error or e
  raise ValueError(f"the arguments are laid out over more than one mesh. Lay them out over one. ({error})")


def compile_request(folder: pathlib.Path, stage: list[str]) -> dict[str, int]:
  """Compiles the request in `folder`, and records in `stage` how far it got."""
  request = json.loads((folder / "request.json").read_text())
  for name, value in request["config"].items():
    jax.config.update(name, value)

  stage[0] = "topology"
  config = {} if request["target"] is None else {"target_config": request["target"]}
  topology = topologies.get_topology_desc(platform="cuda", topology=request["topology"], **config)

  stage[0] = "layout"
  exported = export.deserialize(bytearray((folder / "module.bin").read_bytes()))
  replicated, laid_out = shardings(exported, topology.devices)
  args = [
    jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=s)
    for aval, s in zip(exported.in_avals, laid_out, strict=True)
  ]
  # Without arguments, only the results can tell which devices the function runs on.
  results: dict[str, Any] = {} if args else {"out_shardings": replicated}

  stage[0] = "compile"
  step = jax.jit(exported.call, donate_argnums=request["donated"], keep_unused=True, **results)
  options = {
    "xla_llvm_disable_expensive_passes": True,  # these run after buffer assignment, and take a fifth of the time
    **request["options"],
    "xla_dump_to": str(folder / "dump"),
    "xla_dump_hlo_as_text": True,
  }
  if request["kernels"]:  # since JAX 0.12, XLA dumps PTX only on request
    options["xla_dump_emitter_re"] = "ptx"
  lowered = step.lower(*args)
  place_arguments(lowered.compiler_ir(), [aval.memory_space == jax.memory.Space.Host for aval in exported.in_avals])
  program, without_triton = compiled(lowered, options)
  stats = program.memory_analysis()
  return {"without_triton": without_triton, **{size: getattr(stats, f"{size}_size_in_bytes") for size in SIZES}}


def place_arguments(module: Any, on_host: list[bool]) -> None:
  """Writes into a lowered module which arguments are in host memory.

  JAX leaves that out when it lowers for the devices of a topology, since these have no memories. The results have it.
  """
  if not any(on_host):
    return
  main = next(op for op in module.body.operations if getattr(op.attributes["sym_name"], "value", "") == "main")
  with module.context:
    host, placed = ir.StringAttr.get("pinned_host"), []
    for attributes, is_host in zip(main.attributes["arg_attrs"], on_host, strict=True):
      named: dict[str, Any] = {attribute.name: attribute.attr for attribute in attributes}
      if is_host:
        named["mhlo.memory_kind"] = host
      placed.append(ir.DictAttr.get(named))
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(placed)


def compiled(lowered: jax.stages.Lowered, options: dict[str, Any]) -> tuple[jax.stages.Compiled, bool]:
  """Compiles, and compiles again without Triton's matrix products if they fail. Returns whether it did.

  XLA chooses Triton's tiles by measuring. Without a GPU it takes default tiles, and fails if these do not fit a shape,
  such as a ViT's 6272 x 768. Then all products go to cuBLAS, as those where Triton is slower always do.
  """
  try:
    return lowered.compile(options), False
  except Exception as error:
    if "output tile sizes" not in str(error) or "xla_gpu_enable_triton_gemm" in options:
      raise
    shutil.rmtree(options["xla_dump_to"], ignore_errors=True)
    return lowered.compile({**options, "xla_gpu_enable_triton_gemm": False}), True


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  stage = ["start"]
  try:
    result = compile_request(folder, stage)
  except Exception as error:  # the calling process reports it, whatever it is
    result = {"stage": stage[0], "error": f"{type(error).__name__}: {error}"}
  (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
  main()
