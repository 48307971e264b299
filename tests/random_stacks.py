"""Random ways to use a stack of layers: cut, reversed, cast, reshaped, interleaved, scanned in any order, shared."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax


def layer(x, w):
  return jnp.tanh(x @ w), None


def scan(x, w, **options):
  return lax.scan(layer, x, w, **options)[0]


def pairs(x, w):
  def body(x, w):
    return layer(layer(x, w[0])[0], w[1])[0], None

  return lax.scan(body, x, w.reshape(-1, 2, *w.shape[1:]))[0]


def two_levels(x, w):
  return lax.scan(jax.checkpoint(lambda x, w: (scan(x, w), None)), x, w.reshape(-1, 2, *w.shape[1:]))[0]


def alternating(x, w):
  def body(x, w):
    return layer(layer(x, w[0])[0], w[1])[0], None

  return lax.scan(body, x, (w[::2], w[1::2]))[0]


@dataclasses.dataclass(frozen=True)
class Segment:
  """Consecutive layers. `order`: of the stack. `way`: how they are scanned."""

  length: int
  order: str
  way: str
  cast: bool


_SCANS: dict[str, Callable[[Any, Any], Any]] = {
  "scan": scan,
  "reverse": functools.partial(scan, reverse=True),
  "unrolled": functools.partial(scan, unroll=2),
  "pairs": pairs,
  "two levels": two_levels,
  "alternating": alternating,
}
segments = st.lists(
  st.builds(
    Segment,
    length=st.sampled_from([2, 4, 6]),
    order=st.sampled_from(["as stored", "reversed"]),
    way=st.sampled_from(list(_SCANS)),
    cast=st.booleans(),
  ),
  min_size=1,
  max_size=3,
)


def run(parts: Sequence[Segment], is_reversed: bool, is_shared: bool, x: Any, w: Any) -> Any:
  """Applies the layers of all segments of `w: [layers, width, width]`, and all once more if they are shared."""
  x = x.astype(jnp.bfloat16)
  w = w[::-1] if is_reversed else w
  start = 0
  for part in parts:
    piece, start = w[start : start + part.length], start + part.length
    piece = piece[::-1] if part.order == "reversed" else piece
    to = jnp.float32 if part.cast else jnp.bfloat16
    x = _SCANS[part.way](x.astype(to), piece.astype(to)).astype(jnp.bfloat16)
  return scan(x, w) if is_shared else x
