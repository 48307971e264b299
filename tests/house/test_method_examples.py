"""Examples in the docstrings of methods run. pytest finds those of functions and classes alone.

Public classes name `optax_mpo` or `optax_mpo.flax` as their module, so that pickles do not depend on the folders. That
is why the finder of examples leaves out their methods, which are defined elsewhere.
"""

import doctest
import inspect

import pytest

import optax_mpo
import optax_mpo.checkpoint
import optax_mpo.export
import optax_mpo.flax

CLASSES = {
  value
  for module in (optax_mpo, optax_mpo.flax, optax_mpo.checkpoint, optax_mpo.export)
  for value in vars(module).values()
  if inspect.isclass(value) and value.__module__.startswith("optax_mpo")
}
METHODS = {
  f"{cls.__name__}.{name}": getattr(cls, name)
  for cls in sorted(CLASSES, key=lambda cls: cls.__name__)
  for name, member in vars(cls).items()
  if ">>>" in (getattr(member, "__doc__", None) or "") and not inspect.isclass(member)
}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_runs(name):
  method = METHODS[name]
  (example,) = doctest.DocTestFinder(recurse=False).find(method, name, globs={})
  runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
  assert runner.run(example).attempted
  assert runner.failures == 0


def test_there_are_some():
  assert {"TrainState.from_flax", "Optimizer.update"} <= METHODS.keys()
