"""`python -m optax_mpo plan`: its arguments, and what it prints."""

import argparse
import dataclasses
import time
import warnings
from collections.abc import Sequence

import jax

from optax_mpo._memory import compiling
from optax_mpo._memory.gpu_targets import TARGETS, Target
from optax_mpo._planner import cells, estimate, own_step, table
from optax_mpo._planner.decoder import LM_SIZES, LMConfig, language_model
from optax_mpo._planner.remembered import Remembered, folder
from optax_mpo._planner.storages import OPTIMIZERS, STORAGES

GIB = 2**30
_SHAPE = ("layers", "width", "heads", "hidden", "vocab", "kv_heads")
_NEEDED = _SHAPE[:4]
_EXAMPLES = """
examples:
  python -m optax_mpo plan --model llama3-8b --card rtx4090
  python -m optax_mpo plan --model llama3-8b --card h100 --devices 8 --batches 8 16 32
  python -m optax_mpo plan --layers 32 --width 4096 --heads 32 --hidden 14336 --vocab 128256 --card rtx4090 l40s
  python -m optax_mpo plan my_training:make_step --card rtx4090

make_step returns (step, args): a jitted step that donates what it updates, and a tuple of its arguments, as arrays or
jax.ShapeDtypeStructs. If it has a parameter batch, it is called with each batch size.
"""


def positive(text: str) -> int:
  """A number of 1 or more."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
  return value


def fraction(text: str) -> float:
  """A number above 0, up to 1."""
  value = float(text)
  if not 0 < value <= 1:
    raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
  return value


def parser() -> argparse.ArgumentParser:
  """The parser of the whole command line."""
  top = argparse.ArgumentParser(prog="python -m optax_mpo", description="Commands of optax_mpo.")
  commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
  plan = commands.add_parser(
    "plan",
    help="which storages and batch sizes of a model fit on a card that you need not have",
    description="Compiles the training step of a decoder language model, or your own step, for a card that you need "
    "not have, and prints its peak memory for each way to store weights and optimizer state.",
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  plan.add_argument("step", nargs="?", metavar="MODULE:FUNCTION", help="your own step, instead of a model")
  plan.add_argument("--model", metavar="NAME", help=f"a model by name: {', '.join(LM_SIZES)}")
  for name in _SHAPE:
    what = {"kv_heads": "heads of keys and values, if fewer", "hidden": "width of the MLP", "vocab": "default: 32000"}
    plan.add_argument(f"--{name.replace('_', '-')}", type=positive, help=what.get(name, "of the decoder"))
  plan.add_argument("--tied", action="store_true", help="the embedding is the head, too")
  plan.add_argument("--no-remat", action="store_true", help="layers are not recomputed in the backward pass")
  plan.add_argument("--card", "--target", nargs="+", default=["h100"], metavar="CARD", help=", ".join(TARGETS))
  plan.add_argument("--devices", type=positive, default=1, help="how many of them, fully sharded")
  plan.add_argument("--host-memory", type=positive, metavar="GIB", help="of all devices together; asked only if given")
  plan.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
  plan.add_argument("--context", type=positive, default=2048, help="tokens of a sequence")
  plan.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16], help="sequences of a step, in all")
  plan.add_argument("--storages", nargs="+", default=list(STORAGES), metavar="STORAGE", help=", ".join(STORAGES))
  plan.add_argument("--utilization", type=fraction, default=0.5, help="of the card's speed, to say what is hidden")
  plan.add_argument("--jobs", type=positive, help="compilations at a time; default: by cores and free memory")
  plan.add_argument("--no-cache", action="store_true", help=f"neither read nor write {folder()}")
  return top


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns its exit code. Bad arguments end it with a message and code 2."""
  top = parser()
  args = top.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")  # nothing runs here, and a GPU of this machine stays free
  warnings.filterwarnings("ignore", module=r"optax_mpo\b")  # advice on optimizers, which are not what is asked
  try:
    _check(args)
    compiling.check_toolchain()
    for card in args.card:
      _plan(args, card.lower())
  except (ValueError, TypeError, ImportError, RuntimeError) as error:
    top.error(str(error))
  return 0


def _check(args: argparse.Namespace) -> None:
  for card in args.card:
    if card.lower() not in TARGETS:
      raise ValueError(f"plan: there is no card {card!r}. Known are {', '.join(TARGETS)}.")
  for storage in args.storages:
    if storage not in STORAGES:
      raise ValueError(f"plan: there is no storage {storage!r}. Known are {', '.join(STORAGES)}.")
  if sum((args.step is not None, args.model is not None, any(getattr(args, name) for name in _NEEDED))) > 1:
    raise ValueError("plan: name one: a step of your own (module:function), --model, or the sizes of a decoder.")


def config_of(args: argparse.Namespace) -> tuple[LMConfig, str]:
  """The decoder that the arguments describe, and its name.

  Raises:
    ValueError: for an unknown name, sizes that are missing, and sizes that do not go together.
  """
  given = {name: getattr(args, name) for name in _SHAPE if getattr(args, name) is not None}
  given |= {"remat": False} if args.no_remat else {}
  given |= {"tied": True} if args.tied else {}
  try:
    if args.model is not None:
      if args.model not in LM_SIZES:
        raise ValueError(f"there is no model {args.model!r}. Known are {', '.join(LM_SIZES)}; or give its sizes.")
      return dataclasses.replace(LM_SIZES[args.model], **given), args.model
    missing = [f"--{name}" for name in _NEEDED if name not in given]
    if missing:
      raise ValueError(f"{' and '.join(missing)} are missing. Give all sizes of the decoder, or a --model.")
    return LMConfig(**given), "decoder"
  except ValueError as error:
    raise ValueError(f"plan: {error}") from None


def _plan(args: argparse.Namespace, card: str) -> None:
  """Prints the plan for one card."""
  started, target = time.perf_counter(), TARGETS[card]
  if args.step is not None:
    rows, products = [own_step.of_function(args.step, args.batches, args.devices, card)], None
    what, config = args.step, None
  else:
    config, name = config_of(args)
    model = language_model(config, name)
    embedding = 0 if config.tied else model.params["embedding"].size
    products = model.count - embedding
    rows = [
      cells.of_decoder(config, name, storage, args.optimizer, args.batches, args.context, args.devices, card)
      for storage in args.storages
    ]
    what = f"{name}, {model.count / 1e9:.2f}B parameters, {args.optimizer}, context {args.context}"
  host = args.host_memory and args.host_memory * GIB // args.devices
  limits = cells.Limits(target.memory, host)
  print(f"{what}, on {_where(target, args.devices)}", flush=True)
  remembered = Remembered(None if args.no_cache else folder())
  if config is not None:
    print(f"\n{table.head(sorted(args.batches))}  about, by arithmetic")
    for row, storage in zip(rows, args.storages, strict=True):
      if persists := cells.held_of(row, remembered):
        about = {n: estimate.with_peak(persists, config, storage, n, args.context, args.devices) for n in row.steps}
        print(table.line(row.label, about, limits, "~"), flush=True)
  jobs = args.jobs or cells.default_jobs()
  print(f"\n{table.head(list(rows[0].steps))}  compiled, {jobs} at a time, and remembered", flush=True)
  done: dict[str, table.Cells] = {}
  is_tight = False
  for row, found in cells.rows_of(rows, limits, remembered, jobs):
    done[row.label] = found
    is_tight |= any(table.TIGHT in table.cell(figures, limits) for figures in found.values())
    print(table.line(row.label, found, limits), flush=True)
  lines = table.transfers(
    done, target, products, remat=not args.no_remat, utilization=args.utilization, devices=args.devices
  )
  print("\n".join(lines), end="\n" if lines else "")
  if is_tight:
    print(f"{table.TIGHT}: less than 1 GiB is left for CUDA's context and libraries")
  print(f"{time.perf_counter() - started:.0f} s\n")


def _where(target: Target, devices: int) -> str:
  memory = f"{target.memory / GIB:.1f} GiB"
  return f"{target.name} of {memory}" if devices == 1 else f"each of {devices} x {target.name} of {memory}"
