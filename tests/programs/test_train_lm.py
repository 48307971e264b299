"""examples/train_lm.py: every storage mode end to end on a tiny model, fp32 against mpo16, flags and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import lm_config
import lm_data
import lm_mesh
import lm_model
import lm_report
import numpy as np
import pytest
import train_lm

from tests.helpers import ROOT

pytestmark = pytest.mark.full

STEPS, WIDTH, LAYERS, HIDDEN = 25, 32, 1, 96
TINY = ["--layers", str(LAYERS), "--width", str(WIDTH), "--heads", "2", "--context", "16", "--batch", "4"]
TINY += ["--eval-batches", "2", "--learning-rate", "1e-2"]

PARAMETERS = 2 * 256 * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN + 2 * WIDTH) + WIDTH
SCALARS = 4 + 4  # bytes: AdamW's step count and the schedule's

# mode: (weights, master, compensation, moments), in bytes per parameter
BYTES = {
  "fp32": (0, 4, 0, 8),
  "bf16": (2, 0, 0, 4),
  "mpo16": (2, 0, 2, 8),
  "mpo8": (2, 0, 1, 8),
  "mpo4": (2, 0, 0.5, 8),
}


def train(folder, *flags):
  assert train_lm.main([*TINY, "--steps", str(STEPS), "--output-dir", str(folder), *flags]) == 0
  return json.loads((folder / "results.json").read_text())["runs"]


def table_rows(text):
  """The cells of the final table, by storage mode."""
  lines = text[text.index("tokens") :].splitlines()
  return {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] and line.split()[0] in train_lm.MODES}


def assert_png(path):
  assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
  """The runs of `--compare`, made once, their folder and the printed text."""
  folder = tmp_path_factory.mktemp("compare")
  with pytest.MonkeyPatch.context() as patch, open(folder / "out.txt", "w") as out:
    patch.setattr(sys, "stdout", out)
    runs = train(folder, "--compare")
  return runs, folder, (folder / "out.txt").read_text()


def test_compare_makes_one_table_one_plot_and_one_json(comparison):
  runs, folder, out = comparison
  assert list(runs) == list(train_lm.MODES)
  rows = table_rows(out[out.index("Bytes per parameter, ") :])
  assert list(rows) == list(train_lm.MODES)
  assert rows["mpo16"][:4] == ["2.00", "2.00", "8.00", "12.00"]
  assert rows["fp32"][:4] == ["-", "4.00", "8.00", "12.00"]
  assert rows["fp32"][5] == "-"
  assert rows["mpo16"][5] == "equal"
  # The table has four decimals, so its error is at most half of the last one.
  assert float(rows["bf16"][5]) == pytest.approx(runs["bf16"]["train_loss"] - runs["fp32"]["train_loss"], abs=5e-5)
  assert_png(folder / "loss.png")


def test_fp32_and_mpo16_have_the_same_losses_bit_for_bit(comparison):
  runs, _, _ = comparison
  assert len(runs["fp32"]["losses"]) == STEPS
  assert runs["mpo16"]["losses"] == runs["fp32"]["losses"]
  assert runs["mpo16"]["validation_loss"] == runs["fp32"]["validation_loss"]


SCANNED = ["--scan", "--remat", "--layers", "3"]


@pytest.mark.parametrize(
  ("flags", "clip"),
  [
    pytest.param([], "global", id="unrolled-global"),
    pytest.param(SCANNED, "element", id="scanned-element"),
    pytest.param([], "element", id="unrolled-element", marks=pytest.mark.slow),
    pytest.param(SCANNED, "global", id="scanned-global", marks=pytest.mark.slow),
  ],
)
def test_fused_runs_have_the_same_losses_bit_for_bit(tmp_path, capsys, flags, clip):
  runs = {}
  for fused in lm_config.FUSED:
    if (fused, clip) != ("layer", "global"):
      runs[fused] = train(tmp_path / fused, "--fused", fused, "--clip", clip, *flags)["mpo16"]
      gradients = runs[fused]["gradient_bytes_per_parameter"]
      assert table_rows(capsys.readouterr().out)["mpo16"][-1] == f"{gradients:.2f}"
      assert gradients == 2 if fused == "off" else gradients < (0.7 if fused == "auto" else 1.5)
  for fused, run in runs.items():
    if (clip, fused) == ("global", "auto"):
      # The norm of a stack is summed layer by layer. JAX 0.12's XLA also sums other leaves in an order that depends on
      # the program. So the norm's last bit may differ; with unrolled layers, not before the sixth step.
      assert flags or run["losses"][:5] == runs["off"]["losses"][:5]
      np.testing.assert_allclose(run["losses"], runs["off"]["losses"], rtol=1e-2)
    else:
      assert run["losses"] == runs["off"]["losses"], fused
      assert run["validation_loss"] == runs["off"]["validation_loss"], fused


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--fused", "layer", "--storage", "fp32"], "take another --storage"),
    (["--fused", "layer", "--clip", "global"], "use --clip element or --clip none, or --fused auto"),
  ],
)
def test_fused_layers_refuse_what_they_cannot_do(flags, message, capsys):
  with pytest.raises(SystemExit) as error:
    train_lm.main(flags)
  assert error.value.code == 2
  assert message in capsys.readouterr().err


@pytest.mark.full
def test_a_run_with_state_and_weights_on_the_host_has_the_same_losses(tmp_path):
  flags = ["--width", "256", "--scan"]
  device = train(tmp_path / "device", *flags)["mpo16"]
  there = train(tmp_path / "host", *flags, "--state-memory", "pinned_host", "--weights-memory", "pinned_host")["mpo16"]
  assert there["losses"] == device["losses"]
  assert there["validation_loss"] == device["validation_loss"]


def test_the_other_modes_differ(comparison):
  runs, _, _ = comparison
  # bf16 starts from the same weights. mpo8 and mpo4 first round to 24 or 20 bits, so a few weights round differently.
  assert runs["bf16"]["losses"][0] == runs["fp32"]["losses"][0]
  for mode in ("bf16", "mpo8", "mpo4", "compact"):
    assert runs[mode]["losses"] != runs["fp32"]["losses"], mode


def test_bytes_per_parameter_are_what_arithmetic_says(comparison):
  for mode, (weights, master, compensation, moments) in BYTES.items():
    run = comparison[0][mode]
    assert run["parameters"] == PARAMETERS
    got = {part: round(count * PARAMETERS) for part, count in run["bytes_per_parameter"].items()}
    assert got == {
      "weights": weights * PARAMETERS,
      "master": master * PARAMETERS,
      "compensation": compensation * PARAMETERS,
      "optimizer": moments * PARAMETERS + SCALARS,
      "total": (weights + master + compensation + moments) * PARAMETERS + SCALARS,
    }, mode


def test_compact_holds_two_moments_of_a_byte_and_their_scales():
  """Uses the default size: small leaves keep f32 moments, and the tiny model above has only small leaves."""
  config = train_lm.Config()
  model = lm_model.Transformer(config.layers, config.width, config.heads)
  storage = train_lm.make_storage("compact", model, train_lm.make_optimizer(config), "auto")
  shapes = jax.eval_shape(lambda key: storage.init(lm_model.init_params(model, key)), jax.random.key(0))
  held = lm_report.count_held(*shapes)
  assert (held.weights, held.compensation) == (2, 1)
  assert 2 < held.optimizer < 2.2


def test_every_mode_learns(comparison):
  for mode, run in comparison[0].items():
    assert np.isfinite(run["losses"]).all(), mode
    # A uniform guess has log(256) = 5.5 nats. These 25 steps end near 3.6, and at 3.2 on held-out files.
    assert run["losses"][0] > 5, mode
    assert run["train_loss"] < 4.5, mode
    assert run["validation_loss"] < 4.5, mode
    # Both divide by log(2), so they agree up to the last bit.
    assert run["validation_bits_per_byte"] == pytest.approx(run["validation_loss"] / np.log(2), rel=1e-12), mode
    assert run["tokens_per_second"] > 0, mode


def test_one_mode_alone_gives_what_it_gives_in_a_comparison(comparison, tmp_path, capsys):
  folder = tmp_path / "made" / "anew"
  runs = train(folder, "--storage", "bf16")
  assert list(runs) == ["bf16"]
  assert runs["bf16"]["losses"] == comparison[0]["bf16"]["losses"]
  out = capsys.readouterr().out
  assert list(table_rows(out[out.index("Bytes per parameter, ") :])) == ["bf16"]
  assert f"{STEPS}/{STEPS} loss" in out
  assert_png(folder / "loss.png")


def test_fp32_and_mpo16_are_the_same_with_scan_and_remat(tmp_path, monkeypatch):
  # Compiling takes nearly all the time here, and half of it is LLVM's optimisations. The test above keeps them.
  options = {**train_lm.COMPILER_OPTIONS, "xla_backend_optimization_level": 0}
  monkeypatch.setattr(train_lm, "COMPILER_OPTIONS", options)
  runs = train(tmp_path, "--compare", "mpo16", "fp32", "--scan", "--remat", "--layers", "2", "--steps", "10")
  assert list(runs) == ["mpo16", "fp32"]
  assert len(runs["fp32"]["losses"]) == 10
  assert runs["mpo16"]["losses"] == runs["fp32"]["losses"]


def test_default_mode_is_mpo16():
  assert train_lm.Config().storage == "mpo16"
  train_lm.Config().check()


BAD_FLAGS = {
  "heads": (["--width", "36", "--heads", "4"], "make it a multiple of 8, such as 40, or change --heads"),
  "odd_heads": (["--width", "28", "--heads", "4"], "such as 32"),
  "long_context": (["--context", "99999999"], "so make it"),
  "storage": (["--storage", "int8"], "choose from"),
  "compare": (["--compare", "fp32", "int8"], "choose from"),
  "both": (["--storage", "fp32", "--compare"], "not allowed with"),
  "steps": (["--steps", "0"], "--steps is 0: make it 1 or more"),
  "eval_batches": (["--eval-batches", "-1"], "--eval-batches is -1: make it 1 or more"),
  "warmup": (["--warmup", "50", "--steps", "50"], "less than --steps, 50"),
  "learning_rate": (["--learning-rate", "nan"], "greater than 0"),
  "weight_decay": (["--weight-decay", "-0.1"], "make it 0 or greater"),
  "state_memory": (["--state-memory", "pinned_host", "--fused", "off"], "use --fused auto"),
  "seed": (["--seed", "-1"], "make it 0 or more"),
  "large_seed": (["--seed", "99999999999999999999"], "less than 2^32"),
  "number": (["--layers", "two"], "invalid int value"),
  "unknown": (["--fast"], "unrecognized arguments: --fast"),
  "folder": (["--output-dir", __file__], "name another folder"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_one_line_that_says_what_to_do(name, capsys):
  flags, says = BAD_FLAGS[name]
  with pytest.raises(SystemExit) as exit_info:
    train_lm.main([*TINY, *flags])
  assert exit_info.value.code == 2
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err.startswith("train_lm.py: error: ")
  assert captured.err.count("\n") == 1
  assert says in captured.err


def test_a_python_without_sources_is_an_error(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(lm_data.sysconfig, "get_path", lambda name: str(tmp_path))
  with pytest.raises(SystemExit):
    train_lm.main(TINY)
  assert "no standard library sources" in capsys.readouterr().err


def read_until(terminal, pattern, seconds):
  """Reads a pseudo-terminal until `pattern` appears, or, with None, until the other end is closed."""
  text, deadline = "", time.monotonic() + seconds
  while pattern is None or not re.search(pattern, text):
    assert time.monotonic() < deadline, text
    try:
      chunk = os.read(terminal, 4096)
    except OSError:  # EIO: on Linux, the other end is closed
      chunk = b""
    if not chunk:
      assert pattern is None, text
      break
    text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chunk.decode(errors="replace"))  # removes colours and cursor moves
  return text


def test_ctrl_c_ends_with_table_and_plot(tmp_path):
  terminal, other_end = os.openpty()  # a terminal, so that a progress bar shows when training runs
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "120", "TERM": "xterm"}
  command = [sys.executable, str(ROOT / "examples/train_lm.py"), *TINY, "--steps", "10000000", "--output-dir", "runs"]
  process = subprocess.Popen(
    command, stdout=other_end, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
  )
  os.close(other_end)
  try:
    read_until(terminal, r"[1-9]\d*/10000000 loss \d", 120)
    process.send_signal(signal.SIGINT)
    out = read_until(terminal, None, 120)
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()
    process.wait()
    os.close(terminal)
  assert process.returncode == train_lm.INTERRUPTED, err
  assert "Traceback" not in out + err
  assert re.search(r"mpo16 \(\d+ of 10000000 steps\) +2\.00 +2\.00 +8\.00 +12\.00", out), out
  run = json.loads((tmp_path / "runs/results.json").read_text())["runs"]["mpo16"]
  assert run["steps"] == len(run["losses"]) > 0
  assert run["validation_loss"] > 0
  assert_png(tmp_path / "runs/loss.png")


def make_run(**fields):
  held = lm_report.Held(2.0, 0.0, 2.0, 8.0)
  return lm_report.Run("mpo16", 10, held, np.array([5.0, 4.0], np.float32), 50, 100.0)._replace(**fields)


def test_a_second_ctrl_c_ends_the_evaluation_and_a_third_everything(tmp_path):
  interrupts = train_lm.Interrupts()
  with interrupts.counted():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert interrupts.count == 2
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) != interrupts.handle

  text = np.zeros(100, np.uint8)
  config = train_lm.Config(context=16, batch=1, eval_batches=1)
  placement = lm_mesh.Placement(config)
  assert np.isnan(train_lm.evaluate(config, text, lambda weights, batch: jnp.float32(1), None, placement, interrupts))


def test_a_run_without_evaluation_is_reported(tmp_path):
  runs = [make_run(), make_run(mode="fp32", losses=np.array([5.0], np.float32))]
  lm_report.make_table(runs)
  lm_report.draw_losses(tmp_path / "loss.png", runs)
  lm_report.write_json(tmp_path / "results.json", {}, runs)
  assert json.loads((tmp_path / "results.json").read_text())["runs"]["mpo16"]["validation_loss"] is None


def test_bytes_are_counted_by_the_width_of_the_dtype():
  tree = {"a": jnp.zeros(6, jnp.uint4), "b": jnp.zeros((2, 2), jnp.bfloat16), "c": (jnp.zeros((), jnp.int32), None)}
  assert lm_report.count_bytes(tree) == 3 + 8 + 4


def test_corpus_is_split_by_files_in_sorted_order(tmp_path):
  for i in range(45):
    (tmp_path / f"m{i:02}.py").write_bytes(b"%02d" % i)
  for left_out in ("site-packages/x.py", "pkg/tests/x.py", "notes.txt"):
    (tmp_path / left_out).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left_out).write_bytes(b"left out")
  corpus = lm_data.load_corpus(tmp_path)
  assert corpus.validation.tobytes() == b"00\x0020\x0040\x00"
  assert (corpus.train_files, corpus.validation_files) == (42, 3)
  assert corpus.train.tobytes().startswith(b"01\x0002\x00")
  assert len(corpus.train) == 42 * 3


def test_batches_are_a_function_of_seed_and_step_and_reach_both_ends():
  text = np.arange(20, dtype=np.uint8)
  first = lm_data.training_batch(text, 200, 16, seed=1, step=2)
  np.testing.assert_array_equal(first, lm_data.training_batch(text, 200, 16, seed=1, step=2))
  assert not np.array_equal(first, lm_data.training_batch(text, 200, 16, seed=1, step=3))
  assert set(first[:, 0]) == {0, 1, 2, 3}
  np.testing.assert_array_equal(first, first[:, :1] + np.arange(17))
  held_out = np.concatenate(lm_data.validation_batches(text, 2, 2, 16))
  np.testing.assert_array_equal(held_out[:, 0], [0, 1, 2, 3])
  assert held_out[:, -1].max() == 19


def test_unigram_bits_of_even_bytes():
  text = np.tile(np.arange(256, dtype=np.uint8), 3)
  assert lm_data.unigram_bits(lm_data.Corpus(text, text, 1, 1)) == 8


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_model_sees_only_the_past(scan):
  model = lm_model.Transformer(layers=2, width=16, heads=2, scan=scan)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), jnp.bfloat16), shapes)
  apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
  tokens = jnp.arange(8)[None]
  logits, other = apply(tokens), apply(tokens.at[0, 5].set(99))
  assert logits.dtype == jnp.bfloat16
  np.testing.assert_array_equal(logits[:, :5], other[:, :5])
  assert not np.array_equal(logits[:, 5:], other[:, 5:])
