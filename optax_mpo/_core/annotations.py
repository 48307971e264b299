"""Names for the types in annotations.

Arrays that JAX traces are annotated as `jax.Array` too, as JAX's documentation advises.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

PyTree: TypeAlias = Any
"""Arrays in containers that JAX flattens, such as parameters, gradients and states; Python has no type for that."""

KeyPath = jax.tree_util.KeyPath
"""Where a leaf lies in a tree."""

Values = Sequence[jax.Array]

Index = jax.Array | int
"""The number of a layer or of a part, in a scan or known."""


class HasShape(Protocol):
  """Has a shape and a dtype."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  @property
  def ndim(self) -> int: ...

  @property
  def size(self) -> int: ...


Shaped = HasShape | jax.ShapeDtypeStruct | jax.Ref
"""An array, a ref, or the type of one: whatever has a shape and a dtype, which pyright misses in two of the classes."""

PyTreeDef: TypeAlias = Any
"""The structure of a tree, `jax.tree_util.PyTreeDef`; jaxlib does not publish the type."""
