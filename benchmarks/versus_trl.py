"""Ours against TRL on the same CPU, model directory, prompts, lengths and dtype.

    python benchmarks/versus_trl.py --trl-python ENV/bin/python --models DIR10M DIR1M

Processes of the two sides alternate, so that a drift of the machine meets both. A side's figure is
the median over all its steps after the warm-up; the ratio below 1 says that we are faster.
DIR10M and DIR1M are Qwen2 directories with a tokenizer and prompts.jsonl (question, prompt_ids).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from calibrate import environment

HERE = Path(__file__).parent
# Name -> which model, and the options of both sides. 26 of 1024 ids end a row: of an untrained
# model, that is after 32 of at most 64 tokens on average.
CASES = {
    "9.84 M, all rows at the cap": (0, []),
    "9.84 M, rows stop at EOS": (0, ["--eos", "26"]),
    "9.84 M, four minibatches": (0, ["--minibatches", "4"]),
    "0.92 M, all rows at the cap": (1, []),
}


def main() -> None:
    o = parse()
    results = []
    for name, (model, options) in CASES.items():
        sides: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        common = ["--model-dir", str(o.models[model]), "--steps", str(o.steps), *options]
        for _ in range(o.rounds):
            sides["ours"].append(run([sys.executable, str(HERE / "step.py"), "--json", *common]))
            sides["trl"].append(run([o.trl_python, str(HERE / "trl_step.py"), *common]))
        results.append({"case": name, **compared(sides)})
        print(row(results[-1]), flush=True)
    out = {"environment": environment(), "trl": sides["trl"][0]["versions"], "cases": results}
    path = HERE / "results" / "versus_trl_cpu.json"
    path.write_text(json.dumps(out, indent=1) + "\n")


def run(command: list[str]) -> dict[str, Any]:
    """The JSON that a benchmark prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compared(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for side, runs in sides.items():
        steps = [s for r in runs for s in r["steps"]]
        out[side] = {
            "median": statistics.median(steps),
            "low": min(steps),
            "high": max(steps),
            "n": len(steps),
            "generate": statistics.median(r["median"]["generate"] for r in runs),
            "peak_rss_gb": max(r["peak_rss_gb"] for r in runs),
        }
    out["mean_length"] = statistics.median(r["median"]["mean_length"] for r in sides["ours"])
    out["ratio"] = out["ours"]["median"] / out["trl"]["median"]
    out["rss_ratio"] = out["ours"]["peak_rss_gb"] / out["trl"]["peak_rss_gb"]
    return out


def row(result: dict[str, Any]) -> str:
    ours, trl = result["ours"], result["trl"]
    times = "  ".join(
        f"{name} {side['median']:.2f} s ({side['low']:.2f}-{side['high']:.2f}, n={side['n']}, "
        f"{side['peak_rss_gb']:.2f} GB)"
        for name, side in (("ours", ours), ("TRL", trl))
    )
    return (
        f"{result['case']:30} {times}  ratio {result['ratio']:.2f}, RSS {result['rss_ratio']:.2f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="seconds per training step beside TRL's")
    parser.add_argument("--trl-python", required=True, help="of an environment with TRL")
    parser.add_argument("--models", type=Path, nargs=2, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
