"""Whole models: 50 steps of `value_and_update` equal 50 ordinary steps, bit for bit.

The loss functions are usual Flax and Optax code, not written for this library. Both sides are compiled without excess
precision and without fusion: a fused loop may sum in another order, or use the other product of a*b + c*d for a fused
multiply-add, in plain Optax too. (With Lion such differences are not small: it makes a full step from the sign of a
gradient that is zero except for rounding.)

By default most models are tested with one optimizer. `pytest -m "slow or not slow"` tests all combinations.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import optax_mpo as mpo
from tests.helpers import assert_same_bits, ordinary_step, relaxed, unfused_jit

STEPS, BATCH, CONTEXT, WIDTH, VOCAB, LAYERS = 50, 2, 4, 8, 11, 2


def cross_entropy(logits, labels):
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def tokens(i):
  return jnp.asarray(np.random.default_rng(i).integers(0, VOCAB, (BATCH, CONTEXT + 1)))


def images(i):
  rng = np.random.default_rng(i)
  return jnp.asarray(rng.normal(size=(BATCH, 4, 4, 1)), jnp.float32), jnp.asarray(rng.integers(0, 3, (BATCH,)))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h, mask=nn.make_causal_mask(jnp.ones(x.shape[:2])))
    return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
  scanned: bool

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(VOCAB, WIDTH)
    x = embed(tokens)
    if self.scanned:
      block = nn.remat(Block, prevent_cse=False)
      x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()(x, None)
    else:
      for _ in range(LAYERS):
        x, _ = nn.remat(Block)()(x)
    return embed.attend(nn.LayerNorm()(x))


def linen_transformer(scanned):
  model = Transformer(scanned)
  params = model.init(jax.random.key(0), tokens(0)[:, :-1])["params"]

  def loss(params, batch):
    return cross_entropy(model.apply({"params": params}, batch[:, :-1]), batch[:, 1:])

  return params, loss, tokens, False


class NNXBlock(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
    self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.norm(x))
    return x + self.down(nnx.silu(self.up(x)))


class NNXTransformer(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)

    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=0, out_axes=0)
    def blocks(rngs):
      return NNXBlock(rngs)

    self.blocks = blocks(rngs)
    self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

  def __call__(self, tokens):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def layers(x, block):
      return block(x)

    return self.head(layers(self.embed(tokens), self.blocks))


def nnx_transformer():
  graph, params, rest = nnx.split(NNXTransformer(nnx.Rngs(0)), nnx.Param, ...)

  @relaxed
  def loss(params, batch):
    return cross_entropy(nnx.merge(graph, params, rest)(batch[:, :-1]), batch[:, 1:])

  return params, loss, tokens, False


class ResNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    norm = functools.partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
    x = nn.Conv(4, (3, 3), use_bias=False)(x)
    y = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
    x = nn.relu(x + norm(scale_init=nn.initializers.ones)(nn.Conv(4, (3, 3), use_bias=False)(y)))
    return nn.Dense(3)(jnp.mean(x, (1, 2)))


def linen_resnet():
  model = ResNet()
  variables = model.init(jax.random.key(0), images(0)[0])

  def loss(params, batch):
    x, labels = batch
    logits, new = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
    return cross_entropy(logits, labels), new

  return variables["params"], loss, images, True


class GRU(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(VOCAB, WIDTH)
    return embed.attend(nn.RNN(nn.GRUCell(WIDTH))(embed(tokens)))


def gru():
  model = GRU()

  def loss(params, batch):
    return cross_entropy(model.apply({"params": params}, batch[:, :-1]), batch[:, 1:])

  return model.init(jax.random.key(0), tokens(0)[:, :-1])["params"], loss, tokens, False


def experts():
  """A block that routes each token to one of its experts."""
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
    "router": jax.random.normal(keys[1], (WIDTH, 3)),
    "up": jax.random.normal(keys[2], (3, WIDTH, 8)) * 0.3,
    "down": jax.random.normal(keys[3], (3, 8, WIDTH)) * 0.3,
  }

  def loss(p, batch):
    x = p["embed"][batch[:, :-1]]
    gates = jax.nn.softmax((x @ p["router"]).astype(jnp.float32))
    gate, chosen = lax.top_k(gates, 1)
    sent = jax.nn.one_hot(chosen[..., 0], 3, dtype=x.dtype)
    y = jnp.einsum("bte,btd,edf->bef", sent, x, p["up"])
    x = x + gate.astype(x.dtype) * jnp.einsum("bte,bef,efd->btd", sent, jax.nn.relu(y), p["down"])
    balance = jnp.sum(jnp.mean(gates, (0, 1)) * jnp.mean(sent.astype(jnp.float32), (0, 1)))
    return cross_entropy(x @ p["embed"].T, batch[:, 1:]) + 0.01 * balance, {"balance": balance}

  return params, loss, tokens, True


class ViT(nn.Module):
  @nn.compact
  def __call__(self, images):
    x = nn.Conv(WIDTH, (2, 2), (2, 2))(images).reshape(BATCH, 4, WIDTH)
    x = x + self.param("position", nn.initializers.normal(0.02), (4, WIDTH))[None]
    x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)()(x, None)
    return nn.Dense(3)(nn.LayerNorm()(jnp.mean(x, 1)))


def vit():
  model = ViT()

  def loss(params, batch):
    return cross_entropy(model.apply({"params": params}, batch[0]), batch[1])

  return model.init(jax.random.key(0), images(0)[0])["params"], loss, images, False


def lora():
  """Scanned layers of frozen weights, with a trained low-rank addition to each."""
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    "frozen": {
      "embed": jax.random.normal(keys[0], (VOCAB, WIDTH)),
      "w": jax.random.normal(keys[1], (LAYERS, WIDTH, WIDTH)),
    },
    "lora": {
      "a": jax.random.normal(keys[2], (LAYERS, WIDTH, 2)),
      "b": jax.random.normal(keys[3], (LAYERS, 2, WIDTH)) * 0.1,
    },
  }

  def loss(p, batch):
    def layer(x, w):
      return jnp.tanh(x @ w["w"] + x @ w["a"] @ w["b"]), None

    x, _ = lax.scan(jax.checkpoint(layer), p["frozen"]["embed"][batch[:, :-1]], {"w": p["frozen"]["w"], **p["lora"]})
    return cross_entropy(x @ p["frozen"]["embed"].T, batch[:, 1:])

  return params, loss, tokens, False


MODELS = {
  "linen_transformer_scanned": functools.partial(linen_transformer, True),
  "linen_transformer_unrolled": functools.partial(linen_transformer, False),
  "nnx_transformer": nnx_transformer,
  "linen_resnet": linen_resnet,
  "gru": gru,
  "experts": experts,
  "vit": vit,
  "lora": lora,
}
OPTIMIZERS = {
  "adamw": lambda: optax.adamw(1e-2),
  "lion": lambda: optax.lion(1e-3),
  "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
  "two_pass": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
}


def trained(tx, name):
  """Limits `tx` to the top-level entry `lora` of the model with frozen weights."""
  if name != "lora":
    return tx
  labels = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)  # noqa: E731
  return optax.multi_transform({"lora": tx, "frozen": optax.set_to_zero()}, labels)


LONG_TO_COMPILE = ("linen_transformer_unrolled", "vit")


def cases():
  """All pairs. Those off the diagonal are marked slow, and so are two models that resemble others."""
  for i, name in enumerate(MODELS):
    for j, optimizer in enumerate(OPTIMIZERS):
      slow = i % len(OPTIMIZERS) != j or name in LONG_TO_COMPILE
      marks = [pytest.mark.slow] * slow + [pytest.mark.full] * ("transformer" in name)
      yield pytest.param(name, optimizer, marks=marks)


@pytest.mark.parametrize(("name", "optimizer"), list(cases()))
@pytest.mark.few(1, full=2)
def test_fifty_steps(name, optimizer):
  params, loss, batches, has_aux = MODELS[name]()
  tx = mpo.compensated(trained(OPTIMIZERS[optimizer](), name))
  two_pass = optimizer == "two_pass"

  def fifty(step):
    compiled = unfused_jit(step)
    state, values = mpo.init(tx, params), []
    for i in range(STEPS):
      value, *state = compiled(*state, batches(i))
      values.append(value)
    return values, state

  fused = mpo.value_and_update(loss, tx, has_aux=has_aux, two_pass=two_pass)
  want, got = fifty(ordinary_step(loss, tx, has_aux=has_aux)), fifty(fused)
  assert_same_bits(got, want)
  assert not np.array_equal(jax.tree.leaves(want[0][0])[0], jax.tree.leaves(want[0][-1])[0])
