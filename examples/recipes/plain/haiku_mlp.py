"""Haiku: hk.transform_with_state with a BatchNorm, residual blocks in hk.layer_stack, a jmp policy."""

from collections import namedtuple
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import optax

Config = namedtuple("Config", "width layers classes batch", defaults=(64, 3, 8, 64))


class TrainingState(NamedTuple):
  params: hk.Params
  state: hk.State
  opt_state: optax.OptState


class Classifier(hk.Module):
  def __init__(self, config: Config):
    super().__init__()
    self.config = config

  def __call__(self, x, is_training):
    width = self.config.width

    def block(x):
      y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
      return x + hk.Linear(width)(jax.nn.gelu(hk.Linear(4 * width)(y)))

    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    x = hk.layer_stack(self.config.layers)(hk.remat(block))(x)
    return hk.Linear(self.config.classes)(x)


def make_batch(config: Config, i: int) -> tuple[jax.Array, jax.Array]:
  x = jax.random.normal(jax.random.key(i), (config.batch, config.width))
  return x, jnp.argmax(x[:, : config.classes], axis=1)


def make(config: Config):
  policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
  hk.mixed_precision.set_policy(Classifier, policy)
  network = hk.transform_with_state(lambda x, is_training: Classifier(config)(x, is_training))
  tx = optax.adamw(3e-3)

  def init():
    params, state = network.init(jax.random.key(0), make_batch(config, 0)[0], True)
    return TrainingState(params, state, tx.init(params))

  def loss_fn(params, state, x, y):
    logits, state = network.apply(params, state, None, x, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

  def update(train_state, batch):
    params, state, opt_state = train_state
    (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, *batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return TrainingState(optax.apply_updates(params, updates), state, opt_state), loss

  return jax.jit(update, donate_argnums=0), jax.jit(init)()


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    state, loss = step(state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {loss:.4f}")
