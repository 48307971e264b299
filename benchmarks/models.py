"""Models for the memory benchmarks, in plain JAX: decoder language models, a ResNet-50-like net, ViTs.

All of them exist as shapes only (`Model.params` holds ShapeDtypeStructs), so that a laptop can measure a 70B model.
Weights are used in their own dtype; normalisations and losses compute in f32, as training code does.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import optax_mpo as mpo

PyTree = Any
Shapes = dict[str, Any]


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


# --- Decoder language models ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LMConfig:
  """A decoder: RMSNorm, causal attention (grouped-query if kv_heads < heads), SwiGLU.

  `axis` is that of the layers in stacked weights, 1 as `nn.scan` of MaxText has it. With `groups`, layers are
  rematerialised in two levels. With `experts`, each token goes to one of several SwiGLU blocks, by `lax.ragged_dot`.
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


LM_SIZES = {
  "125m": LMConfig(layers=12, width=768, heads=12, hidden=2048),
  "350m": LMConfig(layers=24, width=1024, heads=16, hidden=2816),
  "1.3b": LMConfig(layers=24, width=2048, heads=16, hidden=5504),
  "moe-500m": LMConfig(layers=12, width=768, heads=12, hidden=2048, experts=8),
  "llama3-8b": LMConfig(layers=32, width=4096, heads=32, hidden=14_336, vocab=128_256, kv_heads=8),
  "8.8b": LMConfig(layers=32, width=4096, heads=32, hidden=14_336, vocab=128_256),
  "70b": LMConfig(layers=80, width=8192, heads=64, hidden=28_672, vocab=128_256, kv_heads=8),
}


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


def scan_layers(block: Callable[..., Any], blocks: PyTree, x: jax.Array, groups: int) -> jax.Array:
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


def lm_fused_loss(config: LMConfig, params: PyTree, batch: jax.Array) -> jax.Array:
  """`lm_loss` with fused layers."""
  tokens, targets = batch[:, :-1], batch[:, 1:]
  block = functools.partial(lm_block, config)
  tied = mpo.fused_value(params["embedding"]) if config.tied else None
  embed = mpo.fused_layer(lambda embedding, tokens: embedding[tokens])
  x = embed(params["embedding"], tokens) if tied is None else tied[tokens]
  if config.scan:
    x, _ = mpo.fused_scan(lambda p, x, _: (block(p, x), None), remat=config.remat)(params["blocks"], x)
  else:
    layer = mpo.fused_layer(block, remat=config.remat)
    for p in params["blocks"]:
      x = layer(p, x)
  if tied is not None:
    return mpo.fused_layer(lm_head)(params["norm"], tied.T, x, targets)
  head = mpo.fused_layer(lambda p, x, targets: lm_head(p[0], p[1], x, targets))
  return head((params["norm"], params["head"]), x, targets)


def language_model(size: str, *, batch: int = 1, context: int = 1024, **changes: Any) -> Model:
  """Returns a decoder of one of LM_SIZES. `changes` replace fields of its LMConfig."""
  config = dataclasses.replace(LM_SIZES[size], **changes)
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
  has_layers = not (config.axis or config.groups or config.experts)  # as `fused_scan` takes them
  fused = functools.partial(lm_fused_loss, config) if has_layers else None
  return Model(name, params, functools.partial(lm_loss, config), tokens, fused)


def layers(count: int, width: int, *, scan: bool = True, batch: int = 8) -> Model:
  """Returns `count` layers, each one product, with next to no activations: what is not state is of the update."""

  @jax.checkpoint
  def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(x @ w.astype(x.dtype)), None

  def loss(params: PyTree, x: jax.Array) -> jax.Array:
    blocks = params["blocks"]
    x = lax.scan(layer, x, blocks)[0] if scan else functools.reduce(lambda x, w: layer(x, w)[0], blocks, x)
    return jnp.mean(x.astype(jnp.float32) ** 2)

  blocks = f32(count, width, width) if scan else [f32(width, width)] * count
  x = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16)
  return Model(f"layers-{count}x{width}{'' if scan else '-unrolled'}", {"blocks": blocks}, loss, x)


# --- Vision models, as in the paper -----------------------------------------------------------------------------------


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], axis=-1))


def batch_norm(x: jax.Array, p: PyTree) -> jax.Array:
  """Batch statistics of `x: [batch, height, width, channels]`, as in training."""
  x32 = x.astype(jnp.float32)
  mean, var = (along_last(f(x32, (0, 1, 2)), x) for f in (jnp.mean, jnp.var))
  norm = (x32 - mean) * lax.rsqrt(var + 1e-5)
  return (norm * along_last(p["scale"], x) + along_last(p["bias"], x)).astype(x.dtype)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


RESNET_STAGES = (3, 4, 6, 3)


def resnet_loss(params: PyTree, batch: PyTree) -> jax.Array:
  images, labels = batch
  x = images.astype(params["stem"].dtype)
  x = jax.nn.relu(batch_norm(conv(x, params["stem"], 2), params["stem_norm"]))
  x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
  for i, stage in enumerate(params["stages"]):
    for j, p in enumerate(stage):
      stride = 2 if i > 0 and j == 0 else 1
      y = jax.nn.relu(batch_norm(conv(x, p["conv1"]), p["norm1"]))
      y = jax.nn.relu(batch_norm(conv(y, p["conv2"], stride), p["norm2"]))
      y = batch_norm(conv(y, p["conv3"]), p["norm3"])
      short = batch_norm(conv(x, p["short"], stride), p["short_norm"]) if "short" in p else x
      x = jax.nn.relu(y + short)
  return cross_entropy(jnp.mean(x, (1, 2)) @ params["head"], labels)


def resnet50(*, batch: int = 32, size: int = 224) -> Model:
  """A ResNet-50 with batch statistics, 25.5M parameters."""

  def norm(channels: int) -> Shapes:
    return {"scale": f32(channels), "bias": f32(channels)}

  stages, channels = [], 64
  for i, blocks in enumerate(RESNET_STAGES):
    inner = 64 * 2**i
    stage = []
    for j in range(blocks):
      p: Shapes = {
        "conv1": f32(1, 1, channels, inner),
        "norm1": norm(inner),
        "conv2": f32(3, 3, inner, inner),
        "norm2": norm(inner),
        "conv3": f32(1, 1, inner, 4 * inner),
        "norm3": norm(4 * inner),
      }
      if j == 0:
        p |= {"short": f32(1, 1, channels, 4 * inner), "short_norm": norm(4 * inner)}
      stage.append(p)
      channels = 4 * inner
    stages.append(stage)
  params = {"stem": f32(7, 7, 3, 64), "stem_norm": norm(64), "stages": stages, "head": f32(channels, 1000)}
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  return Model("resnet50", params, resnet_loss, (images, jax.ShapeDtypeStruct((batch,), jnp.int32)))


def vit_loss(heads: int, params: PyTree, batch: PyTree) -> jax.Array:
  images, labels = batch
  x = conv(images.astype(params["patch"].dtype), params["patch"], params["patch"].shape[0])
  x = x.reshape(x.shape[0], -1, x.shape[-1]) + params["position"][None]

  @jax.checkpoint
  def block(x: jax.Array, p: PyTree) -> tuple[jax.Array, None]:
    batch, tokens, width = x.shape
    h = rms_norm(x, p["norm1"])
    q, k, v = jnp.moveaxis((h @ p["qkv"]).reshape(batch, tokens, 3, heads, width // heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * (width // heads) ** -0.5
    x = x + jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(x.dtype), v).reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(rms_norm(x, p["norm2"]) @ p["up"]) @ p["down"], None

  x, _ = lax.scan(block, x, params["blocks"])
  return cross_entropy(jnp.mean(rms_norm(x, params["norm"]), 1) @ params["head"], labels)


VIT_SIZES = {"vit-b16": (12, 768, 12), "vit-l16": (24, 1024, 16)}


def vit(name: str, *, batch: int = 32, size: int = 224, patch: int = 16) -> Model:
  """A ViT-B/16 (86M parameters) or ViT-L/16 (304M)."""
  layers, width, heads = VIT_SIZES[name]
  block = {
    "norm1": f32(width),
    "qkv": f32(width, 3 * width),
    "out": f32(width, width),
    "norm2": f32(width),
    "up": f32(width, 4 * width),
    "down": f32(4 * width, width),
  }
  params = {
    "patch": f32(patch, patch, 3, width),
    "position": f32((size // patch) ** 2, width),
    "blocks": stacked(block, layers),
    "norm": f32(width),
    "head": f32(width, 1000),
  }
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  return Model(name, params, functools.partial(vit_loss, heads), (images, jax.ShapeDtypeStruct((batch,), jnp.int32)))
