"""python scripts/train.py [CONFIG.yaml] [section.key=value ...]: the same as gspo-jax train."""

import sys

from gspo_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
