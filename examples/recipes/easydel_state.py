"""EasyDeL-like: an immutable state with the graph of a model, whose apply_gradients calls the hook of the optimizer."""

from collections import namedtuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

import optax_mpo as mpo

Config = namedtuple("Config", "width layers vocab length batch", defaults=(64, 3, 64, 16, 32))


class State(struct.PyTreeNode):  # what EasyDeLState does; with EasyDeL, use that
  graphstate: nnx.State
  opt_state: optax.OptState
  graphdef: nnx.GraphDef = struct.field(pytree_node=False)
  tx: optax.GradientTransformation = struct.field(pytree_node=False)

  def apply_gradients(self, *, grads):
    updates, opt_state = self.tx.update(updates=grads, state=self.opt_state, params=self.graphstate)
    apply = getattr(self.tx, "apply_updates_hook", optax.apply_updates)
    return self.replace(graphstate=apply(self.graphstate, updates), opt_state=opt_state)


class Layer(nnx.Module):
  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, dtype=jnp.bfloat16, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, dtype=jnp.bfloat16, rngs=rngs)

  @nnx.remat
  def __call__(self, x):
    return x + self.down(nnx.silu(self.up(self.norm(x))))


class CausalLM(nnx.Module):
  def __init__(self, c: Config, rngs: nnx.Rngs):
    self.embed = nnx.Embed(c.vocab, c.width, dtype=jnp.bfloat16, rngs=rngs)
    self.layers = nnx.Sequential(*[Layer(c.width, rngs) for _ in range(c.layers)])

  def __call__(self, tokens):
    return self.embed.attend(self.layers(self.embed(tokens))).astype(jnp.float32)


def make_batch(config: Config, i: int) -> jax.Array:
  start = jax.random.randint(jax.random.key(i), (config.batch, 1), 0, config.vocab)
  return (start + 3 * jnp.arange(config.length + 1)) % config.vocab


class Hooked(optax.GradientTransformationExtraArgs):
  apply_updates_hook = staticmethod(mpo.apply_updates)


def make(config: Config):
  tx = Hooked(*mpo.exact(optax.adamw(1e-2)))

  def init():
    graphdef, graphstate = nnx.split(CausalLM(config, nnx.Rngs(0)), nnx.Param)
    graphstate, opt_state = mpo.init(tx, graphstate)
    return State(graphstate, opt_state, graphdef, tx)

  def train_step(state, batch):
    def loss_fn(tree):
      logits = nnx.merge(state.graphdef, tree)(batch[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.graphstate)
    return state.apply_gradients(grads=grads), loss

  return jax.jit(train_step, donate_argnums=0), jax.jit(init)()


if __name__ == "__main__":
  step, state = make(config := Config())
  for i in range(60):
    state, loss = step(state, make_batch(config, i))
    if i % 20 == 19:
      print(f"step {i + 1}: loss {loss:.4f}")
