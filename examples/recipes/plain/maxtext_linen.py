"""MaxText-like: a Linen decoder with layers in a scan on axis 1, accumulation, clipping, and norms in the logs."""

from collections import namedtuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

Config = namedtuple("Config", "emb_dim layers vocab length batch", defaults=(64, 3, 64, 16, 32))


class DecoderLayer(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x, mask):
    y = nn.RMSNorm(dtype=jnp.bfloat16)(x)
    x = x + nn.MultiHeadDotProductAttention(4, use_bias=False, dtype=jnp.bfloat16)(y, y, mask=mask)
    y = nn.Dense(4 * self.config.emb_dim, use_bias=False, dtype=jnp.bfloat16)(nn.RMSNorm(dtype=jnp.bfloat16)(x))
    return x + nn.Dense(self.config.emb_dim, use_bias=False, dtype=jnp.bfloat16)(nn.silu(y)), None


class Decoder(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, tokens):
    c, mask = self.config, nn.make_causal_mask(tokens)
    embed = nn.Embed(c.vocab, c.emb_dim, dtype=jnp.bfloat16, name="token_embedder")
    layer = nn.remat(DecoderLayer, prevent_cse=False)
    axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
    x, _ = nn.scan(layer, length=c.layers, **axes)(c, name="layers")(embed(tokens), mask)
    return embed.attend(nn.RMSNorm(dtype=jnp.bfloat16, name="decoder_norm")(x)).astype(jnp.float32)


def make_batch(config: Config, i: int) -> dict[str, jax.Array]:
  key, other = jax.random.split(jax.random.key(i))
  start = jax.random.randint(key, (config.batch, 1), 0, config.vocab)
  tokens = (start + 3 * jnp.arange(config.length + 1)) % config.vocab
  lengths = jax.random.randint(other, (config.batch, 1), config.length // 2, config.length + 1)
  segmentation = (jnp.arange(config.length) < lengths).astype(jnp.int32)  # 0 where the text is padded
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "targets_segmentation": segmentation}


def make(config: Config):
  model = Decoder(config)
  tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100), b2=0.95, weight_decay=0.1)
  tx = optax.chain(optax.clip_by_global_norm(1.0), tx)

  def init():
    params = model.init(jax.random.key(0), make_batch(config, 0)["inputs"])["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  def loss_fn(variables, data):
    xent = optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, data["inputs"]), data["targets"])
    return jnp.sum(xent * (data["targets_segmentation"] != 0))

  def train_step(state, data):
    def accumulate(carry, part):
      loss, grads = jax.value_and_grad(lambda params: loss_fn({"params": params}, part))(state.params)
      return jax.tree.map(jnp.add, carry, (loss, grads)), None

    parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), data)
    zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, state.params)
    (loss, grads), _ = jax.lax.scan(accumulate, zeros, parts)
    weights = jnp.sum(data["targets_segmentation"] != 0)
    loss, grads = jax.tree.map(lambda x: x / weights, (loss, grads))
    param_norm = optax.tree.norm(state.params)
    state = state.apply_gradients(grads=grads)
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads), "param_norm": param_norm}

  return jax.jit(train_step, donate_argnums=0), jax.jit(init)()


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    state, logs = step(state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {logs['loss']:.4f}")
