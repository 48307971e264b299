"""`python -m optax_mpo`: the command line. `python -m optax_mpo plan --help` says what it can plan."""

import sys

from optax_mpo._planner.command import main

if __name__ == "__main__":
  sys.exit(main())
