"""Remembers, while a step is traced, which weights an update leads to.

Why: `compensated` hands out an update, as Optax wants it, and `apply_updates` adds it. But the weights are known
before: the update is made from them. The difference, and an addition that undoes it to the last bit, are two thirds of
the operations of the codec, and no compiler finds out that they cancel.

How: by identity, and only for tracers. An update that anything has changed on its way is another tracer, and is added
as ever. Only weak references are held: a trace keeps alive what an update was made from as long as the update lives,
and leaves nothing behind when it ends. (Of arrays, which are there outside of a trace, it would take memory to keep
them.)
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
  """Notes that `update` leads from the weights `old` to the weights `new`, where they are tracers."""
  if isinstance(update, Tracer) and isinstance(new, Tracer):
    key = id(update)
    _made[key] = _Made(weakref.ref(update, lambda _: _made.pop(key, None)), weakref.ref(old), weakref.ref(new))


def new_weights(update: jax.Array, old: jax.Array) -> jax.Array | None:
  """Returns the weights that `update` leads to from `old`, if those very two were remembered."""
  made = _made.get(id(update))
  return made.new() if made is not None and made.update() is update and made.old() is old else None
