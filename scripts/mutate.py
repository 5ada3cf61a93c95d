"""Break the losses and advantages one line at a time, and see whether the tests notice.

    python scripts/mutate.py [--jobs N] [--only TEXT]

Each mutant is one replacement in a temporary copy of the package; the tests of these modules run
on it and stop at the first failure. Prints a table, exits 1 if a mutant survives and 2 if one no
longer applies, which means that the code changed and mutants.txt must follow.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Two jobs may read what the other is still writing, which is not the mutant's doing.
RACE = "ignore:Error reading persistent compilation cache entry:UserWarning"
TESTS = ["masked", "losses", "advantages", "penalties", "mismatch"]
TESTS += [f"losses_{name}" for name in ("traps", "invariants", "padding", "golden")]


class Mutant(NamedTuple):
    """`old` occurs exactly once in the module and becomes `new`."""

    module: str
    old: str
    new: str


class Outcome(NamedTuple):
    """The test that failed, or None, and how long that took."""

    caught_by: str | None
    seconds: float


def read_mutants() -> list[Mutant]:
    """The lines of mutants.txt."""
    lines = Path(__file__).with_name("mutants.txt").read_text().splitlines()
    mutants = []
    for line in lines:
        if line and not line.startswith("#"):
            module, _, change = line.partition(": ")
            old, _, new = change.partition(" =>")
            mutants.append(Mutant(module, old, new.strip()))
    return mutants


def snapshot(source: Path, folder: Path) -> None:
    """What the tests need of the package."""
    for name in ("gspo_jax", "tests"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", folder)


def run(original: Path, mutant: Mutant | None) -> Outcome:
    """The tests on a copy of the package with the mutant applied; None is the package as it is."""
    start, files = time.monotonic(), [f"tests/algo/test_{name}.py" for name in TESTS]
    with tempfile.TemporaryDirectory() as folder:
        snapshot(original, Path(folder))
        if mutant is not None:
            path = Path(folder, "gspo_jax", f"{mutant.module}.py")
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-W", RACE, *files],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    failed = [x for x in result.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if result.returncode == 0:
        return Outcome(None, time.monotonic() - start)
    caught_by = failed[0].split(" - ")[0] if failed else f"pytest exit code {result.returncode}"
    return Outcome(caught_by, time.monotonic() - start)


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(
        description="Break the losses and see whether the tests notice."
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--only", default="", help="mutants whose text contains this")
    options = parser.parse_args()

    mutants = read_mutants()
    stale = [m for m in mutants if source(m).count(m.old) != 1]
    for m in stale:
        print(f"{m.module}.py has {source(m).count(m.old)} times {m.old!r}; wanted once.")
    if stale:
        return 2
    chosen = [m for m in mutants if options.only in " ".join(m)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        snapshot(ROOT, original := Path(folder))  # so that editing meanwhile does not matter
        if (unbroken := run(original, None)).caught_by:
            print(f"The package itself fails: {unbroken.caught_by}")
            return 2
        outcomes = pool.map(partial(run, original), chosen)
        survivors = print_table(zip(chosen, outcomes, strict=True))
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutants caught.")
    return 1 if survivors else 0


def print_table(results: Iterable[tuple[Mutant, Outcome]]) -> int:
    """One row as soon as it is known; returns how many survived."""
    survivors = 0
    print("| # | module | was | became | caught by | s |\n|---|---|---|---|---|---|")
    for number, (m, outcome) in enumerate(results, 1):
        survivors += outcome.caught_by is None
        verdict = (outcome.caught_by or "**survived**").removeprefix("FAILED tests/")
        was, became = (text.replace("|", "\\|") for text in (m.old, m.new))
        row = f"{number} | {m.module} | `{was}` | `{became}` | {verdict} | {outcome.seconds:.0f}"
        print(f"| {row} |", flush=True)
    return survivors


def source(mutant: Mutant) -> str:
    """The module that the mutant changes."""
    return (ROOT / "gspo_jax" / f"{mutant.module}.py").read_text()


if __name__ == "__main__":
    sys.exit(main())
