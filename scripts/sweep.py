"""python scripts/sweep.py EXPERIMENT.yaml [section.key=value ...]: the same as gspo-jax sweep."""

import sys

from gspo_jax.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
