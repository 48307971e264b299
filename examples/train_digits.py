r"""Trains an image classifier with Flax on scikit-learn's digits, with the weights stored as you choose.

Shows what a Flax user changes to train with optax_mpo, for Linen (`TrainState`, with batch statistics and dropout) and
for NNX (`Optimizer`, in `nnx.jit`). The data are 1797 images of handwritten digits, 8 x 8 pixels, that come with
scikit-learn; a fifth of them is held out. The storages are those of train_lm.py that Flax users will compare:

    fp32     f32 weights, which Flax casts to bf16 where it computes, and plain Optax: the usual mixed precision
    mpo16    bf16 weights and 16 compensation bits: full f32 master weights
    mpo8     bf16 weights and 8 compensation bits
    compact  bf16 weights and 8 compensation bits, and AdamW's moments in 8 bits

    pip install -e '.[examples]'                                    # from the root of the repository
    python examples/train_digits.py                                 # Linen, mpo16
    python examples/train_digits.py --model nnx
    python examples/train_digits.py --storage fp32 mpo16 mpo8 compact   # one after the other, into one table
    python examples/train_digits.py --fused off                     # with a tree of gradients, as in plain Flax
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_mpo as mpo
from optax_mpo.flax import Optimizer, TrainState

PyTree = Any
Fused = Literal["auto", "off"]

STORAGES = ("fp32", "mpo16", "mpo8", "compact")
CLASSES = 10
FEATURES = (32, 64)  # of the two convolutions
DROPOUT = 0.3
MOMENTUM = 0.9  # of the running averages: with the usual 0.99, initial values would still count after a few epochs
INTERRUPTED = 130  # the exit code that shells give to Ctrl-C


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a training run. The flags of the same names describe them."""

  model: str = "linen"
  storage: str = "mpo16"
  fused: Fused = "auto"
  epochs: int = 15
  batch_size: int = 64
  seed: int = 0
  learning_rate: float = 3e-3


class Digits(NamedTuple):
  """Images f32[n, 8, 8, 1] between 0 and 1 and labels i32[n], to train on and held out."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def load_data() -> Digits:
  """Loads the data. The split is the same for all seeds, so that their accuracies can be compared."""
  data: Any = load_digits()
  images, labels = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
  parts: Any = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
  train_images, test_images, train_labels, test_labels = parts
  return Digits(train_images, train_labels, test_images, test_labels)


def batches(digits: Digits, settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields all batches of all epochs. Drops the rest of an epoch, since a smaller batch would compile again."""
  count = len(digits.train_labels)
  for epoch in range(settings.epochs):
    order = np.random.default_rng((settings.seed, epoch)).permutation(count)
    for first in range(0, count - settings.batch_size + 1, settings.batch_size):
      picks = order[first : first + settings.batch_size]
      yield digits.train_images[picks], digits.train_labels[picks]


def make_optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
  """AdamW with a cosine decay, wrapped for the storage. The schedule is inside the wrapper: it computes in f32."""
  tx = optax.adamw(optax.cosine_decay_schedule(settings.learning_rate, steps), weight_decay=1e-2)
  if settings.storage == "fp32":
    return tx
  if settings.storage == "compact":
    tx = mpo.quantized_state(tx)
  return mpo.compensated(tx, extra_bits=16 if settings.storage == "mpo16" else 8)


class Options(NamedTuple):
  """Keyword arguments for `TrainState.create` and `Optimizer`."""

  fused: Fused
  where: Callable[[Any, Any], bool] | None

  @classmethod
  def of(cls, settings: Settings) -> "Options":
    # fp32 means training without optax_mpo: no weight is cast to bf16, and no gradient is released.
    return cls("off", lambda path, leaf: False) if settings.storage == "fp32" else cls(settings.fused, None)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


class Trainer(Protocol):
  """A model in training, with one interface for Linen and NNX."""

  def step(self, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    """Makes one step and returns the loss, f32[]."""
    ...

  def held(self) -> tuple[PyTree, PyTree]:
    """The params and the optimizer state that persist between steps."""
    ...

  def masters(self) -> PyTree:
    """The f32 master weights that the params and the bits represent."""
    ...

  def predict(self, images: np.ndarray) -> jax.Array:
    """Logits bf16[n, 10], without dropout and with the running averages."""
    ...


# dtype=bfloat16 sets what Flax computes in. By default it would compute bf16 weights and f32 images in f32. The
# convolutions have no bias, since the normalisation after them would cancel it.


class LinenModel(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    for features in FEATURES:
      x = nn.Conv(features, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
      x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, dtype=jnp.bfloat16)(x)
      x = nn.relu(x)
    x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
    x = nn.Dropout(DROPOUT, deterministic=not train)(x)
    return nn.Dense(CLASSES, dtype=jnp.bfloat16)(x)


class LinenTrainer:
  """The model in Linen: a step takes and returns a `TrainState` that holds everything."""

  def __init__(self, settings: Settings, tx: optax.GradientTransformation):
    model = LinenModel()
    init_key, dropout_key = jax.random.split(jax.random.key(settings.seed))
    variables = model.init(init_key, jnp.zeros((1, 8, 8, 1)), train=False)
    self.state = TrainState.create(
      apply_fn=model.apply,
      params=variables["params"],
      variables={"batch_stats": variables["batch_stats"]},
      tx=tx,
      **Options.of(settings)._asdict(),
    )

    def loss_fn(variables: PyTree, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, PyTree]:
      rngs = {"dropout": key}
      logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
      return cross_entropy(logits, labels), updates

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
      key = jax.random.fold_in(dropout_key, state.step)
      return state.step_with(loss_fn, images, labels, key, mutable=True)

    self._step = jax.jit(step, donate_argnums=0)  # the new state reuses the memory of the old one
    self._predict = jax.jit(
      lambda state, images: state.apply_fn({"params": state.params, **state.variables}, images, train=False)
    )

  def step(self, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    self.state, loss = self._step(self.state, images, labels)
    return loss

  def held(self) -> tuple[PyTree, PyTree]:
    return self.state.params, self.state.opt_state

  def masters(self) -> PyTree:
    return self.state.masters()

  def predict(self, images: np.ndarray) -> jax.Array:
    return self._predict(self.state, images)


class NNXModel(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    first, second = FEATURES
    self.conv1 = nnx.Conv(1, first, (3, 3), use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
    self.norm1 = nnx.BatchNorm(first, momentum=MOMENTUM, dtype=jnp.bfloat16, rngs=rngs)
    self.conv2 = nnx.Conv(first, second, (3, 3), use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
    self.norm2 = nnx.BatchNorm(second, momentum=MOMENTUM, dtype=jnp.bfloat16, rngs=rngs)
    self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)
    self.head = nnx.Linear(4 * 4 * second, CLASSES, dtype=jnp.bfloat16, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm1(self.conv1(x)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    x = nnx.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
    return self.head(self.dropout(x))


class NNXTrainer:
  """The model in NNX: a step updates the model and the optimizer in place."""

  def __init__(self, settings: Settings, tx: optax.GradientTransformation):
    self.model = NNXModel(nnx.Rngs(settings.seed))
    self.optimizer = Optimizer(self.model, tx, **Options.of(settings)._asdict())

    def loss_fn(model: NNXModel, images: jax.Array, labels: jax.Array) -> jax.Array:
      return cross_entropy(model(images), labels)

    def step(model: NNXModel, optimizer: Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
      return optimizer.step_with(model, loss_fn, images, labels)

    self._step = nnx.jit(step, donate_argnums=(0, 1))  # the new arrays reuse the memory of the old ones
    self._predict = nnx.jit(lambda model, images: model(images))

  def step(self, images: np.ndarray, labels: np.ndarray) -> jax.Array:
    return self._step(self.model, self.optimizer, jnp.asarray(images), jnp.asarray(labels))

  def held(self) -> tuple[PyTree, PyTree]:
    return nnx.as_pure(nnx.state(self.model, nnx.Param)), nnx.as_pure(self.optimizer.opt_state)

  def masters(self) -> PyTree:
    return self.optimizer.masters(self.model)

  def predict(self, images: np.ndarray) -> jax.Array:
    return self._predict(nnx.view(self.model, deterministic=True, use_running_average=True), images)


TRAINERS: dict[str, Callable[[Settings, optax.GradientTransformation], Trainer]] = {
  "linen": LinenTrainer,
  "nnx": NNXTrainer,
}


class Result(NamedTuple):
  """The results of one training run.

  Attributes:
    storage: how the weights were stored.
    parameters: the number of parameters of the model.
    weight_bytes: bytes of the params.
    state_bytes: bytes of the optimizer state, compensation bits included.
    losses: f32[steps], the loss of every batch.
    epoch_steps: the number of steps per epoch.
    accuracy: the fraction of held-out images that the params classify correctly.
    seconds: the time of all steps, compilation included.
    masters: the f32 weights after training.
  """

  storage: str
  parameters: int
  weight_bytes: int
  state_bytes: int
  losses: np.ndarray
  epoch_steps: int
  accuracy: float
  seconds: float
  masters: PyTree

  @property
  def train_loss(self) -> float:
    """The mean loss of the last epoch."""
    return float(np.mean(self.losses[-self.epoch_steps :], dtype=np.float64))


def train(settings: Settings, digits: Digits | None = None, console: Console | None = None) -> Result:
  """Trains and evaluates one model. On one machine, the result depends only on the settings (except `seconds`).

  Args:
    settings: what to train.
    digits: the data, or None to load them.
    console: where to show the progress bar, or None.
  """
  digits = load_data() if digits is None else digits
  epoch_steps = len(digits.train_labels) // settings.batch_size
  steps = settings.epochs * epoch_steps
  trainer = TRAINERS[settings.model](settings, make_optimizer(settings, steps))
  losses: list[jax.Array] = []
  started = time.perf_counter()
  columns = (
    TextColumn("{task.description:7}"),
    BarColumn(bar_width=None),
    MofNCompleteColumn(),
    TextColumn("loss {task.fields[loss]:.3f}"),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console or Console(quiet=True)) as bar:
    task = bar.add_task(settings.storage, total=steps, loss=math.nan)
    for images, labels in batches(digits, settings):
      losses.append(trainer.step(images, labels))
      # Shows the previous loss: waiting for this one would leave the device idle until the next step is dispatched.
      bar.update(task, advance=1, loss=float(losses[max(len(losses) - 2, 0)]))
    jax.block_until_ready(trainer.held())
  seconds = time.perf_counter() - started
  params, opt_state = (jax.tree.leaves(tree) for tree in trainer.held())
  return Result(
    storage=settings.storage,
    parameters=sum(leaf.size for leaf in params),
    weight_bytes=sum(leaf.nbytes for leaf in params),
    state_bytes=sum(leaf.nbytes for leaf in opt_state),
    losses=np.array([float(loss) for loss in losses], np.float32),
    epoch_steps=epoch_steps,
    accuracy=float(np.mean(np.argmax(trainer.predict(digits.test_images), axis=-1) == digits.test_labels)),
    seconds=seconds,
    masters=trainer.held()[0] if settings.storage == "fp32" else trainer.masters(),
  )


NOTES = (
  "Bytes per parameter of the arrays held from step to step; state: compensation bits, AdamW's two moments and step "
  "counts. fp32 makes a bf16 cast of each weight and a tree of gradients in every step, which are not counted. Train "
  "loss: mean of the last epoch, in nats, with dropout. Accuracy: of the params on {held_out} held-out images."
)


def make_table(results: Sequence[Result]) -> Table:
  """The final table, with one row per storage."""
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
  table.add_column("\nstorage", no_wrap=True)
  for header in ("\nweights", "\nstate", "bytes per\nparameter", "train\nloss", "test\naccuracy", "\nseconds"):
    table.add_column(header, justify="right", no_wrap=True)
  for result in results:
    weights, state = result.weight_bytes / result.parameters, result.state_bytes / result.parameters
    table.add_row(
      result.storage,
      f"{weights:.2f}",
      f"{state:.2f}",
      f"[bold]{weights + state:.2f}[/bold]",
      f"{result.train_loss:.4f}",
      f"{result.accuracy:.4f}",
      f"{result.seconds:.1f}",
    )
  return table


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the flags. Defaults come from `Settings`."""
  parser = argparse.ArgumentParser(
    prog="train_digits.py",
    description="Train an image classifier with Flax on scikit-learn's digits, keeping its weights in a chosen way.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--model", choices=list(TRAINERS), default=Settings.model, help="which Flax it is written in")
  parser.add_argument(
    "--storage",
    nargs="+",
    choices=STORAGES,
    default=[Settings.storage],
    help="how the weights are kept; several are trained from the same seed, one after the other",
  )
  parser.add_argument(
    "--fused",
    choices=["auto", "off"],
    default=Settings.fused,
    help="auto: each weight is stepped inside the backward pass (but for fp32); off: all of them after it",
  )
  parser.add_argument("--epochs", type=int, default=Settings.epochs, help="passes over the training images")
  parser.add_argument("--batch-size", type=int, default=Settings.batch_size, help="images per step")
  parser.add_argument("--seed", type=int, default=Settings.seed, help="for weights, dropout and the order of images")
  parser.add_argument(
    "--learning-rate", type=float, default=Settings.learning_rate, help="at the start of a cosine decay to 0"
  )
  return parser


def check(settings: Settings, digits: Digits) -> str | None:
  """Returns a message about what is wrong with the settings and what to do, or None."""
  count = len(digits.train_labels)
  if settings.epochs < 1:
    return f"--epochs is {settings.epochs}: make it 1 or more"
  if not 1 <= settings.batch_size <= count:
    return f"--batch-size is {settings.batch_size}: make it 1 or more and at most {count}, the images to train on"
  if not 0 <= settings.seed < 2**32:
    return f"--seed is {settings.seed}: make it 0 or more and less than 2^32"
  if not 0 < settings.learning_rate < math.inf:
    return f"--learning-rate is {settings.learning_rate}: make it greater than 0, such as 3e-3"
  return None


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit code: 0, or 130 after Ctrl-C. Wrong flags exit with code 2."""
  parser = make_parser()
  flags = vars(parser.parse_args(argv))
  storages = list(dict.fromkeys(flags.pop("storage")))
  digits = load_data()
  wrong = check(Settings(**flags), digits)
  if wrong:
    parser.error(wrong)
  # Without a terminal Rich assumes 80 columns, which would break the notes into more lines than needed.
  console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
  console.print(
    f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, Flax {'NNX' if flags['model'] == 'nnx' else 'Linen'}. "
    f"{len(digits.train_labels)} images to train on, {len(digits.test_labels)} held out."
  )
  try:
    results = [train(Settings(**flags, storage=storage), digits, console) for storage in storages]
  except KeyboardInterrupt:
    console.print("Stopped.")
    return INTERRUPTED
  console.print()
  console.print(make_table(results))
  console.print()
  console.print(NOTES.format(held_out=len(digits.test_labels)))
  return 0


if __name__ == "__main__":
  sys.exit(main())
