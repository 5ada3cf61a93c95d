"""A child process that saves checkpoints of a small state until it is killed.

    python saves.py DIRECTORY sync|async|slow-removal KEEP

It goes on from the newest checkpoint, and prints a line when it begins a save, when the save is
safe, and (slow-removal) when it begins to delete. Every element of the state after step n is n.
"""

import shutil
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gspo_jax.run import checkpoint

TYPES = {"w": jnp.float32, "half": jnp.bfloat16, "codes": jnp.uint8, "count": jnp.int32}
SIDE = 256


def state_at(step):
    shapes = {name: () if name == "count" else (SIDE, SIDE) for name in TYPES}
    return {name: jnp.full(shapes[name], step, dtype) for name, dtype in TYPES.items()}


def is_state_at(state, step):
    return all(
        np.array_equal(np.asarray(leaf), np.full(leaf.shape, step, leaf.dtype))
        for leaf in jax.tree.leaves(state)
    )


@partial(jax.jit, donate_argnums=0)
def advance(state):
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)


def remove_slowly(path, ignore_errors=False, **_):
    """A deletion that takes time, one file after the other."""
    files = sorted(p for p in Path(path).rglob("*") if p.is_file())
    if files:
        print("removing", flush=True)
    for file in files:
        file.unlink()
        time.sleep(0.01)
    quickly(path, ignore_errors=ignore_errors)


quickly = shutil.rmtree


def main(directory, how, keep):
    directory = Path(directory)
    checkpoint.clean(directory)
    found = checkpoint.steps(directory)
    state = state_at(0)
    if found:
        state, _ = checkpoint.restore(directory, found[-1], state)
    if how == "slow-removal":
        shutil.rmtree = remove_slowly
    with checkpoint.Saver(directory, checkpoint.Kept(int(keep))) as saver:
        last = None
        for step in range((found or [0])[-1] + 1, 250):
            state = advance(state)
            print(f"begins {step}", flush=True)
            saver.save(step, state, {"step": step})
            if last is not None and how == "async":
                print(f"safe {last}", flush=True)  # `save` has waited for it
            last = step
            if how != "async":
                saver.wait()
                print(f"safe {step}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
