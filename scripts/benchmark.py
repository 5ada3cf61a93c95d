"""Measure a model on benchmarks, beside the model that it was trained from.

    python scripts/benchmark.py --benchmarks zebra,math,custom --model_path DIR [--base DIR]

The same as gspo-jax eval [BASE] MODEL --benchmarks ..., with its settings under short names.
"""

import argparse
import sys
from pathlib import Path

from gspo_jax.cli.commands import main

ABOUT = "Measure a model on benchmarks, beside the model that it was trained from."
SETTINGS = {
    "samples": ("eval.samples", "K", "responses per problem, beside the greedy one; default 8"),
    "temperature": ("eval.temperature", "T", "of those; default 1"),
    "limit": ("eval.problems", "N", "problems: at most so many, or exactly so many made-up ones"),
    "max_new_tokens": ("rollout.max_completion_length", "N", "of a response; default 256"),
    "batch": ("eval.batch", "N", "problems at a time; default 64"),
    "seed": ("run.seed", "N", "of the samples; default 0"),
}


def command(argv: list[str]) -> list[str]:
    """The arguments of gspo-jax that say the same."""
    parser = argparse.ArgumentParser(description=ABOUT, allow_abbrev=False)
    parser.add_argument("--benchmarks", default="zebra,math,custom", help="default: %(default)s")
    parser.add_argument("--model_path", required=True, nargs="+", metavar="DIR")
    parser.add_argument("--base", metavar="DIR", help="the model to compare with")
    parser.add_argument("--out", "--output_dir", metavar="DIR", help="default: runs/eval")
    for name, (setting, meta, text) in SETTINGS.items():
        parser.add_argument(f"--{name}", metavar=meta, help=f"{text} ({setting})")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="any other")
    given = parser.parse_intermixed_args(argv)
    chosen = [f"{s}={getattr(given, n)}" for n, (s, *_) in SETTINGS.items() if getattr(given, n)]
    return [
        "eval",
        *([model_in(given.base)] if given.base else []),
        *map(model_in, given.model_path),
        *("--benchmarks", given.benchmarks),
        *(["--out", given.out] if given.out else []),
        *chosen,
        *given.settings,
    ]


def model_in(path: str) -> str:
    """A model directory, or a run's directory as its export."""
    export = Path(path) / "export"
    is_run = (export / "config.json").is_file() and not (Path(path) / "config.json").is_file()
    return str(export) if is_run else path


if __name__ == "__main__":
    sys.exit(main(command(sys.argv[1:])))
