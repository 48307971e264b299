"""Models for the memory benchmarks, in plain JAX: decoder language models, a ResNet-50-like net, ViTs.

All of them exist as shapes only (`Model.params` holds ShapeDtypeStructs), so that a laptop can measure a 70B model. The
decoder is that of `python -m optax_mpo plan`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import optax_mpo as mpo
from optax_mpo._planner import decoder
from optax_mpo._planner.decoder import LM_SIZES as LM_SIZES
from optax_mpo._planner.decoder import LMConfig, Model, Shapes, along_last, f32, lm_block, lm_head, rms_norm, stacked

PyTree = Any


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
  """Returns a decoder of one of LM_SIZES, also with fused layers. `changes` replace fields of its LMConfig."""
  config = dataclasses.replace(LM_SIZES[size], **changes)
  model = decoder.language_model(config, size, batch=batch, context=context)
  has_layers = not (config.axis or config.groups or config.experts)  # as `fused_scan` takes them
  return dataclasses.replace(model, fused_loss=functools.partial(lm_fused_loss, config)) if has_layers else model


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
