"""The text of a plan: a line for each storage, and what its transfers cost."""

from collections.abc import Mapping, Sequence

from optax_mpo._memory.gpu_targets import Target
from optax_mpo._planner import hidden
from optax_mpo._planner.cells import Limits
from optax_mpo._planner.remembered import Figures

GIB = 2**30
TIGHT = "tight"
_MARGIN = GIB  # what CUDA's context and libraries may take
_LABEL = 55

Cells = Mapping[int, Figures | None]


def gib(size: int) -> str:
  """Bytes in GiB, with one decimal place; with two digits below 0.1 GiB."""
  return f"{size / GIB:.1f}" if not 0 < size / GIB < 0.1 else f"{size / GIB:.2g}"


def head(batches: Sequence[int]) -> str:
  """The head of the table. A batch of 0 stands for a step with a batch of its own."""
  columns = "".join(f"{f'batch {batch}' if batch else 'peak':>14}" for batch in batches)
  return f"{'GiB':{_LABEL}}{'persists':>9}{'host':>8}{columns}"


def line(label: str, cells: Cells, limits: Limits, about: str = "") -> str:
  """One storage: what persists, what the host needs, and for each batch size the peak and whether it fits.

  Args:
    label: its name.
    cells: its figures.
    limits: the memory that there is.
    about: a sign before peaks that are estimated.
  """
  first = next(figures for figures in cells.values() if figures)
  host = gib(first.host) if first.host else "-"
  columns = "".join(f"{cell(figures, limits, about):>14}" for figures in cells.values())
  return f"{label:{_LABEL}}{gib(first.held):>9}{host:>8}{columns}"


def cell(figures: Figures | None, limits: Limits, about: str = "") -> str:
  """A peak, and whether it fits. A question mark if it is not known."""
  if figures is None or figures.held > limits.device:
    return "no"
  if figures.peak is None:
    return "?" if limits.fit_on_host(figures) else "no host"
  if not limits.fit(figures):
    verdict = "no" if figures.peak > limits.device else "no host"
  else:
    verdict = "yes" if figures.peak + _MARGIN <= limits.device else TIGHT
  return f"{about}{gib(figures.peak)} {verdict}"


def transfers(
  rows: dict[str, Cells], card: Target, parameters: int | None, *, remat: bool, utilization: float, devices: int
) -> list[str]:
  """What crosses the bus in a step, and from how many tokens that is hidden; no lines if nothing does.

  Args:
    rows: the cells of each storage.
    card: the card, with its speed and bus.
    parameters: how many take part in products; None for those of the model, as far as they are known.
    remat: whether layers are recomputed.
    utilization: the fraction of the card's speed that the step reaches.
    devices: how many cards there are. Bytes are those of one, tokens those of all.
  """
  moved = {label: _last(cells) for label, cells in rows.items()}
  if not any(figures and figures.to_device + figures.to_host for figures in moved.values()):
    return []
  buses = "".join(f"{bus + ('*' if bus == card.bus else ''):>14}" for bus in hidden.BUSES)
  lines = ["", f"{'GiB across the bus in a step; tokens that hide it':{_LABEL}}{'to card':>9}{'to host':>8}{buses}"]
  for label, figures in moved.items():
    if not figures or not figures.to_device + figures.to_host:
      continue
    count = parameters or figures.parameters
    columns = ""
    for bus in hidden.BUSES:
      if count is None:
        text = f"{hidden.seconds(figures.to_device, figures.to_host, bus):.2f} s"
      else:
        tokens = hidden.tokens(
          figures.to_device, figures.to_host, bus, card, count, remat=remat, utilization=utilization
        )
        text = f"{devices * tokens:,}"
      columns += f"{text:>14}"
    lines.append(f"{label:{_LABEL}}{gib(figures.to_device):>9}{gib(figures.to_host):>8}{columns}")
  lines += [
    f"* the bus of this card. Computed, not measured: with {utilization:.0%} of the card's speed and "
    f"{hidden.REACHED:.0%} of the bus's,",
    "  computing takes as long as moving from so many tokens per step on (docs/offload.md).",
  ]
  return lines


def _last(cells: Cells) -> Figures | None:
  """The figures of the largest batch that was compiled."""
  return next((figures for figures in reversed(list(cells.values())) if figures and figures.peak is not None), None)
