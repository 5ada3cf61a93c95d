"""`gspo-jax` with something done at one place of one step: PLACE STEP ACTION, then its arguments.

PLACE    generate, reward, advantage, old_logp, update, save, evaluate
ACTION   tell: make the file $TOLD; spin: make it, then stay in C for minutes; wait: make it, then
         do nothing until the run is asked to stop
"""

import hashlib
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from gspo_jax.cli.commands import main
from gspo_jax.files import stopping
from gspo_jax.run import lifecycle as run_module


def at(place, step, act, patch=setattr):
    """Call `act` once in this phase of this step of a run; 0 is before the first."""
    left = [act]

    def reached(now):
        if now == step and left:
            left.pop()()

    if place == "save":
        save = run_module.Run.save
        watched = lambda r, s, **k: [reached(int(s.step)), save(r, s, **k)][1]  # noqa: E731
        patch(run_module.Run, "save", watched)
    elif place == "evaluate":
        measure = run_module.Run.evaluate
        patch(run_module.Run, "evaluate", lambda r, s: [reached(int(s.step)), measure(r, s)][1])
    else:
        phase = run_module.Run.phase

        @contextmanager
        def watched(run, name):
            with phase(run, name):
                if name == place:
                    reached(run.log._step + 1)
                yield

        patch(run_module.Run, "phase", watched)


def tell():
    Path(os.environ["TOLD"]).touch()


def spin():
    tell()
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # without the lock, as XLA compiles


def wait():
    tell()
    while not stopping._listening[-1].asked:
        time.sleep(0.01)


if __name__ == "__main__":
    place, step, action, *sys.argv[1:] = sys.argv[1:]
    at(place, int(step), {"tell": tell, "spin": spin, "wait": wait}[action])
    sys.exit(main())
