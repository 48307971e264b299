"""openpi-like: fine-tunes an NNX model with a part frozen by a regex, layers in a scan, an average of the params."""

import re
from collections import namedtuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

import optax_mpo as mpo

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
  tx = mpo.exact(optax.chain(optax.clip(1.0), optax.adamw(optax.warmup_constant_schedule(0.0, 3e-3, 10))))

  def init() -> TrainState:
    model_def, trainable, frozen = nnx.split(Policy(config, nnx.Rngs(0)), TRAINABLE, ...)
    low, opt_state = mpo.init(tx, trainable)
    params = nnx.merge_state(low, jax.tree.map(lambda p: p.astype(jnp.bfloat16), frozen))
    return TrainState(params, opt_state, trainable, model_def)

  def train_step(state: TrainState, batch):
    trainable, frozen = nnx.split_state(state.params, TRAINABLE, ...)

    def loss_fn(trainable, frozen, *batch):
      return nnx.merge(state.model_def, trainable, frozen).compute_loss(*batch)

    loss, trainable, opt_state = mpo.value_and_update(loss_fn, tx)(trainable, state.opt_state, frozen, *batch)
    ema = optax.incremental_update(mpo.master_params(trainable, opt_state), state.ema_params, 0.01)
    return TrainState(nnx.merge_state(trainable, frozen), opt_state, ema, state.model_def), loss

  return jax.jit(train_step, donate_argnums=0), jax.jit(init)()


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    state, loss = step(state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {loss:.4f}")
