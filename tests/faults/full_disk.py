"""A run on a small file system of its own that fills up: what test_storage.py starts, in a child.

    unshare -Urm sh -c 'mount -t tmpfs -o size=24m tmpfs PLACE && exec python full_disk.py ...'

Also a module of reward functions, which fill the disk while a step is scored.
"""

import json
import os
import sys
from pathlib import Path

from reward_functions import short_words

PLACE = Path(os.environ.get("FULL_DISK_PLACE", "/nowhere"))
CALLS = {"fill": 0, "while_full": 0}


def fill():
    """Take every byte that is left."""
    with (PLACE / "filler").open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


def free():
    (PLACE / "filler").unlink()


def fills_in_third_step(completions, **_):
    CALLS["fill"] += 1
    if CALLS["fill"] == 4:  # one rehearsal came before
        fill()
    return short_words(completions)


def full_from_second_to_fifth_step(completions, **_):
    CALLS["while_full"] += 1
    if CALLS["while_full"] == 3:
        fill()
    if CALLS["while_full"] == 6:
        free()
    return short_words(completions)


def left():
    """What lies in PLACE, but for what fills it and what does not belong to a run."""
    found = (str(path.relative_to(PLACE)) for path in PLACE.rglob("*"))
    return sorted(name for name in found if name != "filler")


def main():
    from faults.tools import tiny_run
    from gspo_jax.cli import commands as cli

    mode, model = sys.argv[1:]
    own = f"task.rewards=[{Path(__file__).resolve()}:{{}}]"
    told = {}

    def run(name, *overrides, command="train"):
        settings = tiny_run(model, PLACE, *overrides) if command == "train" else overrides
        print(f"== {name}", file=sys.stderr, flush=True)
        told[name] = {"code": cli.main([command, *settings]), "left": left()}

    if mode == "start":
        (PLACE / "prompts.jsonl").write_text('{"prompt": "a", "answer": "a", "split": "train"}\n')
        fill()
        run("full", "rollout.prompts=2")
    elif mode == "checkpoint":
        save = ("run.save_every=1", own.format("fills_in_third_step"))
        run("full", *save)
        free()
        run("again", "run.save_every=1")
    elif mode == "metrics":
        run("full", "run.steps=6", own.format("full_from_second_to_fifth_step"))
    elif mode == "export":
        run("train", "run.steps=1")
        fill()
        out = str(PLACE / "out")
        run("full", str(PLACE / "run"), out, command="export")
        run("replaced", str(PLACE / "run"), command="export")
        free()
        run("again", str(PLACE / "run"), out, command="export")
    told["metrics"] = told["status"] = None
    if (PLACE / "run" / "metrics.jsonl").exists():
        lines = (PLACE / "run" / "metrics.jsonl").read_text().splitlines()
        told["metrics"] = [json.loads(line)["step"] for line in lines]
        told["status"] = json.loads((PLACE / "run" / "status.json").read_text())
    print(f"\nTOLD {json.dumps(told)}")


if __name__ == "__main__":
    main()
