"""The language models of `benchmarks.models` in PyTorch, trained in two ways that are usual there.

`torch-f32`: f32 weights, bf16 by autocast, and torch's fused AdamW. `torch-bf16-stochastic`: weights and moments in
bf16, where new weights are rounded stochastically; its AdamW is not compiled, so its time is no rival's, but its memory
is.
Each layer is recomputed in the backward pass, and attention is torch's own. `gpu_check` runs this if PyTorch is
installed; the project does not need it.
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
    return functional.rms_norm(x.float(), x.shape[-1:], self.scale.float(), 1e-6).to(x.dtype)


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


class StochasticAdamW(torch.optim.Optimizer):
  """AdamW with weights and moments in bf16. New weights are rounded up or down, with the bits cut off as odds."""

  def __init__(self, params: Any, lr: float, weight_decay: float):
    super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

  @torch.no_grad()
  def step(self, closure: Any = None) -> None:
    for group in self.param_groups:
      for p in group["params"]:
        state = self.state[p]
        if not state:
          state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        state["t"] += 1
        grad = p.grad.float()
        m = state["m"].float().lerp_(grad, 0.1)
        v = state["v"].float().lerp_(grad * grad, 0.001)
        state["m"].copy_(m)
        state["v"].copy_(v)
        update = (m / (1 - 0.9 ** state["t"])) / ((v / (1 - 0.999 ** state["t"])).sqrt_() + 1e-8)
        new = p.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        p.copy_(stochastically_rounded(new))


def stochastically_rounded(x: torch.Tensor) -> torch.Tensor:
  """Rounds f32 to bf16, up or down with odds that make the mean exact."""
  bits = x.view(torch.int32) + torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
  return (bits & -(1 << 16)).view(torch.float32).bfloat16()


def measure(size: str, mode: str, batch: int, context: int, device: str) -> dict[str, Any]:
  """Measures seconds per step and peak bytes of training one of LM_SIZES."""
  config = LM_SIZES[size]
  torch.manual_seed(0)
  if device == "cuda":
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  with torch.device(device):
    model = Decoder(config)
  if mode == "torch-f32":
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1, fused=True)
  else:
    optimizer = StochasticAdamW(model.bfloat16().parameters(), 3e-4, weight_decay=0.1)
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

  def timed(count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
      step()
    wait()
    return (time.perf_counter() - started) / count

  timed(2)
  per_round = 5 if timed(1) < 0.3 else 2
  seconds = [timed(per_round) for _ in range(8)]
  return {
    "parameters": sum(p.numel() for p in model.parameters()),
    "seconds": float(np.median(seconds)),
    "quartiles": [float(x) for x in np.quantile(seconds, [0.25, 0.75])],
    "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    "torch": torch.__version__,
  }
