"""Which leaves of an Optax state are signed, which are never negative, and which must not be rounded.

Why: 8 bits go further where it is known that a number has no sign, and some states hold weights in disguise (the
averaged point of schedule_free, the start of dual averaging): stored in 8 bits they would ruin the training.

How: by the names of Optax's own states and their fields. A field of Optax's that is not in the table is signed. State
that is not Optax's is told by what the transformation does with it (`state_flow`).
"""

from collections.abc import Iterator
from typing import Any

import jax

from optax_mpo._codecs import blocks

PyTree = Any
Kind = blocks.Kind | bool  # False: to be kept as it is

_NONNEGATIVE = """
  ScaleByRssState.sum_of_squares ScaleByRmsState.nu ScaleByRmsWithCountState.nu ScaleByAdamState.nu
  ScaleByAmsgradState.nu ScaleByAmsgradState.nu_max
  ScaleByAdaDeltaState.e_g ScaleByAdaDeltaState.e_x ScaleByAdanState.n ScaleByBeliefState.nu ScaleBySM3State.mu
  FactoredState.v_row FactoredState.v_col FactoredState.v ScaleByAdemamixState.nu ScaleBySimplifiedAdEMAMixState.n
  ProdigyState.exp_avg_sq DAdaptAdamWState.exp_avg_sq MomoAdamState.exp_avg_sq MadgradState.grad_sum_sq
  PerElementMeanAndSumSqDiffGradsState.sum_sq_diff_grads PerElementMeanAndVarianceEMAState.variance_grads_ema
""".split()

# Weights, what weights are computed from without a learning rate between, what is multiplied rather than averaged, and
# the two of which a variance is the small difference (the first moment squared, and the second).
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
"""`State.field` of Optax's states to the kind of what they hold; False for what is to be kept as it is."""


def leaves(state: PyTree) -> Iterator[tuple[tuple[Any, ...], Any, Kind | None]]:
  """Yields the leaves of a state in order, each with its key path and its kind; None where no name tells."""
  yield from _leaves(state, (), None)


def _leaves(
  node: PyTree, path: tuple[Any, ...], kind: Kind | None
) -> Iterator[tuple[tuple[Any, ...], Any, Kind | None]]:
  if _is_state(node):
    for field in node._fields:
      inner = kind
      if _is_optax(type(node)) and not field.endswith(("state", "states")):  # those hold what others have made
        inner = KNOWN.get(f"{type(node).__name__}.{field}", "signed" if kind is None else kind)
      yield from _leaves(getattr(node, field), (*path, jax.tree_util.GetAttrKey(field)), inner)
    return
  for rest, found in jax.tree_util.tree_leaves_with_path(node, is_leaf=_is_state):
    if _is_state(found):
      yield from _leaves(found, (*path, *rest), kind)
    else:
      yield (*path, *rest), found, kind


def _is_state(x: Any) -> bool:
  return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_optax(cls: type) -> bool:
  return cls.__module__.split(".")[0] == "optax"
