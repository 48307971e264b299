"""Peak memory of a jitted function on a GPU you do not have.

Why: the memory of a training step is known only after XLA has compiled it for its card. XLA:CPU keeps f32 copies of
bf16 weights and schedules differently, and a sum of array sizes misses the temporaries. But XLA:GPU needs no GPU to
compile, and it then reports the buffers it would allocate.

Method: the caller's process traces the function and lowers it for CUDA with `jax.export`. A second process compiles the
result for a named card with JAX's CUDA plugin (`jax.experimental.topologies`). It returns XLA's memory analysis and its
dump of the buffers.

Why two processes: the plugin can compile for an absent card only if JAX started with JAX_PLATFORMS=cpu. If JAX started
without it on a machine without a GPU, it has dropped the plugin for good (the plugin's version check fails; measured on
JAX 0.10.2 and 0.12.0.1), and no public API brings it back. The second process starts from its own settings and gets
only those of the caller that change the compilation. The caller's backend is never touched.

Why `jax.export`: it is JAX's public way to hand over a lowered function. It keeps layouts by the names of mesh axes, so
a function laid out over CPU devices or an `AbstractMesh` fits the target's devices. Donation is passed separately. The
bytes are exactly those of lowering directly for the target's devices (tested).
"""

import dataclasses
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax import export
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from optax_mpo._core import host, modules, trees
from optax_mpo._core.annotations import KeyPath, PyTree
from optax_mpo._memory import compiling, gpu_targets, parameters
from optax_mpo._memory.lowered import Lowered
from optax_mpo._memory.report import MemoryReport

Trees = tuple[PyTree, ...]
Option = bool | int | float | str

# JAX settings that change how a lowered function is compiled. All others are already part of the lowered function.
_COMPILE_CONFIG = (
  "jax_enable_x64",
  "jax_compiler_enable_remat_pass",
  "jax_exec_time_optimization_effort",
  "jax_memory_fitting_effort",
  "jax_memory_fitting_level",
  "jax_optimization_level",
)


def gpu_memory(
  fn: Callable[..., PyTree],
  *args: PyTree,
  donate_argnums: int | Sequence[int] = (),
  target: str = "h100",
  devices: int = 1,
  params_argnum: int | None = None,
  params: PyTree | Callable[..., PyTree] = None,
  compiler_options: Mapping[str, bool | int | float | str] | None = None,
  host_memory: int | None = None,
  dump_to: str | pathlib.Path | None = None,
) -> MemoryReport:
  """Compiles `fn` for a GPU, without needing one, and reports the memory it takes.

  Runs nothing, puts no array on a device, and leaves the backend of the process as it is. Takes some seconds, nearly
  all of them in XLA; the result is deterministic. (On a machine with the plugin but without a GPU, JAX itself prints an
  error about the plugin on first use, unless JAX_PLATFORMS=cpu is set. It is harmless here.)

  Args:
    fn: a plain function, or one jitted with `jax.jit` or `nnx.jit`. A jitted one keeps its own donated and static
      arguments, and its shardings.
    *args: the arguments of `fn`: trees of arrays or of `jax.ShapeDtypeStruct`. Only shapes, dtypes and shardings are
      read.
    donate_argnums: as in `jax.jit`. For plain functions only.
    target: `"h100"` (80 GB SXM), `"h200"`, `"gh200"` (96 GB), `"b200"`, `"a100-80gb"`, `"a100-40gb"`, `"l40s"`, `"l4"`,
      `"rtx5090"`, `"rtx4090"`, `"rtx3090"`, `"a10"`, or `"local"` for the card in this machine.
    devices: how many of these cards `fn` runs on. Arguments are laid out by a `NamedSharding` over a mesh of this size:
      a `jax.sharding.AbstractMesh`, or a mesh of any devices, such as CPU devices. The target's devices replace them in
      order. Arguments without a sharding are replicated.
    params_argnum: which argument holds the parameters, for the bytes per parameter. In an NNX module or state these are
      its `nnx.Param`s. In a train state (Flax's, this library's or any object with `params`) and in Linen's variables
      they are what is stored under `params`. In other trees they are all arrays except Optax's states, random keys and
      counters.
    params: the parameters themselves, where those rules do not find them: a tree, or a function of `*args` that returns
      one, such as `lambda run, batch: run["weights"]`. All arrays in it are counted.
    compiler_options: XLA options, as in `jax.jit`. XLA_FLAGS in the environment apply too.
    host_memory: the bytes of host memory that all `devices` share. If given, `fits` asks for it too.
    dump_to: a folder that receives XLA's dump, for a closer look. The file that ends in `gpu_after_optimizations.txt`
      is the optimized program; files that end in `.ptx` hold the instructions of its kernels. The folder is created if
      it does not exist, and has to be empty.

  Returns:
    A `MemoryReport`, with sizes for one device.

  Raises:
    ValueError: for an unknown target, a function that does not trace or cannot be lowered for CUDA, layouts over
      another number of devices, a `dump_to` that is not empty, and settings that contradict each other.
    TypeError: if `fn` is not a function, or an argument is not an array or has another sharding than a `NamedSharding`.
    ImportError: if JAX's CUDA plugin is missing or of another version. The message has the command to install it.
    RuntimeError: if XLA does not compile the function, or JAX has no backend in this process.

  Memory: the report leaves out what the GPU's libraries choose at run time: workspace of matrix products and
  convolutions (up to 32 MiB where XLA measures and picks another algorithm), CUDA's context, fragmentation. It counts
  arguments that `fn` does not use, since they exist. Arguments whose sharding has the memory kind "pinned_host" are
  counted as `host_bytes`, apart from the card's; `to_device_bytes` and `to_host_bytes` are what crosses the bus.

  Example:
    >>> import jax, jax.numpy as jnp, optax_mpo as mpo
    >>> w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    >>> report = mpo.gpu_memory(lambda w, g: w - 0.1 * g, w, w, donate_argnums=0, target="a100-40gb", params_argnum=0)
    >>> report.total_bytes, report.bytes_per_parameter, report.fits
    (8388608, 8.0, True)
  """
  if host_memory is not None and (not isinstance(host_memory, int) or host_memory < 1):
    raise ValueError(f"gpu_memory: host_memory is a number of bytes, such as 128 * 2**30, but it is {host_memory!r}.")
  if dump_to is not None:
    _check_empty(pathlib.Path(dump_to))
  lowered = lower(
    fn,
    *args,
    donate_argnums=donate_argnums,
    target=target,
    devices=devices,
    params_argnum=params_argnum,
    params=params,
    compiler_options=compiler_options,
  )
  return lowered.compile(host_memory, dump_to)


def lower(
  fn: Callable[..., PyTree],
  *args: PyTree,
  donate_argnums: int | Sequence[int] = (),
  target: str = "h100",
  devices: int = 1,
  params_argnum: int | None = None,
  params: PyTree | Callable[..., PyTree] = None,
  compiler_options: Mapping[str, Option] | None = None,
) -> Lowered:
  """Lowers a function for a GPU: the first half of `gpu_memory`, which has the arguments and errors."""
  card = gpu_targets.find(target)
  if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
    raise ValueError(f"gpu_memory: devices has to be a number of devices, 1 or more, but it is {devices!r}.")
  compiling.check_toolchain()
  options = _checked_options(compiler_options)
  jitted = _jitted(fn, donate_argnums)
  structs = _structs(fn, args, devices, static=jitted is fn)
  count = _parameter_count(args, params_argnum, params)
  exported, donated, names, captured = _lower(fn, jitted, structs, devices)
  request = {
    "target": card and card.config,
    "topology": f"1x{devices // 8}x8" if devices % 8 == 0 else f"1x1x{devices}",  # hosts of 8 cards
    "donated": donated,
    "options": options,
    "config": {name: getattr(jax.config, name) for name in _COMPILE_CONFIG if hasattr(jax.config, name)},
  }
  text = re.sub(r"^#loc.*\n| loc\((?:[^()]|\([^()]*\))*\)", "", exported.mlir_module(), flags=re.MULTILINE)
  program = "\n".join(map(str, (text, *exported.in_avals, *exported.out_avals)))
  module = bytes(exported.serialize())
  return Lowered(module, program, request, names, captured, count, target.lower(), card, devices)


def _checked_options(options: Mapping[str, Option] | None) -> dict[str, Option]:
  options = dict(options or {})
  for name, value in options.items():
    if name.startswith("xla_dump"):
      raise ValueError(
        f"gpu_memory: {name} cannot be set, since XLA's dump is read here. Leave it out; dump_to=... keeps the dump."
      )
    if not isinstance(value, bool | int | float | str):
      raise ValueError(f"gpu_memory: compiler_options[{name!r}] has to be a bool, a number or a string.")
  return options


def _check_empty(folder: pathlib.Path) -> None:
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"gpu_memory: dump_to names {folder}, which is not an empty folder. Name a new one.")


def _jitted(fn: Callable[..., PyTree], donate_argnums: int | Sequence[int]) -> jax.stages.Wrapped:
  if not callable(fn):
    raise TypeError(f"gpu_memory: fn has to be a function, but it is a {type(fn).__name__}.")
  if not isinstance(fn, jax.stages.Wrapped):
    return jax.jit(fn, donate_argnums=donate_argnums)
  if donate_argnums not in ((), []):
    raise ValueError(
      f"gpu_memory: donate_argnums={donate_argnums} is given, but {_name(fn)} is jitted and donates what it was jitted "
      "with. Set it there (jax.jit(..., donate_argnums=...)), or pass the function without jit."
    )
  return fn


def _name(fn: object) -> str:
  return getattr(fn, "__name__", type(fn).__name__)


def _roots(fn: Callable[..., PyTree], count: int) -> list[str]:
  """Returns names for the arguments of `fn`, for error messages."""
  try:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds]
  except (TypeError, ValueError):
    named = []
  return (named + [f"args[{i}]" for i in range(len(named), count)])[:count]


def _structs(fn: Callable[..., PyTree], args: Trees, devices: int, static: bool) -> Trees:
  """Returns the arguments as ShapeDtypeStructs.

  Args:
    fn: for names in error messages.
    args: the arguments.
    devices: how many devices shardings have to cover.
    static: whether leaves that are not arrays may be static arguments, which are left to `jit`.
  """

  def struct(root: str, path: KeyPath, leaf: PyTree) -> PyTree:
    name = trees.name(path, root)
    if not trees.is_array(leaf):
      if static or isinstance(leaf, bool | int | float | complex):
        return leaf
      raise TypeError(
        f"gpu_memory: {name} is a {type(leaf).__name__}, not an array. Pass an array or a jax.ShapeDtypeStruct; what "
        "is no array can be bound with functools.partial(fn, ...), or be static: jax.jit(fn, static_argnums=...)."
      )
    sharding = getattr(leaf, "sharding", None)
    memory = getattr(sharding, "memory_kind", None) if host.is_on_host(leaf) else None
    mesh = AbstractMesh((devices,), ("devices",))
    anywhere = NamedSharding(mesh, PartitionSpec(), memory_kind=memory) if memory else None  # only its memory is known
    if isinstance(sharding, SingleDeviceSharding):
      sharding = anywhere
    if sharding is not None and not isinstance(sharding, NamedSharding):
      raise TypeError(
        f"gpu_memory: {name} has a {type(sharding).__name__}. Use a NamedSharding, whose axes have names that can be "
        "found again on the target."
      )
    if sharding is not None and sharding.mesh.size != devices:
      if sharding.mesh.size > 1:
        _raise_other_devices(f"{name} is laid out over {sharding.mesh.size}", sharding.mesh.size, devices)
      sharding = anywhere
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak)

  shared = {id(variable): None for variable in modules.variables(args)}  # shared NNX variables stay shared

  def structs_of(root: str, path: KeyPath, node: PyTree) -> PyTree:
    if id(node) not in shared:
      return struct(root, path, node)
    if shared[id(node)] is None:
      inside = jax.tree_util.tree_map_with_path(lambda more, leaf: struct(root, (*path, *more), leaf), node)
      shared[id(node)] = inside
    return shared[id(node)]

  return tuple(
    jax.tree_util.tree_map_with_path(
      lambda path, node, root=root: structs_of(root, path, node), arg, is_leaf=lambda x: id(x) in shared
    )
    for root, arg in zip(_roots(fn, len(args)), args, strict=True)
  )


def _raise_other_devices(what: str, found: int, devices: int) -> None:
  raise ValueError(f"gpu_memory: {what} devices, but devices={devices}. Pass devices={found}, or lay it out anew.")


def _parameter_count(args: Trees, params_argnum: int | None, params: PyTree) -> int | None:
  if params is not None:
    if params_argnum is not None:
      raise ValueError("gpu_memory: params and params_argnum both say what the parameters are. Pass one of them.")
    is_function = callable(params) and not any(trees.is_array(x) for x in jax.tree.leaves(params))
    count = parameters.size(params(*args) if is_function else params)
    if not count:
      raise ValueError("gpu_memory: what params names has no arrays in it.")
    return count
  if params_argnum is None:
    return None
  if not -len(args) <= params_argnum < len(args):
    raise ValueError(f"gpu_memory: params_argnum is {params_argnum}, but fn gets {len(args)} arguments.")
  count = parameters.size(parameters.of(args[params_argnum]))
  if not count:
    raise ValueError(
      f"gpu_memory: argument {params_argnum}, which params_argnum names, has no arrays in it that are known for "
      "parameters. Name them: params=..., a tree or a function of the arguments that returns one."
    )
  return count


class _Traced:
  """Passes a traced function to `jax.export` in place of a jitted one: NNX's traced functions lower differently."""

  def __init__(self, traced: jax.stages.Traced):
    self._traced: jax.stages.Traced = getattr(traced, "traced", traced)  # NNX has a wrapper around it

  def trace(self, *_: object, **__: object) -> jax.stages.Traced:
    return self._traced

  def lower(self, *_: object, **kwargs: Any) -> jax.stages.Lowered:
    return self._traced.lower(**kwargs)

  def eval_shape(self, *_: object, **__: object) -> PyTree:
    return self._traced.out_info

  def __call__(self, *_: object, **__: object) -> NoReturn:
    raise TypeError("gpu_memory: a traced function is lowered, not called.")


def _lower(
  fn: Callable[..., PyTree], jitted: jax.stages.Wrapped, structs: Trees, devices: int
) -> tuple[export.Exported, list[int], list[str], int]:
  """Lowers for CUDA.

  Returns:
    The lowered function with flat arguments and results; the indices of the donated arguments; the argument names; and
    the bytes of the arrays that the function captured.
  """
  try:
    lowerable = _Traced(jitted.trace(*structs))
    traced = lowerable.trace()
  except Exception as error:
    _check_backend(error)
    raise ValueError(
      f"gpu_memory: {_name(fn)} does not trace with these arguments: {_first_line(error)}. It has to be a function "
      f"that jax.jit takes; jax.eval_shape({_name(fn)}, ...) with the same arguments fails alike."
    ) from error
  if jitted is fn:
    _check_no_options(jitted, structs)
  try:
    exported = export.export(
      lowerable, platforms=("cuda",), disabled_checks=[export.DisabledSafetyCheck.custom_call("ALL")]
    )(*structs)
  except Exception as error:
    _check_backend(error)
    raise ValueError(
      f"gpu_memory: {_name(fn)} traces, but cannot be lowered for CUDA in this process: {_first_line(error)}. Take out "
      "calls back to Python (jax.debug.print, io_callback, pure_callback): they need the GPU itself. Pallas kernels "
      "may have to be told which GPU is meant, by jax.sharding.use_abstract_mesh with an AbstractDevice."
    ) from error
  if exported.nr_devices not in (1, devices):
    _raise_other_devices(f"{_name(fn)} is laid out over {exported.nr_devices}", exported.nr_devices, devices)
  infos = jax.tree.leaves(traced.args_info)
  # jit drops unused arguments, so no output can reuse their memory.
  donated = [i for i in exported.module_kept_var_idx if infos[i].donated]
  names: list[str] = list(traced.jaxpr.jaxpr.debug_info.arg_names or ())
  if len(names) != len(infos) or not all(names):
    names = [f"argument {i}" for i in range(len(infos))]
  flat = tuple(range(len(exported.in_avals)))
  exported = dataclasses.replace(
    exported,
    in_tree=jax.tree.structure((flat, {})),
    out_tree=jax.tree.structure(tuple(range(len(exported.out_avals)))),
  )
  captured = sum(c.size * c.dtype.itemsize for c in traced.jaxpr.consts if trees.is_array(c) and c.size > 1)
  return exported, donated, names, captured


def _check_backend(cause: Exception) -> None:
  """Raises a RuntimeError if the cause of an error is that JAX has no backend in this process."""
  try:
    jax.default_backend()
  except Exception:
    raise RuntimeError(
      "gpu_memory: JAX cannot start in this process, whose JAX_PLATFORMS is "
      f"{getattr(jax.config, 'jax_platforms', None)!r}. Set JAX_PLATFORMS=cpu before JAX is imported; the GPU to "
      "compile for is named by target=... and need not be there."
    ) from cause


def _check_no_options(jitted: jax.stages.Wrapped, structs: Trees) -> None:
  """Raises a ValueError if a jitted function has compiler options: an export does not contain them."""
  leaves, treedef = jax.tree.flatten(structs)
  arrays = [i for i, leaf in enumerate(leaves) if trees.is_array(leaf)]

  def call(*values: jax.Array) -> PyTree:
    merged = list(leaves)
    for i, value in zip(arrays, values, strict=True):
      merged[i] = value
    return jitted(*treedef.unflatten(merged))

  try:
    jax.eval_shape(call, *(jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in arrays))
  except ValueError as error:
    # JAX does not tell whether a jitted function has options, but refuses to call one that has inside another one.
    if "compiler_options" in str(error):
      raise ValueError(
        f"gpu_memory: {_name(jitted)} is jitted with compiler_options, which cannot be read from it. Leave them out "
        "there and pass them to gpu_memory(..., compiler_options=...)."
      ) from error
  except Exception:  # it traces by itself, so other errors of a call inside another function do not matter
    pass


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0]}".rstrip(" :.")
