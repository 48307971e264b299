"""Finds the loops of a loss function that add up losses of parts of the batch: gradient accumulation by hand.

Why: the derivative of such a loop adds up whole gradients in its carry, so that no weight is updated inside of it.
Other loops that read a weight whole need other advice.

How: by dataflow. The loop cuts the batch into its iterations, and what it makes of weights is scalars that are added up
in its carry, or stacked. So a recurrent network is none, since its iterations depend on each other. A scan over layers
with a shared weight is none, since it reads other weights layer by layer; and neither is a loss in chunks of logits,
since these are made of weights.
"""

import math
from collections.abc import Sequence

from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Atom, Operation, Program

_WEIGHT, _BATCH, _ITERATION, _SUM = 1, 2, 4, 8  # what a variable depends on; _SUM: on what is carried of weights
_CUTS = frozenset(["dynamic_slice", "gather"])


def find(program: Program, weights: Sequence[int], batch: Sequence[int]) -> dict[int, int]:
  """Returns, for each weight that such a loop reads whole, by its position, the number of parts of the batch.

  Args:
    program: the program of a loss function, without its derivative; its first output is the loss.
    weights: the inputs that are weights.
    batch: the inputs that have the batch on some axis.
  """
  bits = {v: 1 << i for i, v in enumerate(weights)} | dict.fromkeys(batch, 1 << len(weights))
  known = dataflow.dependencies(program, [bits.get(v, 0) for v in program.inputs])
  every, found = (1 << len(weights)) - 1, {}
  for operation in dataflow.slice_of(program, program.outputs[:1], frozenset()):
    if operation.name != "scan":
      continue
    given = [known[a] if isinstance(a, int) else 0 for a in operation.inputs]
    kinds = [(_WEIGHT if b & every else 0) | (_BATCH if b > every else 0) for b in given]
    length = jax_forms.scan_options(operation)["length"]
    if length > 1 and _adds_up(operation, kinds):
      read = dataflow.union(given) & every
      found.update({i: length for i in range(len(weights)) if read >> i & 1 and i not in found})
  return found


def _adds_up(operation: Operation, given: list[int]) -> bool:
  """Whether a scan adds up what it makes of weights and parts of the batch; `given` says what its operands are."""
  scan = jax_forms.read_scan(operation)
  if scan is None:
    return False
  consts, carry, body = scan
  scanned = [bits | _ITERATION for bits in given[consts + carry :]]
  carried = [bits | _ITERATION for bits in given[consts : consts + carry]]
  if any(bits & _WEIGHT for bits in scanned):
    return False
  while True:
    known = dataflow.dependencies(body, [*given[:consts], *carried, *scanned])
    found = dataflow.output_bits(body, known)
    grown = [a | b | (_SUM if (a | b) & _WEIGHT else 0) for a, b in zip(carried, found, strict=False)]
    if grown == carried:
      break
    carried = grown
  results = [(a, bits) for a, bits in zip(body.outputs, found, strict=True) if bits & _WEIGHT]
  if not results or any(math.prod(body.aval(a).shape) > 1 for a, _ in results):
    return False
  own = {body.inputs[consts + k]: body.outputs[k] for k in range(carry) if carried[k] & _SUM}
  stacked = found[carry:]
  if any(bits & _SUM for bits in stacked) or not all(_is_sum(body, a, v, known) for v, a in own.items()):
    return False
  return any(bits & _BATCH for bits in scanned) or any(_cuts(o, known) for o in body.operations)


def _is_sum(body: Program, atom: Atom, carried: int, known: dict[int, int]) -> bool:
  """Whether a new carry is the old one and something that does not depend on it."""
  if atom == carried:
    return True
  made = body.makers.get(atom) if isinstance(atom, int) else None
  if made is None:
    return False
  name, inputs = body.operations[made].name, body.operations[made].inputs
  if name == "convert_element_type":
    return _is_sum(body, inputs[0], carried, known)
  if name not in ("add", "add_any"):
    return False
  sums = [a for a in inputs if isinstance(a, int) and known[a] & _SUM]
  return len(sums) == 1 and _is_sum(body, sums[0], carried, known)


def _cuts(operation: Operation, known: dict[int, int]) -> bool:
  """Whether an operation takes another part of the batch in each iteration."""
  if operation.name not in _CUTS:
    return False
  array, *at = (known[a] if isinstance(a, int) else 0 for a in operation.inputs)
  return bool(array & _BATCH and not array & _WEIGHT and any(bits & _ITERATION for bits in at))
