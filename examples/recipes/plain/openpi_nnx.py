"""openpi-like: fine-tunes an NNX model with a part frozen by a regex, layers in a scan, an average of the params."""

import re
from collections import namedtuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

Config = namedtuple("Config", "width layers actions batch", defaults=(64, 3, 4, 32))
TRAINABLE = nnx.All(nnx.Param, nnx.Not(lambda path, _: bool(re.match("backbone/", "/".join(map(str, path))))))


class Block(nnx.Module):
  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, dtype=jnp.bfloat16, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, dtype=jnp.bfloat16, rngs=rngs)

  def __call__(self, x):
    return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Policy(nnx.Module):
  def __init__(self, config: Config, rngs: nnx.Rngs):
    stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda rngs: Block(config.width, rngs)))
    self.backbone, self.expert = stack(rngs), stack(rngs)
    self.actions_in = nnx.Linear(config.actions + 1, config.width, dtype=jnp.bfloat16, rngs=rngs)

  def compute_loss(self, rng, observation, actions):  # of flow matching
    run = nnx.scan(nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    noise, time = jax.random.normal(rng, actions.shape), jax.random.uniform(rng, (len(actions), 1))
    noisy = jnp.hstack([time * noise + (1 - time) * actions, time])
    x = run(self.actions_in(noisy) + run(observation.astype(jnp.bfloat16), self.backbone), self.expert)
    return jnp.mean(jnp.square(x[:, : actions.shape[1]].astype(jnp.float32) - (noise - actions)))


class TrainState(struct.PyTreeNode):
  params: nnx.State
  opt_state: optax.OptState
  ema_params: nnx.State
  model_def: nnx.GraphDef = struct.field(pytree_node=False)


def make_batch(config: Config, i: int) -> tuple[jax.Array, ...]:
  observation = jax.random.normal(jax.random.key(i), (config.batch, config.width))
  return jax.random.key(i), observation, jnp.tanh(observation[:, : config.actions])


def make(config: Config):
  tx = optax.chain(optax.clip(1.0), optax.adamw(optax.warmup_constant_schedule(0.0, 3e-3, 10)))

  def init() -> TrainState:
    model_def, trainable, frozen = nnx.split(Policy(config, nnx.Rngs(0)), TRAINABLE, ...)
    params = nnx.merge_state(trainable, jax.tree.map(lambda p: p.astype(jnp.bfloat16), frozen))
    return TrainState(params, tx.init(trainable), trainable, model_def)

  def train_step(state: TrainState, batch):
    model = nnx.merge(state.model_def, state.params)

    def loss_fn(model, *batch):
      return model.compute_loss(*batch)

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, TRAINABLE))(model, *batch)
    trainable = nnx.filter_state(state.params, TRAINABLE)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    nnx.update(model, trainable)
    ema = optax.incremental_update(trainable, state.ema_params, 0.01)
    return state.replace(params=nnx.state(model), opt_state=opt_state, ema_params=ema), loss

  return jax.jit(train_step, donate_argnums=0), jax.jit(init)()


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    state, loss = step(state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {loss:.4f}")
