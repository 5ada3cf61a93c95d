"""python scripts/monitor.py RUN... [--terminal]: the same as gspo-jax monitor."""

import sys

from gspo_jax.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["monitor", *sys.argv[1:]]))
