"""python scripts/compare_baselines.py --algorithms GSPO,GRPO,PPO: the same as gspo-jax compare.

Flags of other trainers work here too, --num_epochs, --output_dir and the like: see flags.py.
"""

import sys

from flags import main

if __name__ == "__main__":
    sys.exit(main("compare", sys.argv[1:]))
