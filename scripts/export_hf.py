"""python scripts/export_hf.py RUN [OUT]: the same as gspo-jax export."""

import sys

from gspo_jax.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
