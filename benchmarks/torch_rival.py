"""The language models of `benchmarks.models` in PyTorch, trained as is usual there: f32 weights, bf16 by autocast.

AdamW is torch's fused one, each layer is recomputed in the backward pass, and attention is torch's own. `gpu_check`
runs this if PyTorch is installed; the project does not need it.
"""

import time
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]

from benchmarks.models import LM_SIZES, LMConfig


class RMSNorm(torch.nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.scale = torch.nn.Parameter(torch.ones(width))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], self.scale, 1e-6).to(x.dtype)


class Block(torch.nn.Module):
  def __init__(self, config: LMConfig):
    super().__init__()
    width, hidden = config.width, config.hidden
    self.heads = config.heads
    self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
    self.q, self.k, self.v, self.out = (torch.nn.Linear(width, width, bias=False) for _ in range(4))
    self.gate, self.up = (torch.nn.Linear(width, hidden, bias=False) for _ in range(2))
    self.down = torch.nn.Linear(hidden, width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    batch, context, width = x.shape
    h = self.attention_norm(x)
    q, k, v = (w(h).view(batch, context, self.heads, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(attended.transpose(1, 2).reshape(batch, context, width))
    h = self.mlp_norm(x)
    return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(torch.nn.Module):
  def __init__(self, config: LMConfig):
    super().__init__()
    self.embedding = torch.nn.Embedding(config.vocab, config.width)
    self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.layers))
    self.norm = RMSNorm(config.width)
    self.head = torch.nn.Linear(config.width, config.vocab, bias=False)

  def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    x = self.embedding(tokens).to(torch.bfloat16)
    for block in self.blocks:
      x = checkpoint(block, x, use_reentrant=False)
    return functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def measure(size: str, batch: int, context: int, device: str, rounds: int, per_round: int) -> dict[str, Any]:
  """Measures seconds per step and peak bytes of training one of LM_SIZES."""
  config = LM_SIZES[size]
  torch.manual_seed(0)
  with torch.device(device):
    model = Decoder(config)
  optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1, fused=True)
  tokens = torch.randint(0, 256, (batch, context + 1), device=device)

  def step() -> None:
    with torch.autocast(device, torch.bfloat16):
      loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  def wait() -> None:
    if device == "cuda":
      torch.cuda.synchronize()

  for _ in range(3):
    step()
  wait()
  seconds = []
  for _ in range(rounds):
    started = time.perf_counter()
    for _ in range(per_round):
      step()
    wait()
    seconds.append((time.perf_counter() - started) / per_round)
  return {
    "parameters": sum(p.numel() for p in model.parameters()),
    "seconds": float(np.median(seconds)),
    "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    "torch": torch.__version__,
  }
