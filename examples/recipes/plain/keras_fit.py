"""Keras 3 on JAX: a functional model in bfloat16, trained by model.fit."""

import os
from collections import namedtuple

os.environ.setdefault("KERAS_BACKEND", "jax")  # before Keras is imported

import keras
import numpy as np

Config = namedtuple("Config", "width layers classes batch", defaults=(64, 3, 8, 64))


def make_model(config: Config, dtype: str) -> keras.Model:
  keras.utils.set_random_seed(0)
  x = inputs = keras.Input((config.width,))
  for _ in range(config.layers):
    y = keras.layers.LayerNormalization(dtype=dtype)(x)
    y = keras.layers.Dense(4 * config.width, activation="gelu", dtype=dtype)(y)
    x = keras.layers.Add(dtype=dtype)([x, keras.layers.Dense(config.width, dtype=dtype)(y)])
  return keras.Model(inputs, keras.layers.Dense(config.classes, dtype=dtype)(x))


def make_data(config: Config, batches: int) -> tuple[np.ndarray, np.ndarray]:
  x = np.random.default_rng(0).standard_normal((batches * config.batch, config.width), np.float32)
  return x, np.argmax(x[:, : config.classes], axis=1)


def make(config: Config) -> keras.Model:
  model = make_model(config, "mixed_bfloat16")
  optimizer = keras.optimizers.AdamW(3e-3)
  model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
  return model


if __name__ == "__main__":
  make(config := Config()).fit(*make_data(config, 60), batch_size=config.batch, epochs=3, verbose=2)
