"""python scripts/train.py [CONFIG.yaml] [section.key=value ...]: the same as gspo-jax train.

Flags of other trainers work here too, --model_name, --num_epochs and the like: see flags.py.
"""

import sys

from flags import main

if __name__ == "__main__":
    sys.exit(main("train", sys.argv[1:]))
