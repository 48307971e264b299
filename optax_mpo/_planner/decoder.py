"""A decoder language model in plain JAX, as shapes only, so that a laptop can plan a model of 70B parameters.

Weights are used in their own dtype; normalisations and losses compute in f32, as training code does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._core.annotations import PyTree

Shapes = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to measure.

  Attributes:
    name: such as `lm-350m-scan`.
    params: a tree of f32 ShapeDtypeStructs.
    loss: `loss(params, batch) -> f32[]`.
    batch: a tree of ShapeDtypeStructs.
    fused_loss: the same loss with fused layers, called with handles; None if there is none.
  """

  name: str
  params: PyTree
  loss: Callable[[PyTree, PyTree], jax.Array]
  batch: PyTree
  fused_loss: Callable[[PyTree, PyTree], jax.Array] | None = None

  @property
  def count(self) -> int:
    """The number of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(self.params))


def f32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def stacked(shapes: Shapes, layers: int, axis: int = 0) -> Shapes:
  return jax.tree.map(lambda s: f32(*s.shape[:axis], layers, *s.shape[axis:]), shapes)


@dataclasses.dataclass(frozen=True)
class LMConfig:
  """A decoder: RMSNorm, causal attention (grouped-query if kv_heads < heads), SwiGLU.

  `axis` is that of the layers in stacked weights, 1 as `nn.scan` of MaxText has it. With `groups`, layers are
  rematerialised in two levels. With `experts`, each token goes to one of several SwiGLU blocks, by `lax.ragged_dot`.
  `activations` is the sharding of what goes from layer to layer; None leaves it to XLA.
  """

  layers: int
  width: int
  heads: int
  hidden: int
  vocab: int = 32_000
  kv_heads: int | None = None
  tied: bool = False
  scan: bool = True
  remat: bool = True
  axis: int = 0
  groups: int = 0
  experts: int = 0
  activations: jax.sharding.Sharding | None = None

  def __post_init__(self) -> None:
    """Raises a ValueError if the sizes do not go together."""
    for name in ("layers", "width", "heads", "hidden", "vocab"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} has to be 1 or more, but it is {getattr(self, name)}.")
    if self.width % self.heads:
      raise ValueError(
        f"width {self.width} does not divide into {self.heads} heads: choose a number of heads that divides the width."
      )
    if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
      raise ValueError(
        f"{self.heads} heads do not divide into {self.kv_heads} groups, one for each head of keys and values: choose a "
        "number of kv_heads that divides the heads."
      )


LM_SIZES = {
  "125m": LMConfig(layers=12, width=768, heads=12, hidden=2048),
  "350m": LMConfig(layers=24, width=1024, heads=16, hidden=2816),
  "1.3b": LMConfig(layers=24, width=2048, heads=16, hidden=5504),
  "moe-500m": LMConfig(layers=12, width=768, heads=12, hidden=2048, experts=8),
  "llama3-8b": LMConfig(layers=32, width=4096, heads=32, hidden=14_336, vocab=128_256, kv_heads=8),
  "8.8b": LMConfig(layers=32, width=4096, heads=32, hidden=14_336, vocab=128_256),
  "70b": LMConfig(layers=80, width=8192, heads=64, hidden=28_672, vocab=128_256, kv_heads=8),
  "llama3.2-1b": LMConfig(layers=16, width=2048, heads=32, hidden=8192, vocab=128_256, kv_heads=8, tied=True),
  "llama3.2-3b": LMConfig(layers=28, width=3072, heads=24, hidden=8192, vocab=128_256, kv_heads=8, tied=True),
  "qwen2.5-14b": LMConfig(layers=48, width=5120, heads=40, hidden=13_824, vocab=152_064, kv_heads=8),
  "qwen2.5-32b": LMConfig(layers=64, width=5120, heads=40, hidden=27_648, vocab=152_064, kv_heads=8),
  "llama3-70b": LMConfig(layers=80, width=8192, heads=64, hidden=28_672, vocab=128_256, kv_heads=8),
}
"""Sizes by name. Those named after published models have their shapes, without biases of products."""


def along_last(p: jax.Array, x: jax.Array) -> jax.Array:
  """Returns the vector `p` in f32, with leading axes so that it broadcasts over the last axis of `x`."""
  return jnp.expand_dims(p.astype(jnp.float32), range(x.ndim - 1))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
  x32 = x.astype(jnp.float32)
  norm = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + 1e-6)
  return (norm * along_last(scale, x)).astype(x.dtype)


def lm_block(config: LMConfig, p: PyTree, x: jax.Array) -> jax.Array:
  """One decoder layer on `x: [batch, context, width]`."""
  heads, kv_heads = config.heads, config.kv_heads or config.heads
  depth = config.width // heads
  batch, context, _ = x.shape
  if config.activations is not None:
    x = lax.with_sharding_constraint(x, config.activations)
  h = rms_norm(x, p["attention_norm"])
  q = (h @ p["q"]).reshape(batch, context, kv_heads, heads // kv_heads, depth)
  k = (h @ p["k"]).reshape(batch, context, kv_heads, depth)
  v = (h @ p["v"]).reshape(batch, context, kv_heads, depth)
  scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k).astype(jnp.float32) * depth**-0.5
  causal = jnp.arange(context)[:, None] >= jnp.arange(context)[None]
  weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1).astype(x.dtype)
  x = x + jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(batch, context, config.width) @ p["out"]
  h = rms_norm(x, p["mlp_norm"])
  if config.experts:
    return x + routed(config, p, h.reshape(-1, config.width)).reshape(x.shape)
  return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def routed(config: LMConfig, p: PyTree, x: jax.Array) -> jax.Array:
  """Sends each token of `x: [tokens, width]` to its best expert, all tokens of an expert in one block of rows."""
  weights = jax.nn.softmax((x @ p["router"]).astype(jnp.float32))
  chosen = jnp.argmax(weights, -1)
  order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=config.experts).astype(jnp.int32)
  rows = x[order]
  hidden = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
  out = jnp.zeros_like(x).at[order].set(lax.ragged_dot(hidden, p["down"], sizes))
  return out * jnp.max(weights, -1, keepdims=True).astype(x.dtype)


def lm_loss(config: LMConfig, params: PyTree, batch: jax.Array) -> jax.Array:
  """The mean next-token loss of `batch: i32[batch, context + 1]`."""
  tokens, targets = batch[:, :-1], batch[:, 1:]
  block = functools.partial(lm_block, config)
  block = jax.checkpoint(block) if config.remat else block
  x = params["embedding"][tokens]
  if config.scan:
    blocks = jax.tree.map(lambda p: jnp.moveaxis(p, config.axis, 0), params["blocks"])
    x = scan_layers(block, blocks, x, config.groups)
  else:
    for p in params["blocks"]:
      x = block(p, x)
  head = params["embedding"].T if config.tied else params["head"]
  return lm_head(params["norm"], head, x, targets)


def scan_layers(block: Callable[..., jax.Array], blocks: PyTree, x: jax.Array, groups: int) -> jax.Array:
  """Applies stacked layers, each rematerialised; with `groups`, groups of them too."""

  def scan(x: jax.Array, blocks: PyTree) -> tuple[jax.Array, None]:
    return lax.scan(lambda x, p: (block(p, x), None), x, blocks)[0], None

  if not groups:
    return scan(x, blocks)[0]
  grouped = jax.tree.map(lambda p: p.reshape(groups, -1, *p.shape[1:]), blocks)
  return lax.scan(jax.checkpoint(scan), x, grouped)[0]


def lm_head(norm: jax.Array, head: jax.Array, x: jax.Array, targets: jax.Array) -> jax.Array:
  """The mean next-token loss from the last layer's output."""
  logits = (rms_norm(x, norm) @ head).astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def language_model(config: LMConfig, size: str, *, batch: int = 1, context: int = 1024) -> Model:
  """Returns the shapes of a decoder. `size` is for its name."""
  width, kv_width = config.width, config.width // config.heads * (config.kv_heads or config.heads)
  lead = (config.experts,) if config.experts else ()
  block = {
    "attention_norm": f32(width),
    "q": f32(width, width),
    "k": f32(width, kv_width),
    "v": f32(width, kv_width),
    "out": f32(width, width),
    "mlp_norm": f32(width),
    "gate": f32(*lead, width, config.hidden),
    "up": f32(*lead, width, config.hidden),
    "down": f32(*lead, config.hidden, width),
  }
  if config.experts:
    block["router"] = f32(width, config.experts)
  params: Shapes = {
    "embedding": f32(config.vocab, width),
    "blocks": stacked(block, config.layers, config.axis) if config.scan else [block] * config.layers,
    "norm": f32(width),
  }
  if not config.tied:
    params["head"] = f32(width, config.vocab)
  name = "-".join(
    ["lm", size, "scan" if config.scan else "unrolled"]
    + ["tied"] * config.tied
    + ["noremat"] * (not config.remat)
    + [f"axis{config.axis}"] * bool(config.axis)
    + [f"{config.groups}groups"] * bool(config.groups)
    + [f"{batch}x{context}"] * ((batch, context) != (1, 1024))
  )
  tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
  return Model(name, params, functools.partial(lm_loss, config), tokens)
