"""Remembers, while a step is traced, which new weights an update leads to.

Why: `compensated` returns an update, as Optax requires, and `apply_updates` adds it. But the new weights are known
before: the update is made from them. The difference, and the addition that undoes it exactly, are two thirds of the
codec's operations, and no compiler finds that they cancel.

How: by identity, and only for tracers. If anything changes an update, the result is another tracer, and is added as
usual. Only weak references are kept: a trace keeps the weights alive as long as the update made from them, and leaves
nothing behind when it ends. (Arrays outside of a trace would take memory to keep.)
"""

import weakref
from typing import NamedTuple

import jax
from jax.core import Tracer


class _Made(NamedTuple):
  update: "weakref.ref[jax.Array]"
  old: "weakref.ref[jax.Array]"
  new: "weakref.ref[jax.Array]"


_made: dict[int, _Made] = {}  # by the id of the update


def remember(update: jax.Array, old: jax.Array, new: jax.Array) -> None:
  """Notes that `update` leads from the weights `old` to the weights `new`, if they are tracers."""
  if isinstance(update, Tracer) and isinstance(new, Tracer):
    key = id(update)
    _made[key] = _Made(weakref.ref(update, lambda _: _made.pop(key, None)), weakref.ref(old), weakref.ref(new))


def new_weights(update: jax.Array, old: jax.Array) -> jax.Array | None:
  """Returns the weights that `update` leads to from `old`, if `remember` was called with both."""
  made = _made.get(id(update))
  return made.new() if made is not None and made.update() is update and made.old() is old else None
