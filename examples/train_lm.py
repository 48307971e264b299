r"""Trains a byte-level Transformer on the source of Python's standard library, with the weights stored as you choose.

Shows what optax_mpo is for: the same model, data and optimizer (AdamW with clipping, warmup and cosine decay), with the
weights stored in one of six ways. All of them compute with bf16 weights. They differ in what persists between steps,
and in what that costs (bytes per parameter of weights and optimizer state):

    fp32     12     f32 master weights, cast to bf16 in every step: the usual mixed precision
    bf16      6     bf16 weights and plain Optax on them: cheap, but loses updates of less than half an ulp
    mpo16    12     bf16 weights and 16 compensation bits; the same numbers as fp32, to the last bit
    mpo8     11     bf16 weights and 8 compensation bits
    mpo4     10.5   bf16 weights and 4 compensation bits
    compact   5.1   bf16 weights and 8 compensation bits, and AdamW's moments in 8 bits

fp32 also has a bf16 copy of the weights during a step: 2 bytes more, which are not counted since they do not persist.
All modes but fp32 update each weight inside the backward pass, so that there is no tree of gradients (--fused auto).

    pip install -e '.[examples]'                          # from the root of the repository
    python examples/train_lm.py                           # mpo16, about two minutes on two CPU cores
    python examples/train_lm.py --compare                 # all six, one table and one plot
    python examples/train_lm.py --compare fp32 mpo8 --steps 100
    python examples/train_lm.py --clip global             # by the norm of all gradients, in two backward passes
    python examples/train_lm.py --fused off --clip global # with a tree of gradients
    python examples/train_lm.py --fused layer             # the loss written with fused layers
    python examples/train_lm.py --scan --state-memory pinned_host  # with the optimizer state in host memory
    python examples/train_lm.py --checkpoint-dir runs/ckpt # to continue a stopped run, add --resume
    python examples/train_lm.py --shard fsdp --cpu-devices 4   # params and state sharded over devices
    python examples/train_lm.py --layers 12 --width 768 --heads 12 --context 1024 --batch 32 --scan --remat \
      --learning-rate 6e-4                                # a size for a GPU

Writes loss.png and results.json to --output-dir. Ctrl-C stops after the current step, still evaluates, prints the table
and draws the plot for what has been trained, and exits with code 130. A second Ctrl-C skips the evaluation, and a third
stops at once. With --checkpoint-dir, params, optimizer state and losses are saved during the run, and --resume
continues from there with the same results, bit for bit.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lm_data
import lm_mesh
import numpy as np
import optax
from lm_checkpoint import Progress, RunCheckpoints, SettingsError
from lm_config import MODES, Config, UsageError, make_folder, make_parser
from lm_model import Transformer, fused_next_byte_loss, init_params, is_matrix, largest_layer, next_byte_loss
from lm_report import NOTES, Run, count_held, count_parameters, draw_losses, make_table, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

import optax_mpo as mpo

PyTree = Any

INTERRUPTED = 130  # the exit code that shells give to Ctrl-C

# By default XLA may skip roundings to bf16 where it fuses operations, and different ones in each program. Without that
# freedom, programs with the same roundings give the same numbers, so fp32 and mpo16 can be compared bit for bit.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW with clipping, a warmup and a cosine decay to a tenth. The scales of norms have no weight decay."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0 if config.warmup_steps else config.learning_rate,
    config.learning_rate,
    config.warmup_steps,
    config.steps,
    end_value=config.learning_rate / 10,
  )
  decayed = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: is_matrix(path))
  adamw = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=decayed)
  if config.clipping == "none":
    return adamw
  clip = optax.clip_by_global_norm(1.0) if config.clipping == "global" else optax.clip(1.0)
  return optax.chain(clip, adamw)


class Storage(NamedTuple):
  """One way to store the weights.

  Attributes:
    init: from f32 params to the `(params, opt_state)` that persist between steps.
    step: from `(params, opt_state, batch)` to `(loss, params, opt_state)`; pure.
    weights: from the stored params to the bf16 weights that the model computes with.
    gradients: from `(params, opt_state, batch)` to the bytes of gradients that exist at one time.
  """

  init: Callable[[PyTree], tuple[PyTree, optax.OptState]]
  step: Callable[[PyTree, optax.OptState, Any], tuple[jax.Array, PyTree, optax.OptState]]
  weights: Callable[[PyTree], PyTree]
  gradients: Callable[[PyTree, optax.OptState, Any], int]


def make_storage(mode: str, model: Transformer, tx: optax.GradientTransformation, fused: str) -> Storage:
  """Returns how `mode` stores and updates the weights. The model and `tx` are the same for all modes.

  fp32 means training without optax_mpo, so it never releases gradients.
  """
  loss_fn = functools.partial(next_byte_loss, model)
  compensated = mode not in ("fp32", "bf16")
  if compensated:
    bits = {"mpo16": 16, "mpo8": 8, "mpo4": 4, "compact": 8}[mode]
    tx = mpo.compensated(mpo.quantized_state(tx) if mode == "compact" else tx, extra_bits=bits)

  def init(params: PyTree) -> tuple[PyTree, optax.OptState]:
    if compensated:
      return mpo.init(tx, params)
    params = params if mode == "fp32" else mpo.cast(params)
    return params, tx.init(params)

  def weights(params: PyTree) -> PyTree:
    # Not astype, which rounds ties to even: the codec rounds them away from zero, and fp32 has to equal mpo16.
    return mpo.cast(params) if mode == "fp32" else params

  def step(params: PyTree, opt_state: optax.OptState, batch: Any) -> tuple[jax.Array, PyTree, optax.OptState]:
    loss, grads = jax.value_and_grad(loss_fn)(weights(params), batch)
    if mode == "fp32":
      grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    updates, opt_state = tx.update(grads, opt_state, params)
    apply_updates = mpo.apply_updates if compensated else optax.apply_updates
    return loss, apply_updates(params, updates), opt_state

  def all_gradients(params: PyTree, *_: Any) -> int:
    return 2 * count_parameters(params)

  if mode == "fp32" or fused == "off":
    return Storage(init, step, weights, all_gradients)
  if fused == "layer":
    step = mpo.fused_value_and_update(functools.partial(fused_next_byte_loss, model), tx)
    return Storage(init, step, weights, lambda params, *_: 2 * largest_layer(model, params))

  def largest_gradient(params: PyTree, opt_state: optax.OptState, batch: Any) -> int:
    leaves = mpo.explain(loss_fn, tx, params, opt_state, batch, two_pass=True)
    return max(leaf.gradient_bytes for leaf in leaves)

  # Two passes are made only if the updates of parameters depend on each other, as with clipping by global norm.
  return Storage(init, mpo.value_and_update(loss_fn, tx, two_pass=True), weights, largest_gradient)


class Interrupts:
  """Counts Ctrl-C. One stops the training after the current step, two stop the evaluation as well.

  An exception could come between a step's call, which donates the params, and the assignment of the new ones. Then
  there would be nothing to evaluate. A third Ctrl-C does raise `KeyboardInterrupt`.
  """

  def __init__(self) -> None:
    self.count = 0

  def handle(self, *_: Any) -> None:
    self.count += 1
    if self.count > 2:
      raise KeyboardInterrupt

  @contextlib.contextmanager
  def counted(self) -> Iterator[None]:
    """Counts Ctrl-C inside this context. Outside the main thread, which alone gets signals, it does nothing."""
    # If several processes train together, one that stops alone would leave the others waiting.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
      yield
      return
    previous = signal.signal(signal.SIGINT, self.handle)
    try:
      yield
    finally:
      signal.signal(signal.SIGINT, previous)


def make_progress(console: Console) -> ProgressBar:
  """A progress bar whose tasks have the fields `loss` and `speed`."""
  return ProgressBar(
    TextColumn("{task.description:5}"),
    BarColumn(bar_width=None),
    MofNCompleteColumn(),
    TextColumn("loss {task.fields[loss]:.3f}"),
    TextColumn("{task.fields[speed]:,.0f} tokens/s"),
    TimeRemainingColumn(),
    console=console,
  )


def train(
  config: Config,
  storage: Storage,
  text: np.ndarray,
  model: Transformer,
  placement: lm_mesh.Placement,
  console: Console,
  interrupts: Interrupts,
  checkpoints: RunCheckpoints,
) -> tuple[Run, PyTree] | None:
  """Trains `model` until all steps are done or Ctrl-C is pressed.

  Returns:
    The run without a validation loss, and the weights; None if no step was made.
  """
  params, opt_state = placement.init(lambda: init_params(model, jax.random.key(config.seed)), storage.init)
  parameters, held = count_parameters(params), count_held(params, opt_state)
  if config.state_memory != "device":
    opt_state = jax.device_put(opt_state, mpo.state_sharding(params, opt_state, memory_kind=config.state_memory))
  if config.weights_memory != "device":
    params = jax.device_put(params, mpo.state_sharding(params, params, memory_kind=config.weights_memory))
  gradients = storage.gradients(params, opt_state, lm_data.training_batch(text, 1, config.context, config.seed, 0))

  def batch_at(step: int) -> Any:
    return placement.batch(lm_data.training_batch(text, config.batch, config.context, config.seed, step))

  # Params and state are donated: the new ones reuse their memory.
  results = placement.results(params, opt_state)
  jitted = jax.jit(storage.step, donate_argnums=(0, 1), out_shardings=results, compiler_options=COMPILER_OPTIONS)
  started = time.perf_counter()
  step_fn = jitted.lower(params, opt_state, batch_at(0)).compile()
  console.print(
    f"[bold]{config.storage}[/bold]: {parameters:,} parameters, {held.total:.2f} bytes each; {config.steps} steps "
    f"of {config.batch} x {config.context} bytes; compiled in {time.perf_counter() - started:.1f} s"
  )

  progress = checkpoints.restore(Progress(params, opt_state, []))
  params, opt_state, losses = progress.params, progress.opt_state, progress.losses
  first = len(losses)  # steps of earlier runs
  tokens, started = config.batch * config.context, time.perf_counter()
  with make_progress(console) as bar:
    task = bar.add_task(config.storage, total=config.steps, completed=first, loss=math.nan, speed=0.0)
    for step in range(first, config.steps):
      if interrupts.count:
        break
      loss, params, opt_state = step_fn(params, opt_state, batch_at(step))
      losses.append(loss)
      # Shows the previous loss: waiting for this one would leave the device idle until the next step is dispatched.
      shown = float(losses[max(step - 1, 0)])
      speed = (step + 1 - first) * tokens / (time.perf_counter() - started)
      bar.update(task, advance=1, loss=shown, speed=speed)
      checkpoints.save(Progress(params, opt_state, losses))
    jax.block_until_ready(params)
  speed = (len(losses) - first) * tokens / (time.perf_counter() - started)
  checkpoints.save(Progress(params, opt_state, losses), last=True)
  if not losses:
    return None
  found = np.array([float(loss) for loss in losses])
  run = Run(config.storage, parameters, held, found, config.steps, speed, gradients / parameters)
  return run, jax.jit(storage.weights)(params)


def evaluate(
  config: Config,
  text: np.ndarray,
  loss_fn: Callable[[PyTree, Any], jax.Array],
  weights: PyTree,
  placement: lm_mesh.Placement,
  interrupts: Interrupts,
) -> float:
  """Returns the mean loss over windows spread evenly over `text`, in nats per byte; NaN if stopped by Ctrl-C."""
  streamed = mpo.streamed(loss_fn) if config.weights_memory != "device" else loss_fn
  compiled = jax.jit(streamed, compiler_options=COMPILER_OPTIONS)
  losses = []
  for batch in lm_data.validation_batches(text, config.eval_batches, config.batch, config.context):
    if interrupts.count > 1:
      return math.nan
    losses.append(float(compiled(weights, placement.batch(batch))))
  return float(np.mean(losses))


def open_checkpoints(config: Config, console: Console) -> RunCheckpoints:
  """Returns the checkpoints of a run, in a folder named after its storage. Without --checkpoint-dir there are none."""
  folder = make_folder("--checkpoint-dir", config.checkpoint_dir, config.storage) if config.checkpoint_dir else None
  # These may change: a run can continue in other processes and on another mesh, with another order of sums.
  free = {"output_dir", "eval_batches", "checkpoint_dir", "checkpoint_every", "keep", "resume"}
  free |= {"state_memory", "weights_memory"}
  free |= {"shard", "cpu_devices", "coordinator_address", "num_processes", "process_id"}
  settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
  try:
    return RunCheckpoints(folder, settings, config.checkpoint_every, config.keep, config.resume, console)
  except SettingsError as error:
    raise UsageError(str(error)) from error


def train_all(config: Config, modes: Sequence[str], corpus: lm_data.Corpus, console: Console) -> tuple[list[Run], bool]:
  """Trains one model per mode. Returns the runs, and whether all finished without an interruption."""
  model = Transformer(config.layers, config.width, config.heads, config.scan, config.remat)
  loss_fn = functools.partial(next_byte_loss, model)
  placement = lm_mesh.Placement(config)
  runs: list[Run] = []
  interrupts = Interrupts()
  with interrupts.counted():
    for mode in modes:
      storage = make_storage(mode, model, make_optimizer(config), config.fused)
      one = dataclasses.replace(config, storage=mode)
      with open_checkpoints(one, console) as checkpoints:
        trained = train(one, storage, corpus.train, model, placement, console, interrupts, checkpoints)
      if trained:
        run, weights = trained
        loss = evaluate(config, corpus.validation, loss_fn, weights, placement, interrupts)
        runs.append(run._replace(validation_loss=loss))
      if interrupts.count:
        break
  return runs, not interrupts.count


def describe_devices(config: Config) -> str:
  kind, processes = jax.devices()[0].device_kind, jax.process_count()
  if config.shard == "none":
    return kind
  return f"{jax.device_count()} x {kind}{f' in {processes} processes' if processes > 1 else ''}, {config.shard}"


def train_and_report(config: Config, modes: Sequence[str], console: Console) -> bool:
  """Trains, reports and writes the files. Returns whether all finished without an interruption."""
  for mode in modes:
    dataclasses.replace(config, storage=mode).check()
  lm_mesh.start(config)
  console.quiet = jax.process_index() > 0
  corpus = lm_data.load_corpus()
  config.check_text(corpus)
  folder = make_folder("--output-dir", config.output_dir)
  console.print(
    f"{describe_devices(config)}, JAX {jax.__version__}. Training text: {len(corpus.train):,} bytes of "
    f"{corpus.train_files} files; held out: {len(corpus.validation):,} bytes of {corpus.validation_files}."
  )
  runs, finished = train_all(config, modes, corpus, console)
  if not runs:
    console.print("Stopped before the first step.")
    return False
  console.print()
  console.print(make_table(runs))
  console.print()
  console.print(NOTES.format(unigram_bits=lm_data.unigram_bits(corpus)))
  if jax.process_index() == 0:
    write_json(folder / "results.json", {**dataclasses.asdict(config), "warmup": config.warmup_steps}, runs)
    draw_losses(folder / "loss.png", runs)
  console.print(f"\nWrote {folder / 'loss.png'} and {folder / 'results.json'}")
  return finished


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit code: 0, or 130 after Ctrl-C. Wrong flags exit with code 2."""
  parser = make_parser()
  flags = vars(parser.parse_args(argv))
  compare = flags.pop("compare", None)
  config = Config(**flags)
  modes = [config.storage] if compare is None else list(dict.fromkeys(compare)) or list(MODES)
  # Without a terminal Rich assumes 80 columns, which can be too few for the table.
  console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
  try:
    return 0 if train_and_report(config, modes, console) else INTERRUPTED
  except UsageError as error:
    parser.exit(2, f"{parser.prog}: error: {error}\n")
  except KeyboardInterrupt:
    console.print("Stopped.")
    return INTERRUPTED


if __name__ == "__main__":
  sys.exit(main())
