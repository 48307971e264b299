"""Keras 3 on JAX: a functional model in bfloat16, trained by model.fit."""

import os
from collections import namedtuple

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported

import jax
import keras
import numpy as np
import optax

import optax_mpo as mpo

Config = namedtuple("Config", "width layers classes batch", defaults=(64, 3, 8, 64))


def make_model(config: Config, dtype: str) -> keras.Model:
  keras.utils.set_random_seed(0)
  x = inputs = keras.Input((config.width,))
  for _ in range(config.layers):
    y = keras.layers.LayerNormalization(dtype=dtype)(x)
    y = keras.layers.Dense(4 * config.width, activation="gelu", dtype=dtype)(y)
    x = keras.layers.Add(dtype=dtype)([x, keras.layers.Dense(config.width, dtype=dtype)(y)])
  return Model(inputs, keras.layers.Dense(config.classes, dtype=dtype)(x))


def make_data(config: Config, batches: int) -> tuple[np.ndarray, np.ndarray]:
  x = np.random.default_rng(0).standard_normal((batches * config.batch, config.width), np.float32)
  return x, np.argmax(x[:, : config.classes], axis=1)


class Optax(keras.optimizers.Optimizer):
  """An Optax transformation; its variables, after Keras's own, are the leaves of its state."""

  def __init__(self, tx, weights):
    super().__init__(learning_rate=0.0)
    self.tx, self.own = tx, len(self.variables)
    self.weights, opt_state = mpo.init(tx, weights)
    leaves, self.treedef = jax.tree.flatten(opt_state)
    for leaf in leaves:
      self.add_variable(leaf.shape, dtype=leaf.dtype.name).assign(leaf)

  def build(self, variables):
    super().build(variables)
    for variable, weight in zip(variables, self.weights, strict=True):
      variable.assign(weight)


class Model(keras.Model):
  def train_step(self, state, data):
    weights, others, slots, metrics = state
    own, tracker = self.optimizer.own, self.metrics[0]  # the running mean of the loss

    def loss_fn(weights, x, y):
      kwargs = {"training": True, "optimizer_variables": slots}
      return self.compute_loss_and_updates(weights, others, metrics, x, y, None, **kwargs)

    step = mpo.value_and_update(loss_fn, self.optimizer.tx, has_aux=True)
    opt_state = self.optimizer.treedef.unflatten(slots[own:])
    (loss, (_, _, others, _)), weights, opt_state = step(weights, opt_state, *data)
    metrics = tracker.stateless_update_state(metrics, loss)
    slots = [*slots[:own], *jax.tree.leaves(opt_state)]
    return {"loss": tracker.stateless_result(metrics)}, (weights, others, slots, metrics)


def make(config: Config) -> keras.Model:
  weights = [v.value for v in make_model(config, "float32").trainable_variables]
  model = make_model(config, "bfloat16")
  optimizer = Optax(mpo.exact(optax.adamw(3e-3)), weights)
  model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
  return model


if __name__ == "__main__":
  make(config := Config()).fit(*make_data(config, 60), batch_size=config.batch, epochs=3, verbose=2)
