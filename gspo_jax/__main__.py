"""python -m gspo_jax: the same as gspo-jax."""

import sys

from gspo_jax.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
