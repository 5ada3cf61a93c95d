"""How much GSPO and GRPO clip, update by update, on the same rollouts from the same weights.

    python benchmarks/clip_fraction.py

The paper (arXiv 2507.18071, figure 2) has 0.15 of the tokens clipped for GSPO, 0.0013 for GRPO. Is
this GSPO's nature, or its range? The logarithm of a response's ratio is the mean of its tokens'
logarithms l: of |y| independent ones with standard deviation sigma it has sigma / sqrt(|y|). With
advantages of either sign equally often, noise alone then clips

    1/2 P(N > log(1 + high)) + 1/2 P(N < log(1 - low)),    N ~ Normal(mean, std)

of the responses: `expected`, from the mean and std of the ratios that were measured, times the
share of responses that have an advantage. The demo's model is trained for some steps first; then
both losses, with several ranges each, take the four updates of the same further rollouts, each
time from the same weights and moments.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import calibrate
import jax
import jax.numpy as jnp
import numpy as np
from output import RESULTS, table

from gspo_jax import train
from gspo_jax.config.load import load_config, packaged_config
from gspo_jax.numbers.tally import numbers

RANGES = {  # the paper's own first
    "gspo": [(3e-4, 4e-4), (3e-3, 4e-3), (3e-2, 4e-2)],
    "grpo": [(0.2, 0.27), (0.02, 0.027), (0.002, 0.0027)],
}
COLUMNS = ("loss", "range", "update 1", "2", "3", "4", "mean", "std of ratio", "expected")


def main() -> None:
    o = parse()
    start, rollouts = warmed_up(o.steps, o.rollouts, o.seed)
    cases = [
        case(loss, low, high, o.seed, start, rollouts)
        for loss, ranges in RANGES.items()
        for low, high in ranges
    ]
    masks = [begun.progress.batch.mask for begun in rollouts]
    adv = np.concatenate([begun.progress.batch.adv for begun in rollouts])
    result = {
        "environment": calibrate.environment(),
        "steps_before": o.steps,
        "rollouts": o.rollouts,
        "responses": int(adv.size),
        "tokens_per_response": float(np.mean([m.sum(1).mean() for m in masks])),
        "with_advantage": float(np.mean(adv != 0)),
        "cases": cases,
    }
    for found in cases:
        found["expected"] = [x * result["with_advantage"] for x in found["expected"]]
    print(table(COLUMNS, [row(found) for found in cases]))
    path = Path(o.out) / "clip_fraction.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def warmed_up(steps: int, rollouts: int, seed: int):
    """The state of a demo run after `steps`, and the rollouts that it would take next."""
    loop, state = train.assemble(configured("gspo", 3e-3, 4e-3, seed))
    with jax.set_mesh(loop.policy.mesh):
        for step in range(1, steps + 1):
            state, _ = train.update(loop, state, train.begin(loop, state, step))
        after = range(steps + 1, steps + 1 + rollouts)
        return state, [train.begin(loop, state, step) for step in after]


def case(loss: str, low: float, high: float, seed: int, start, rollouts) -> dict[str, Any]:
    """The clipped share of tokens in each of the four updates, averaged over the rollouts."""
    loop, _ = train.assemble(configured(loss, low, high, seed))
    found = []
    with jax.set_mesh(loop.policy.mesh):
        for begun in rollouts:
            state = jax.tree.map(jnp.copy, start)  # an update gives its buffers away
            _, done = train.update(loop, state, begun)
            found.append([numbers(jax.device_get(stats)) for stats in done.progress.stats])

    def over_rollouts(name: str) -> list[float]:
        return np.mean([[s[name] for s in stats] for stats in found], axis=0).tolist()

    clipped, mean, std = map(over_rollouts, ("clip_frac", "ratio_mean", "ratio_std"))
    return {
        "loss": loss,
        "low": low,
        "high": high,
        "clip_frac_by_update": clipped,
        "clip_frac": float(np.mean(clipped)),
        "clip_frac_sd_over_rollouts": float(
            np.std([np.mean([s["clip_frac"] for s in stats]) for stats in found], ddof=1)
        ),
        "ratio_mean_by_update": mean,
        "ratio_std_by_update": std,
        "expected": [expected(m - 1, s, low, high) for m, s in zip(mean, std, strict=True)],
    }


def expected(mean: float, std: float, low: float, high: float) -> float:
    """The share that is clipped of ratios whose logarithms are normal; see the top."""
    if std == 0:
        return 0.0

    def above(x: float) -> float:
        return math.erfc((x - mean) / (std * math.sqrt(2))) / 2

    return (above(math.log1p(high)) + 1 - above(math.log1p(-low))) / 2


def configured(loss: str, low: float, high: float, seed: int):
    text = f"algo.loss={{name: {loss}, clip_low: {low}, clip_high: {high}}}"
    return load_config(packaged_config("demo.yaml"), [text, f"run.seed={seed}", "run.steps=1000"])


def row(found: dict[str, Any]) -> list[str]:
    shown = [f"{x:.2%}" for x in found["clip_frac_by_update"]]
    return [
        found["loss"],
        f"{found['low']:g}, {found['high']:g}",
        *shown,
        f"{found['clip_frac']:.2%}",
        f"{found['ratio_std_by_update'][-1]:.2g}",
        f"{np.mean(found['expected']):.2%}",
    ]


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--steps", type=int, default=10, help="of training before")
    made.add_argument("--rollouts", type=int, default=16)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", default=RESULTS, help="directory of the JSON file")
    return made.parse_args()


if __name__ == "__main__":
    main()
