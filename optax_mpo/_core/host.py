"""Arrays in the memory of the host, which a step streams: fetched when they are needed, and written back.

Why: a step with gradient release needs the optimizer state of one layer at a time. So the rest of it can stay in host
memory, as can the weights.

How: JAX has the memory space of an array in its type. What lies on the host is moved to the device by an operation of
the program that uses it, and so is what replaces it, back. To `_program` these moves are elementwise operations like
others: done for one layer of a stack, they move one layer. XLA makes asynchronous copies of them.

A `jax.Ref` reads as an array on the device, whatever it was made from. So what a fused step keeps in refs is typed as
if it were there, and typed by its memory again after each read: `untyped` and `typed` change no array.
"""

import jax
from jax.core import ShapedArray

from optax_mpo._core import primitives
from optax_mpo._core.annotations import PyTree

KINDS = ("pinned_host", "unpinned_host")


def is_on_host(x: object) -> bool:
  """Whether an array, a traced one or a type is in host memory."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return getattr(x.sharding, "memory_kind", None) in KINDS
  aval = jax.typeof(x) if isinstance(x, jax.Array) else x
  return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def fetched(tree: PyTree) -> PyTree:
  """The tree with its arrays on the device."""
  if not any(map(is_on_host, jax.tree.leaves(tree))):
    return tree
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, tree)


def stored_like(new: PyTree, old: PyTree) -> PyTree:
  """The new tree with its arrays in host memory where those of the old one are; they have to have one structure."""
  if not any(map(is_on_host, jax.tree.leaves(old))):
    return new
  return jax.tree.map(lambda x, y: jax.device_put(x, jax.memory.Space.Host) if is_on_host(y) else x, new, old)


def untyped(x: jax.Array) -> jax.Array:
  """The array with a type that says it is on the device; it stays where it is. Only inside of `jit`."""
  return _typed.bind(x, space=jax.memory.Space.Device) if is_on_host(x) else x


def typed(x: jax.Array, on_host: bool) -> jax.Array:
  """Undoes `untyped`, for an array that is in host memory."""
  return _typed.bind(x, space=jax.memory.Space.Host) if on_host else x


def _aval(x: ShapedArray, *, space: object) -> ShapedArray:
  return x.update(memory_space=space)


def _same(x: jax.Array, **_: object) -> jax.Array:
  return x


_typed = primitives.make(
  "typed_memory", _aval, _same, {None: lambda lower, *_, **__: lower(_same)}, multiple_results=False
)
