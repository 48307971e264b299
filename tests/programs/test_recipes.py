"""The recipes run, and with 16 bits they train as what they were before trains with f32 masters, bit for bit.

What they were before stands in examples/recipes/plain. There a loss casts f32 weights to bf16 as its framework does,
with halves to even. For equal bits it casts them with `mpo.cast` here.
"""

import inspect
import json
import re
import runpy

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mpo as mpo
from benchmarks import recipes
from tests.helpers import ROOT, assert_same_bits, quick_jit

pytestmark = pytest.mark.usefixtures("default_promotion")  # JAX's defaults, as for those who write such trainers

NAMES = sorted({case.recipe or name for name, case in recipes.CASES.items()})
STEPS = 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.full
@pytest.mark.few(0, full=1)
def test_a_recipe_runs_and_its_loss_falls(name, capsys):
  path = ROOT / f"examples/recipes/{name}.py"
  assert len(path.read_text().splitlines()) <= 80
  runpy.run_path(str(path), run_name="__main__")
  losses = [float(loss) for loss in re.findall(r"loss:? (\d+\.\d+)", capsys.readouterr().out)]
  assert len(losses) == 3
  assert losses[-1] < 0.8 * losses[0]


def trained(module):
  """Trains with `step(state, batch)`; returns the last state and the losses."""
  step, state = module.make(config := module.Config())
  step, losses = quick_jit(inspect.unwrap(step)), []
  for i in range(STEPS):
    state, loss = step(state, module.make_batch(config, i))
    losses.append(loss)
  return state, losses


def trained_in_nnx(module):
  """Trains with `step(model, optimizer, batch)`, which changes its arguments; returns them and the losses."""
  step, state = module.make(config := module.Config())
  graphdef, arrays = nnx.split(state)

  def pure(arrays, batch):
    state = nnx.merge(graphdef, arrays)
    loss = inspect.unwrap(step)(*state, batch)
    return nnx.state(state), loss

  pure, losses = quick_jit(pure), []
  for i in range(STEPS):
    arrays, loss = pure(arrays, module.make_batch(config, i))
    losses.append(loss)
  return nnx.merge(graphdef, arrays), losses


def trained_in_equinox(module):
  """Trains with `step(batch, model, opt_state)`; returns the last two and the losses."""
  step, state = module.make(config := module.Config())
  arrays, static = eqx.partition(state, eqx.is_array)

  def pure(arrays, batch):
    loss, *state = inspect.unwrap(step)(batch, *eqx.combine(arrays, static))
    return eqx.filter(tuple(state), eqx.is_array), loss

  pure, losses = quick_jit(pure), []
  for i in range(STEPS):
    arrays, loss = pure(arrays, module.make_batch(config, i))
    losses.append(loss)
  return arrays, losses


@pytest.fixture
def with_cast(monkeypatch):
  """Losses of f32 weights read them through `mpo.cast`."""
  of_jax, of_equinox = jax.value_and_grad, eqx.filter_value_and_grad

  def in_jax(fun, **options):
    return of_jax(lambda params, *args: fun(mpo.cast(params), *args), **options)

  def in_nnx(fun, argnums):
    def run(model, *args):
      graphdef, trained, rest = nnx.split(model, argnums.filter, ...)

      def low(trained, *args):
        variables = jax.tree.map(lambda x: x, rest)  # NNX wants new ones where a gradient is traced
        return fun(nnx.merge(graphdef, mpo.cast(trained), variables), *args)

      return of_jax(low)(trained, *args)

    return run

  def in_equinox(fun):
    def low(model, *args):
      arrays, static = eqx.partition(model, eqx.is_inexact_array)
      return fun(eqx.combine(mpo.cast(arrays), static), *args)

    return of_equinox(low)

  monkeypatch.setattr(jax, "value_and_grad", in_jax)
  monkeypatch.setattr(nnx, "value_and_grad", in_nnx)
  monkeypatch.setattr(eqx, "filter_value_and_grad", in_equinox)
  yield
  monkeypatch.undo()


def params_of(model, wrt=nnx.Param):
  return nnx.as_pure(nnx.state(model, wrt))


# How each is trained, the f32 weights of the state before, and those of the recipe.
STATES = {
  "big_vision_vit": (trained, lambda s: s["params"], lambda s: mpo.master_params(s["params"], s["opt"])),
  "openpi_nnx": (
    trained,
    lambda s: nnx.as_pure((nnx.filter_state(s.params, plain_openpi().TRAINABLE), s.ema_params)),
    lambda s: nnx.as_pure(
      (mpo.master_params(nnx.filter_state(s.params, plain_openpi().TRAINABLE), s.opt_state), s.ema_params)
    ),
  ),
  "tunix_nnx": (
    trained_in_nnx,
    lambda s: params_of(s[0], nnx.LoRAParam),
    lambda s: s[1].masters(s[0]),
  ),
  "equinox_mlp": (
    trained_in_equinox,
    lambda s: jax.tree.leaves(s[0]),
    lambda s: jax.tree.leaves(mpo.master_params(*s)),
  ),
  "haiku_mlp": (
    trained,
    lambda s: (s.params, s.state),
    lambda s: (mpo.master_params(s.params, s.opt_state), s.state),
  ),
  "easydel_state": (
    trained,
    lambda s: nnx.as_pure(s.graphstate),
    lambda s: nnx.as_pure(mpo.master_params(s.graphstate, s.opt_state)),
  ),
}


def plain_openpi():
  return recipes.load("openpi_nnx", plain=True)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.full
@pytest.mark.few(0, full=3)
def test_a_recipe_equals_training_with_f32_masters(name, with_cast):
  train, before, after = STATES[name]
  want, want_losses = train(recipes.load(name, plain=True))
  got, losses = train(recipes.load(name))
  assert_same_bits(after(got), before(want))
  if name == "big_vision_vit":  # its norms are summed up in another order
    assert [x["training_loss"] for x in losses] == [x["training_loss"] for x in want_losses]
    for one, other in zip(losses, want_losses, strict=True):
      assert jax.tree.map(float, one) == pytest.approx(jax.tree.map(float, other), rel=1e-4)
  else:
    assert_same_bits(losses, want_losses)


@pytest.mark.full
def test_the_recipe_with_microbatches_trains_as_with_f32_masters():
  """Not bit for bit: each part is a mean here, and a sum there, and the norm over stacks may differ in the last bit."""
  (want, before), (got, after) = (trained(recipes.load("maxtext_linen", plain)) for plain in (True, False))
  for one, other in zip(after, before, strict=True):
    assert jax.tree.map(float, one) == pytest.approx(jax.tree.map(float, other), rel=2e-3)
  for one, other in zip(jax.tree.leaves(got.masters()), jax.tree.leaves(want.params), strict=True):
    np.testing.assert_allclose(one, other, atol=3e-3)  # three steps of AdamW at a rate of at most 2e-3


@pytest.mark.full
def test_keras_equals_training_with_f32_masters():
  """Against the ordinary step of Optax for the loss of the same Keras model."""
  module = recipes.load("keras_fit")
  model = module.make(config := module.Config())
  masters, tx = [v.value for v in module.make_model(config, "float32").trainable_variables], optax.adamw(3e-3)
  model.optimizer.build(model.trainable_variables)
  groups = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables
  state = tuple([v.value for v in group] for group in groups)
  _, others, slots, metrics = state

  def loss_fn(weights, x, y):
    options = {"training": True, "optimizer_variables": slots}
    return model.compute_loss_and_updates(mpo.cast(weights), others, metrics, x, y, None, **options)[0]

  def ordinary(weights, opt_state, batch):
    updates, opt_state = tx.update(jax.grad(loss_fn)(weights, *batch), opt_state, weights)
    return optax.apply_updates(weights, updates), opt_state

  ordinary, step, opt_state = quick_jit(ordinary), quick_jit(model.train_step), tx.init(masters)
  for _ in range(STEPS):
    batch = module.make_data(config, 1)
    masters, opt_state = ordinary(masters, opt_state, batch)
    _, state = step(state, batch)
  optimizer = model.optimizer
  got = mpo.master_params(list(state[0]), optimizer.treedef.unflatten(state[2][optimizer.own :]))
  assert_same_bits(got, masters)


def test_the_table_is_that_of_the_committed_json():
  report = json.loads((ROOT / "benchmarks/results/recipes.json").read_text())
  assert report["sizes"] == {name: case.sizes for name, case in recipes.CASES.items()}
  page = (ROOT / "docs/recipes.md").read_text().split("<!-- benchmarks/results/recipes.json -->\n")[1]
  assert page.split("\n\n")[0] == recipes.table(report["rows"])
  peaks = {(row["recipe"], row["way"]): row["total_bytes"] for row in report["rows"]}
  assert len(peaks) >= 18
  for name, way in peaks:
    if way == "exact":  # as before where nothing is released
      assert peaks[name, "exact"] <= 1.01 * peaks[name, "before"], name
    if way == "compact":
      assert peaks[name, "compact"] <= peaks[name, "exact"], name


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_what_a_recipe_changes(name):
  page = (ROOT / "docs/recipes.md").read_text()
  assert f"(../examples/recipes/{name}.py)" in page
  diff = "\n".join(recipes.changes(name))
  assert f"```diff\n{diff}\n```" in page
