"""Equinox: a module with functions among its leaves, layers in a scan, eqx.filter_jit."""

from collections import namedtuple
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

Config = namedtuple("Config", "width layers classes batch", defaults=(64, 3, 8, 64))


class Block(eqx.Module):
  norm: eqx.nn.LayerNorm
  up: eqx.nn.Linear
  down: eqx.nn.Linear
  activation: Callable

  def __init__(self, width: int, key: jax.Array):
    keys, self.activation = jax.random.split(key), jax.nn.gelu
    self.norm = eqx.nn.LayerNorm(width)
    self.up = eqx.nn.Linear(width, 4 * width, key=keys[0])
    self.down = eqx.nn.Linear(4 * width, width, key=keys[1])

  def __call__(self, x):
    return x + self.down(self.activation(self.up(self.norm(x))))


class Classifier(eqx.Module):
  blocks: Block  # all layers, stacked
  head: eqx.nn.Linear

  def __init__(self, config: Config, key: jax.Array):
    keys = jax.random.split(key, config.layers + 1)
    self.blocks = eqx.filter_vmap(lambda key: Block(config.width, key))(keys[1:])
    self.head = eqx.nn.Linear(config.width, config.classes, key=keys[0])

  def __call__(self, x):
    arrays, static = eqx.partition(self.blocks, eqx.is_array)
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, layer: (eqx.combine(layer, static)(x), None)), x, arrays)
    return self.head(x)


def loss_fn(model, x, y):
  logits = jax.vmap(model)(x.astype(jnp.bfloat16)).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_batch(config: Config, i: int) -> tuple[jax.Array, jax.Array]:
  x = jax.random.normal(jax.random.key(i), (config.batch, config.width))
  return x, jnp.argmax(x[:, : config.classes], axis=1)


def make(config: Config):
  optim = optax.adamw(3e-3)
  model = Classifier(config, jax.random.key(0))
  opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit(donate="all-except-first")
  def make_step(batch, model, opt_state):
    def low_loss(model, x, y):
      low = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if eqx.is_inexact_array(p) else p, model)
      return loss_fn(low, x, y)

    loss, grads = eqx.filter_value_and_grad(low_loss)(model, *batch)
    updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return loss, eqx.apply_updates(model, updates), opt_state

  return make_step, (model, opt_state)


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    loss, *state = step(make_batch(config, i), *state)
    if i % 20 == 19:
      print(f"step {i + 1}: loss {loss:.4f}")
