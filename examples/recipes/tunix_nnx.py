"""Tunix-like: an NNX decoder with LoRA on its projections; only the LoRA params are trained, with Optimizer."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import optax_mpo as mpo
from optax_mpo.flax import Optimizer

# With rank=0 there is no LoRA, and all params are trained.
Config = namedtuple("Config", "width layers heads vocab length batch rank", defaults=(64, 3, 4, 64, 16, 32, 16))


def linear(c: Config, n_in: int, n_out: int, rngs: nnx.Rngs):
  n_in, n_out = n_in * c.width, n_out * c.width
  base = nnx.Linear(n_in, n_out, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
  return nnx.LoRA(n_in, c.rank, n_out, base_module=base, dtype=jnp.bfloat16, rngs=rngs) if c.rank else base


class Layer(nnx.Module):
  def __init__(self, c: Config, rngs: nnx.Rngs):
    self.qkv, self.out = linear(c, 1, 3, rngs), linear(c, 1, 1, rngs)
    self.up, self.down = linear(c, 1, 4, rngs), linear(c, 4, 1, rngs)
    self.norms = nnx.List([nnx.RMSNorm(c.width, dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)])
    self.heads = c.heads

  def __call__(self, x):
    q, k, v = (a.reshape(*x.shape[:2], self.heads, -1) for a in jnp.split(self.qkv(self.norms[0](x)), 3, axis=-1))
    x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
    return x + self.down(nnx.silu(self.up(self.norms[1](x))))


class Decoder(nnx.Module):
  def __init__(self, c: Config, rngs: nnx.Rngs):
    self.embed = nnx.Embed(c.vocab, c.width, dtype=jnp.bfloat16, rngs=rngs)
    self.layers = nnx.List([Layer(c, rngs) for _ in range(c.layers)])
    self.norm = nnx.RMSNorm(c.width, dtype=jnp.bfloat16, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    for layer in self.layers:
      x = nnx.remat(lambda layer, x: layer(x))(layer, x)
    return self.embed.attend(self.norm(x)).astype(jnp.float32)


def loss_fn(model, input_tokens, input_mask):
  losses = optax.softmax_cross_entropy_with_integer_labels(model(input_tokens[:, :-1]), input_tokens[:, 1:])
  return jnp.sum(losses * input_mask[:, 1:]) / jnp.sum(input_mask[:, 1:])


def make_batch(config: Config, i: int) -> tuple[jax.Array, jax.Array]:
  start = jax.random.randint(jax.random.key(i), (config.batch, 1), 0, config.vocab)
  tokens = (start + 3 * jnp.arange(config.length + 1)) % config.vocab
  return tokens, jnp.ones(tokens.shape)


def make(config: Config):
  model, wrt = Decoder(config, nnx.Rngs(0)), nnx.LoRAParam if config.rank else nnx.Param
  if config.rank:
    base = nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt)))
    nnx.update(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), base))
  optimizer = Optimizer(model, mpo.exact(optax.adamw(1e-2)), wrt=wrt)

  @nnx.jit(donate_argnames=("model", "optimizer"))
  def train_step(model, optimizer, batch):
    return optimizer.step_with(model, loss_fn, *batch)

  return train_step, (model, optimizer)


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    loss = step(*state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {loss:.4f}")
