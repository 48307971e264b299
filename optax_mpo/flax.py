"""A train state for Flax Linen, and an optimizer object for Flax NNX.

Why: Flax's own `TrainState.create` and `nnx.Optimizer` call `tx.init(params)`, which cannot know the bits that a cast
cut off. And both take a tree of gradients, which steps with gradient release never have.

How: both are thin. They hold what `optax_mpo.init` makes. Their `step_with(loss_fn, ...)` is one of the steps of this
library; what `loss_fn` changes besides the params (batch statistics, random streams, metrics) is returned as aux.
`apply_gradients` and `update` take gradients, as in Flax.

Needs flax: `pip install 'optax_mpo[flax]'`. `import optax_mpo` alone does not import it.
"""

from optax_mpo._flax.optimizer import Optimizer as Optimizer
from optax_mpo._flax.train_state import TrainState as TrainState

for _class in (Optimizer, TrainState):
  _class.__module__ = __name__  # pickles do not depend on the layout of the folders
