"""python scripts/compare_baselines.py --algorithms GSPO,GRPO,PPO: the same as gspo-jax compare."""

import sys

from gspo_jax.cli import main

if __name__ == "__main__":
    arguments = ["--losses" if a == "--algorithms" else a for a in sys.argv[1:]]
    arguments = [a.replace("--algorithms=", "--losses=", 1) for a in arguments]
    sys.exit(main(["compare", *arguments]))
