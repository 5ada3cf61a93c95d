"""Evaluate a model directory on lm-eval's tasks: needs pip install 'gspo_jax[lm-eval]'.

    python scripts/harness.py --model_path runs/demo/export --tasks gsm8k,arc_easy
    python scripts/harness.py --model_path DIR --tasks mine --include_path DIR_OF_YAML mesh.tensor=2

Prints every metric with n and a 95 % interval, and writes lm-eval's own results to --output.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from gspo_jax.cli.commands import explain
from gspo_jax.errors import ConfigError, DataError


def rows(results: dict[str, Any]) -> list[tuple[str, str, float, float, float, int]]:
    """(task, metric, value, low, high, n) of lm-eval's results.

    Shares of right answers have Wilson's interval, other metrics 1.96 of lm-eval's standard errors.
    """
    from gspo_jax.numbers.statistics import Z95, wilson

    found = []
    for task, values in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective", 0)
        for name, value in values.items():
            metric = name.partition(",")[0]
            error = values.get(name.replace(",", "_stderr,", 1))
            if "," not in name or "_stderr," in name or not isinstance(value, int | float):
                continue
            if metric in ("acc", "acc_norm", "exact_match") and n:
                low, high = wilson(round(value * n), n)
            elif isinstance(error, int | float):
                low, high = value - Z95 * error, value + Z95 * error
            else:  # lm-eval has none for some metrics
                low, high = float("nan"), float("nan")
            found.append((task, name.replace(",none", ""), float(value), low, high, n))
    return found


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """lm-eval's results for these arguments."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from gspo_jax.evaluation.harness import Harness

    model = Harness(
        arguments.model_path,
        overrides=arguments.settings,
        batch=arguments.batch,
        tokens=arguments.tokens,
        max_length=arguments.max_length,
        seed=arguments.seed,
    )
    return simple_evaluate(
        model,
        tasks=arguments.tasks.split(","),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        task_manager=TaskManager(include_path=arguments.include_path),
    )


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, evaluate, print; the exit code is returned."""
    parser = argparse.ArgumentParser(description="Evaluate a model directory on lm-eval's tasks.")
    parser.add_argument("--model_path", required=True, help="a Hugging Face directory")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--include_path", help="a directory with tasks of your own, as YAML")
    parser.add_argument("--num_fewshot", type=int, help="solved examples before each question")
    parser.add_argument("--limit", type=float, help="only the first so many of each task")
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--max_length", type=int, help="tokens that the model reads at most")
    parser.add_argument("--batch", type=int, default=64, help="prompts answered together")
    parser.add_argument("--tokens", type=int, default=16_384, help="positions scored together")
    parser.add_argument("--seed", type=int, default=0, help="of samples")
    parser.add_argument("--output", type=Path, help="a JSON file for all that lm-eval returns")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    try:
        results = evaluate(arguments)
    except (ConfigError, DataError) as error:
        code, text = explain(error)
        print(text, file=sys.stderr)
        return code
    for task, metric, value, low, high, n in rows(results):
        interval = "no interval" if math.isnan(low) else f"[{low:.4f}, {high:.4f}]"
        print(f"{task}  {metric}  {value:.4f} {interval}  n={n}")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
