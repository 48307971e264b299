"""Which leaves of an Optax state are signed, which are never negative, and which must not be rounded.

Why: 8 bits are more precise for numbers without a sign. And some states contain weights (the averaged point of
schedule_free, the starting point of dual averaging): rounding those to 8 bits would ruin the training.

How: a table of the state classes of Optax and their fields. A field of Optax that is not in the table is signed. For
other states, `state_flow` looks at what the transformation does with them.
"""

from collections.abc import Iterator
from typing import Literal

import jax

from optax_mpo._codecs import levels
from optax_mpo._core.annotations import KeyPath, PyTree

Kind = levels.Kind | Literal[False]  # False: not stored in 8 bits
Leaf = tuple[KeyPath, jax.Array, Kind | None]

_NONNEGATIVE = """
  ScaleByRssState.sum_of_squares ScaleByRmsState.nu ScaleByRmsWithCountState.nu ScaleByAdamState.nu
  ScaleByAmsgradState.nu ScaleByAmsgradState.nu_max
  ScaleByAdaDeltaState.e_g ScaleByAdaDeltaState.e_x ScaleByAdanState.n ScaleByBeliefState.nu ScaleBySM3State.mu
  FactoredState.v_row FactoredState.v_col FactoredState.v ScaleByAdemamixState.nu ScaleBySimplifiedAdEMAMixState.n
  ProdigyState.exp_avg_sq DAdaptAdamWState.exp_avg_sq MomoAdamState.exp_avg_sq MadgradState.grad_sum_sq
  PerElementMeanAndSumSqDiffGradsState.sum_sq_diff_grads PerElementMeanAndVarianceEMAState.variance_grads_ema
""".split()

# Weights; state that weights are computed from without a learning rate; state that is multiplied instead of averaged;
# and the moments whose small difference is a variance (the second moment minus the square of the first).
_KEPT = """
  ScaleByRStdDevState.mu ScaleByRStdDevState.nu ScaleByRStdDevWithCountState.mu ScaleByRStdDevWithCountState.nu
  ScheduleFreeState.z MechanicState.x0 ProdigyState.params0 MadgradState.x0 MadgradState.s DoGState.init_params
  DoWGState.init_params ScaleByDistanceOverGradientsState.init_params SAMState.cache SnapshotState.measurement
  COCOBState.init_particles COCOBState.cumulative_gradients COCOBState.scale COCOBState.subgradients COCOBState.reward
  ScaleByRpropState.step_sizes ScaleByLBFGSState.params ScaleByLBFGSState.updates ScaleByLBFGSState.diff_params_memory
  ScaleByLBFGSState.diff_updates_memory ZoomLinesearchState.params ZoomLinesearchState.updates GaLoreState.projector
  ScaleByBacktrackingLinesearchState.grad ScaleByZoomLinesearchState.grad LookaheadParams.fast LookaheadParams.slow
""".split()

KNOWN: dict[str, Kind] = {**{n: "nonnegative" for n in _NONNEGATIVE}, **{n: False for n in _KEPT}}
"""The kind of each field of Optax's states, by `State.field`; False for fields that are not stored in 8 bits."""


def leaves(state: PyTree) -> Iterator[Leaf]:
  """Yields the leaves of a state in order, with key path and kind. The kind is None outside of Optax's own states."""
  yield from _leaves(state, (), None)


def _leaves(node: PyTree, path: KeyPath, kind: Kind | None) -> Iterator[Leaf]:
  if _is_state(node):
    for field in node._fields:
      inner = kind
      if _is_optax(type(node)) and not field.endswith(("state", "states")):  # those hold other transformations' state
        inner = KNOWN.get(f"{type(node).__name__}.{field}", "signed" if kind is None else kind)
      yield from _leaves(getattr(node, field), (*path, jax.tree_util.GetAttrKey(field)), inner)
    return
  for rest, found in jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_state):
    if _is_state(found):
      yield from _leaves(found, (*path, *rest), kind)
    else:
      yield (*path, *rest), found, kind


def _is_state(x: object) -> bool:
  return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_optax(cls: type) -> bool:
  return cls.__module__.split(".")[0] == "optax"
