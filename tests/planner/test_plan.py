"""`python -m optax_mpo plan`: what it asks, compiles, remembers and prints."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from optax_mpo._memory.gpu_memory import lower
from optax_mpo._memory.gpu_targets import TARGETS
from optax_mpo._planner import cells, command, hidden, own_step, table
from optax_mpo._planner.decoder import LM_SIZES, LMConfig, language_model
from optax_mpo._planner.remembered import Figures, Remembered, key_of
from tests.helpers import ROOT, relaxed

GIB = 2**30
main = relaxed(command.main)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache" / "optax_mpo" / "plan"


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("arguments", "message"),
  {
    "--card h900": "there is no card 'h900'. Known are h100",
    "--model llama9": "there is no model 'llama9'. Known are 125m",
    "--storages mpo-3": "there is no storage 'mpo-3'. Known are optax-f32",
    "": "--layers and --width and --heads and --hidden are missing",
    "--layers 2 --width 64 --heads 4": "--hidden are missing",
    "--layers 2 --width 64 --heads 3 --hidden 128": "width 64 does not divide into 3 heads",
    "--layers 2 --width 64 --heads 4 --hidden 128 --kv-heads 3": "4 heads do not divide into 3 groups",
    "--model 125m --layers 2": "name one",
    "--batches 0 --model 125m": "0 is not 1 or more",
    "--model 125m --utilization 2": "2.0 is not above 0 and at most 1",
    "nowhere_to_be_found:step": "nowhere_to_be_found cannot be imported",
    "json": "write module:function",
    "json:none": "the module json has no function none",
    "json:__doc__": "is a str, not a function",
  }.items(),
)
def test_bad_arguments_are_named(arguments, message, capsys):
  with pytest.raises(SystemExit) as end:
    main(["plan", *arguments.split()])
  assert end.value.code == 2
  assert message.lower() in capsys.readouterr().err.lower()


def test_sizes_change_those_of_a_model():
  args = command.parser().parse_args("plan --model llama3-8b --vocab 1000 --no-remat --tied".split())
  config, name = command.config_of(args)
  assert config == dataclasses.replace(LM_SIZES["llama3-8b"], vocab=1000, remat=False, tied=True)
  assert name == "llama3-8b"


@pytest.mark.parametrize(
  ("name", "billions"), {"llama3.2-1b": 1.24, "llama3.2-3b": 3.21, "qwen2.5-14b": 14.8, "qwen2.5-32b": 32.8}.items()
)
def test_models_have_as_many_parameters_as_published(name, billions):
  assert language_model(LM_SIZES[name], name).count / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_package_runs_as_a_module():
  done = subprocess.run([sys.executable, "-m", "optax_mpo"], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert "COMMAND" in done.stderr


# --- What is compiled, and what is remembered -------------------------------------------------------------------------


class Compiler:
  """Stands in for lowering and compiling: a step of batch b has a peak of b GiB."""

  def __init__(self, monkeypatch):
    self.compiled = []
    monkeypatch.setattr(cells, "lower", lambda fn, *args, **options: self)
    monkeypatch.setattr(cells, "compiled", self.compile)

  def row(self, batches=(1, 4, 16), held=100, asked="asked"):
    def step(batch):
      def make():
        self.key, self.batch = f"program{batch}", batch
        return None, (), [jax.ShapeDtypeStruct((held,), jnp.int8)], {}

      return cells.Step(asked and f"{asked}{batch}", make)

    return cells.Row("label", {batch: step(batch) for batch in batches})

  def compile(self, lowered, held):
    self.compiled.append(self.batch)
    return Figures(held, 7, self.batch * GIB, 3, 2, 5)


def test_batches_after_one_that_does_not_fit_are_left_out(monkeypatch):
  compiler = Compiler(monkeypatch)
  found = cells.row_of(compiler.row(), cells.Limits(2 * GIB), Remembered(None))
  assert found == {1: Figures(100, 7, GIB, 3, 2, 5), 4: Figures(100, 7, 4 * GIB, 3, 2, 5), 16: None}
  assert compiler.compiled == [1, 4]


@pytest.mark.parametrize("limits", [cells.Limits(99), cells.Limits(GIB, 6)], ids=["device", "host"])
def test_what_cannot_fit_is_not_compiled(limits, monkeypatch):
  compiler = Compiler(monkeypatch)
  monkeypatch.setattr(cells, "held_bytes", lambda tree: (100, 7))
  found = cells.row_of(compiler.row(), limits, Remembered(None))
  assert found == {1: Figures(100, 7), 4: None, 16: None}
  assert not compiler.compiled


def test_a_step_is_compiled_once(monkeypatch, cache):
  compiler, limits = Compiler(monkeypatch), cells.Limits(99 * GIB)
  first = cells.row_of(compiler.row(), limits, Remembered(cache))
  assert compiler.compiled == [1, 4, 16]
  assert cells.row_of(compiler.row(), limits, Remembered(cache)) == first
  assert cells.row_of(compiler.row(asked=""), limits, Remembered(cache)) == first  # by the program alone
  assert compiler.compiled == [1, 4, 16]
  assert cells.row_of(compiler.row(), limits, Remembered(None)) == first
  assert compiler.compiled == [1, 4, 16] * 2


def test_what_did_not_fit_is_compiled_where_there_is_more_memory(monkeypatch, cache):
  compiler = Compiler(monkeypatch)
  cells.row_of(compiler.row(), cells.Limits(99), Remembered(cache))
  found = cells.row_of(compiler.row(), cells.Limits(99 * GIB), Remembered(cache))
  assert [figures.peak for figures in found.values()] == [GIB, 4 * GIB, 16 * GIB]


def test_rows_come_in_order_and_errors_reach_the_caller(monkeypatch):
  compiler = Compiler(monkeypatch)
  rows = [dataclasses.replace(compiler.row((1,)), label=str(i)) for i in range(5)]
  assert [row.label for row, _ in cells.rows_of(rows, cells.Limits(99), Remembered(None), 2)] == list("01234")

  def fail():
    raise ValueError("no such step")

  broken = cells.Row("broken", {1: cells.Step("", fail)})
  with pytest.raises(ValueError, match="no such step"):
    list(cells.rows_of([broken, *rows], cells.Limits(99), Remembered(None), 2))


def test_what_cannot_be_read_or_written_is_not_remembered(tmp_path):
  remembered = Remembered(tmp_path)
  remembered.put("key", Figures(1, 2))
  assert remembered.get("key") == Figures(1, 2)
  (tmp_path / "key.json").write_text("{")
  assert remembered.get("key") is None
  (tmp_path / "key.json").write_text(json.dumps({"other": 1}))
  assert remembered.get("key") is None
  (tmp_path / "file").write_text("")
  Remembered(tmp_path / "file").put("key", Figures(1, 2))  # no folder can be made there


def test_keys_tell_programs_and_questions_apart():
  x = jax.ShapeDtypeStruct((8,), jnp.float32)
  y = jax.ShapeDtypeStruct((9,), jnp.float32)

  def key(fn, *args, target="h100", **options):
    return lower(fn, *args, target=target, **options).key

  def double(x):
    return x + x

  def again(x):
    return x + x

  again.__name__ = "double"
  assert key(double, x) == key(double, x) == key(again, x)  # whatever line it is on
  others = [key(double, y), key(double, x, target="h200"), key(double, x, donate_argnums=0), key(lambda x: x * 3.0, x)]
  assert len({key(double, x), *others}) == 5
  assert len({key_of(1, "a"), key_of(1, "b"), key_of(2, "a")}) == 3


# --- What is printed --------------------------------------------------------------------------------------------------


def test_transfers_are_hidden_where_computing_takes_as_long():
  card, second = TARGETS["h100"], int(63e9 * 0.8)  # what PCIe 5 moves in a second
  assert hidden.seconds(second, 5, "PCIe 5") == hidden.seconds(5, second, "PCIe 5") == pytest.approx(1)
  tokens = hidden.tokens(second, second, "PCIe 5", card, 10**9, utilization=0.5)
  assert tokens == pytest.approx(989.4e12 / 2 / 8e9, rel=1e-4)
  assert hidden.tokens(second, 0, "PCIe 5", card, 10**9, remat=False, utilization=0.5) == pytest.approx(
    tokens * 8 / 6, rel=1e-4
  )
  assert hidden.tokens(second, 0, "PCIe 4", card, 10**9, utilization=0.5) == pytest.approx(2 * tokens, rel=1e-4)
  assert {card.bus for card in TARGETS.values()} == set(hidden.BUSES)


def test_lines_say_what_fits():
  limits = cells.Limits(24 * GIB, 64 * GIB)
  made = [Figures(GIB, 0, peak * GIB) for peak in (23, 24, 25)] + [
    Figures(GIB, 65 * GIB, GIB),
    Figures(25 * GIB, 0),
    None,
  ]
  assert [table.cell(figures, limits) for figures in made] == [
    "23.0 yes",
    "24.0 tight",
    "25.0 no",
    "1.0 no host",
    "no",
    "no",
  ]
  row = dict(enumerate(made[:3], 1))
  assert table.line("label", row, limits).split() == "label 1.0 - 23.0 yes 24.0 tight 25.0 no".split()
  assert table.line("label", row, limits, "~").split() == "label 1.0 - ~23.0 yes ~24.0 tight ~25.0 no".split()
  assert table.cell(Figures(GIB, 0), limits) == "?"
  small = {1: Figures(3 * 2**20, 0, GIB // 9)}
  assert table.line("label", small, limits).split() == "label 0.0029 - 0.1 yes".split()


def test_transfers_are_printed_for_rows_that_move_something():
  none, some = {1: Figures(1, 0, 1)}, {1: Figures(1, GIB, 1, 2 * GIB, GIB, 10**9), 4: None}
  options = {"remat": True, "utilization": 0.5, "devices": 1}
  assert table.transfers({"a": none}, TARGETS["h100"], None, **options) == []
  lines = table.transfers({"a": none, "b": some}, TARGETS["h100"], None, **options)
  assert "PCIe 5*" in lines[1]
  tokens = [hidden.tokens(2 * GIB, GIB, bus, TARGETS["h100"], 10**9, utilization=0.5) for bus in hidden.BUSES]
  assert lines[2].split() == ["b", "2.0", "1.0", *(f"{n:,}" for n in tokens)]
  assert not any(line.startswith("a ") for line in lines)


def test_a_plan_without_compiling(capsys):
  """8 B parameters of 12 bytes do not fit on an A10, which is known without compiling."""
  assert main("plan --model llama3-8b --card a10 --storages optax-f32".split()) == 0
  out = capsys.readouterr().out
  assert "llama3-8b, 8.03B parameters, adamw, context 2048, on NVIDIA A10 of 22.0 GiB" in out
  assert "Optax, f32 master" in out
  assert out.count("89.7       -            no            no            no") == 2, "estimated, and then not compiled"
  assert "tight" not in out  # explained only where it is said


SIZES = "--layers 3 --width 512 --heads 4 --hidden 1024 --vocab 2048 --context 128 --batches 2 --card l4"


@pytest.mark.full
def test_a_plan_compiles_and_remembers(capsys, monkeypatch):
  arguments = ["plan", *SIZES.split(), "--storages", "mpo-16-auto", "mpo-16-host-weights"]
  assert main(arguments) == 0
  first = capsys.readouterr().out
  assert "decoder, 0.01B parameters" in first
  at_once, compiled = first.split("compiled, ")
  assert at_once.count("optax_mpo, 16 bits") == 2
  assert at_once.count("yes") == 2
  lines = [line for line in compiled.splitlines() if line.startswith("optax_mpo, 16 bits")]
  assert [line.split()[-1] for line in lines[:2]] == ["yes", "yes"]
  assert "state and layers on the host" in lines[2]  # with what crosses the bus
  monkeypatch.setattr(cells, "lower", None)  # a repeat neither traces nor compiles
  assert main(arguments) == 0
  assert capsys.readouterr().out.splitlines()[:-2] == first.splitlines()[:-2]


def make_step(batch):
  def step(w, x):
    return w - 0.1 * x.T @ (x @ w)

  w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  return jax.jit(step, donate_argnums=0), (w, jax.ShapeDtypeStruct((batch, 1024), jnp.float32))


@pytest.mark.full
def test_a_plan_of_ones_own_step(tmp_path, monkeypatch):
  row = own_step.of_function(f"{__name__}:make_step", [8, 4], 1, "l4")
  found = cells.row_of(row, cells.Limits(GIB), Remembered(tmp_path))
  assert list(found) == [4, 8]
  assert all(figures.held == 4 * 2**20 and figures.parameters == 2**20 for figures in found.values())
  monkeypatch.setattr(cells, "compiled", None)
  assert cells.row_of(row, cells.Limits(GIB), Remembered(tmp_path)) == found


def test_a_decoder_of_no_layers_is_refused():
  with pytest.raises(ValueError, match="layers has to be 1 or more"):
    LMConfig(layers=0, width=8, heads=2, hidden=8)
