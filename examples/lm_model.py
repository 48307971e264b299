"""A small decoder-only Transformer in Flax Linen, for `train_lm.py`.

Pre-norm blocks with RMSNorm, rotary positions, causal attention and a SwiGLU MLP, and an untied output layer. Weights
are created in f32 and used in bf16; the statistics of the norms, the softmax and the loss are f32. If the weights are
bf16 already, the model casts none of them. So nothing here depends on how the weights are stored:

    model = Transformer(layers=2, width=64, heads=2)
    params = init_params(model, jax.random.key(0))                    # f32
    logits = model.apply({"params": mpo.cast(params)}, tokens)        # tokens: int[batch, time]
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import optax_mpo as mpo

PyTree = Any

VOCABULARY = 256  # a token is a byte


class RMSNorm(nn.Module):
  """Divides by the root mean square over the last axis, computed in f32, and multiplies by a learned scale."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    wide = x.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


def dense(features: int, name: str) -> nn.Dense:
  """A linear layer without bias that computes in bf16."""
  return nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, name=name)


def rotate(x: jax.Array) -> jax.Array:
  """Rotates pairs of features of `x: [batch, time, heads, depth]` by angles that grow with time (RoPE)."""
  half = x.shape[-1] // 2
  frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies[None, None]
  cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Softmax attention of `[batch, time, heads, depth]` arrays over the past. Scores and softmax are f32."""
  time, depth = query.shape[1], query.shape[-1]
  scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * depth**-0.5
  scores = jnp.where(jnp.tril(jnp.ones((time, time), bool)), scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Block(nn.Module):
  """One layer: attention and MLP, each added to its input. Takes and returns `bf16[batch, time, width]`."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, time, width = x.shape
    qkv = dense(3 * width, "qkv")(RMSNorm(name="attention_norm")(x))
    query, key, value = jnp.split(qkv.reshape(batch, time, 3 * self.heads, width // self.heads), 3, axis=2)
    mixed = causal_attention(rotate(query), rotate(key), value).reshape(x.shape)
    x = x + dense(width, "attention_out")(mixed)

    hidden = -(-width * 8 // 3 // 32) * 32  # 8/3 of the width, since SwiGLU has three matrices; a multiple of 32
    gate, up = jnp.split(dense(2 * hidden, "gate_up")(RMSNorm(name="mlp_norm")(x)), 2, axis=-1)
    return x + dense(width, "mlp_out")(nn.silu(gate) * up)


class Transformer(nn.Module):
  """Predicts the next byte. Takes `tokens: int[batch, time]`, returns logits `bf16[batch, time, 256]`.

  Attributes:
    layers: the number of blocks.
    width: features per position; divisible by `heads`, with an even quotient.
    heads: attention heads.
    scan: whether the blocks are one `lax.scan` over stacked params, which compiles as fast as a single block.
    remat: whether the backward pass recomputes each block's activations instead of keeping them.
  """

  layers: int
  width: int
  heads: int
  scan: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = nn.Embed(VOCABULARY, self.width, dtype=jnp.bfloat16, name="embedding")(tokens)
    # XLA cannot merge operations across iterations of a scan, so barriers against that are not needed.
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    if self.scan:
      run = nn.scan(
        lambda layer, x, _: (layer(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.layers,
      )
      x, _ = run(block(self.heads, name="layers"), x, None)
    else:
      for i in range(self.layers):
        x = block(self.heads, name=f"layer_{i}")(x)
    return dense(VOCABULARY, "head")(RMSNorm(name="final_norm")(x))


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: Transformer, key: jax.Array) -> PyTree:
  """Returns new f32 params."""
  return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def next_byte_loss(model: Transformer, params: PyTree, windows: jax.Array) -> jax.Array:
  """Mean cross entropy in nats, f32[], of all bytes of `windows: uint8[batch, time + 1]` except the first."""
  tokens = windows.astype(jnp.int32)
  return cross_entropy(cast(jax.Array, model.apply({"params": params}, tokens[:, :-1])), tokens[:, 1:])


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross entropy in nats, computed in f32."""
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1))


def fused_next_byte_loss(model: Transformer, params: PyTree, windows: jax.Array) -> jax.Array:
  """`next_byte_loss` with fused layers. Called with handles, each layer updates its weights in the backward pass."""
  tokens = windows.astype(jnp.int32)
  embed, block = nn.Embed(VOCABULARY, model.width, dtype=jnp.bfloat16), Block(model.heads)
  x = mpo.fused_layer(embed)(params["embedding"], tokens[:, :-1])
  if model.scan:
    stack = mpo.fused_scan(lambda p, x, _: (block.apply({"params": p}, x), None), remat=model.remat)
    x, _ = stack(params["layers"], x)
  else:
    layer = mpo.fused_layer(block, remat=model.remat)
    for i in range(model.layers):
      x = layer(params[f"layer_{i}"], x)

  def head(p: PyTree, x: jax.Array, targets: jax.Array) -> jax.Array:
    x = cast(jax.Array, RMSNorm().apply({"params": p["final_norm"]}, x))
    return cross_entropy(cast(jax.Array, dense(VOCABULARY, "head").apply({"params": p["head"]}, x)), targets)

  return mpo.fused_layer(head)({name: params[name] for name in ("final_norm", "head")}, x, tokens[:, 1:])


def largest_layer(model: Transformer, params: PyTree) -> int:
  """The number of parameters of the largest fused layer."""
  counts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
  if model.scan:
    counts["layers"] //= model.layers
  return max(*counts.values(), counts["final_norm"] + counts["head"])


def is_matrix(path: tuple[Any, ...]) -> bool:
  """Whether a path in the params leads to a matrix, not to a norm's scale (which is 2-D in a scan over layers)."""
  return path[-1].key != "scale"
