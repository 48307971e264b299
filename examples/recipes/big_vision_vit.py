"""big_vision-like: a Linen ViT on dicts of params, an Optax chain with a mask for weight decay, norms in the logs."""

from collections import namedtuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_mpo as mpo

Config = namedtuple("Config", "width depth size classes batch", defaults=(64, 3, 16, 4, 32))


class Encoder1DBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(dtype=jnp.bfloat16)(x)
    x = x + nn.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16)(y, y)
    y = nn.LayerNorm(dtype=jnp.bfloat16)(x)
    y = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=jnp.bfloat16)(y))
    return x + nn.Dense(x.shape[-1], dtype=jnp.bfloat16)(y)


class ViT(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, image):
    c = self.config
    x = nn.Conv(c.width, (4, 4), strides=4, padding="VALID", dtype=jnp.bfloat16, name="embedding")(image)
    x = x.reshape(len(x), -1, c.width)
    x += self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(jnp.bfloat16)
    for i in range(c.depth):
      x = nn.remat(Encoder1DBlock)(name=f"encoderblock_{i}")(x)
    x = nn.LayerNorm(dtype=jnp.bfloat16, name="encoder_norm")(x)
    return nn.Dense(c.classes, dtype=jnp.bfloat16, kernel_init=nn.initializers.zeros, name="head")(x.mean(axis=1))


def make_batch(config: Config, i: int) -> dict[str, jax.Array]:
  labels = jnp.arange(config.batch) % config.classes
  noise = jax.random.normal(jax.random.key(i), (config.batch, config.size, config.size, 3))
  return {"image": noise + labels[:, None, None, None] / 4, "labels": jax.nn.one_hot(labels, config.classes)}


def is_kernel(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make(config: Config):
  rate = optax.scale_by_learning_rate(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 10, 100))
  decay = optax.add_decayed_weights(1e-4, mask=is_kernel)
  model, tx = ViT(config), optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.999), decay, rate)
  norms = mpo.record_norms("l2_grads"), mpo.record_norms("l2_params", of="params")
  tx = mpo.exact(optax.chain(*norms, tx, mpo.record_norms("l2_updates")))

  def init():
    params = model.init(jax.random.key(0), make_batch(config, 0)["image"])["params"]
    params, opt = mpo.init(tx, params)
    return {"params": params, "opt": opt}

  def update_fn(train_state, batch):
    def loss_fn(params):
      logits = model.apply({"params": params}, batch["image"]).astype(jnp.float32)
      return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, batch["labels"]), axis=-1))

    step = mpo.value_and_update(loss_fn, tx, two_pass=True)
    loss, params, opt = step(train_state["params"], train_state["opt"])
    return {"params": params, "opt": opt}, {"training_loss": loss, **mpo.recorded(opt)}

  return jax.jit(update_fn, donate_argnums=0), jax.jit(init)()


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    state, logs = step(state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {logs['training_loss']:.4f}")
