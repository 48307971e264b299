"""Updates a large weight a few rows at a time, where its state is in host memory.

Why: a leaf outside of scans, such as an embedding, or a leaf of one layer, is fetched whole with all of its state: for
AdamW 10 bytes per parameter, and as much again for the new values.

How: rows are to the leaf what layers are to a stack. So `layered` makes the update of some rows from that of the leaf,
if the update keeps rows apart, and the rows become a `Rest` of the plan: layers whose gradients no scan makes. Over
several devices a leaf stays whole: where its rows are split over them, XLA gathers all of it for each group of rows.
"""

import math

import jax

from optax_mpo._core import host, types
from optax_mpo._program.entries import Entries, NotSeparableError
from optax_mpo._program.program import Program
from optax_mpo._stepping.layered import layer_step
from optax_mpo._stepping.plan import Released, Rest, constant
from optax_mpo._stepping.site import Site, Values

_ELEMENTS = 2**22  # the most elements of a weight that are fetched at a time: 40 MB of AdamW's state
ELEMENTS_OF_LAYER = 2**26
"""Likewise in a scan. XLA fetches the state of a whole leaf while the gradient of the leaf before is computed, but not
that of rows: their loop begins when the gradient is complete."""


def rest_of(program: Program, site: Site, index: int, in_scan: bool) -> tuple[Rest | None, str]:
  """Returns how a site is updated by rows; or None where it need not be, or cannot be, with the reason."""
  step, limit = site.step, ELEMENTS_OF_LAYER if in_scan else _ELEMENTS
  devices = max((state.sharding.mesh.size for state in step.states if host.is_on_host(state)), default=0)
  if not devices or not step.params or step.grads[0].size <= limit * devices:
    return None, ""
  grad, *others = step.grads
  size = _most_rows(grad, limit)
  if devices > 1:
    why = "over several devices each one fetches its part, since the rows may be split over the devices"
  elif others:
    why = "several leaves depend on each other"
  elif not size:
    why = f"{grad.shape[0]} rows do not divide into equal parts of a fitting size: pad them"
  else:
    try:
      return _rest(program, site, index, size), ""
    except NotSeparableError as error:
      why = str(error)
  return None, f"its state is fetched whole: {why}"


def _most_rows(grad: jax.ShapeDtypeStruct, limit: int) -> int:
  """The most rows that divide an array and have at most `limit` elements, but not far fewer; 0 if none do."""
  count, most = grad.shape[0], max(1, limit // math.prod(grad.shape[1:]))
  return next((n for n in range(most, most // 16, -1) if count % n == 0 and n < count), 0)


def _rest(program: Program, site: Site, index: int, size: int) -> Rest:
  (grad,), count = site.step.grads, site.step.grads[0].shape[0] // size
  rows = types.resized(grad, 0, size)
  stack = jax.ShapeDtypeStruct((count, *rows.shape), rows.dtype)

  def joined(stacks: Values, _: Values) -> list[jax.Array]:
    return [stacks[0].reshape(grad.shape)]

  layered = layer_step(site.step, joined, [stack], [], count)
  inner = Site(site.leaves, (), tuple(() for _ in site.params), layered.step)
  (source,) = site.grads
  fill = constant(program, source)
  sources = {source: Entries(0, 0, size, size)} if isinstance(source, int) and fill is None else {}
  return Rest(Released(site, inner, (), [], layered, index), sources, fill)
