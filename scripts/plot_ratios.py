"""Draw the figures of docs/how_gspo_works.md from log-ratios of real responses.

    python scripts/plot_ratios.py              the figures, from the numbers that are kept
    python scripts/plot_ratios.py --measure    the numbers anew: a minute on a CPU

The numbers are log π_θ - log π_old of every token of the fourth minibatch of four rollouts of the
demo, each after the three updates before it, as the training program has them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from gspo_jax import train
from gspo_jax.algo.losses import LOSSES
from gspo_jax.config.load import load_config, packaged_config
from gspo_jax.view.drawing import BLUE, GREY, ORANGE, STYLE

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "images" / "ratios"
KEPT = ROOT / "benchmarks" / "results" / "ratios.json"
SVG: dict[Any, Any] = {
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "legend.fontsize": 8,
}
JOINED = 2 ** np.arange(9)  # responses that are joined to a longer one


def measure(steps: int = 10, rollouts: int = 4, seed: int = 0) -> dict[str, Any]:
    """The log-ratios after `steps` steps of the demo, and their texts, token by token."""
    config = load_config(packaged_config("demo.yaml"), [f"run.seed={seed}"])
    loop, state = train.assemble(config)
    responses = []
    with jax.set_mesh(loop.policy.mesh):
        for step in range(1, steps + 1):
            state, _ = train.update(loop, state, train.begin(loop, state, step))
        for step in range(steps + 1, steps + 1 + rollouts):
            responses += fourth_minibatch(loop, state, train.begin(loop, state, step))
    return {"steps_before": steps, "rollouts": rollouts, "seed": seed, "responses": responses}


def fourth_minibatch(loop: train.Loop, state: Any, begun: Any) -> list[dict[str, Any]]:
    """Its responses, after the updates on the three before it; `state` is left as it is."""
    batch = begun.progress.batch
    old = np.asarray(loop.programs.logps(state.params, batch).logp)
    asked = iter([False] * 4)  # before the first update, and before each of three
    moved, _ = train.update(
        loop, jax.tree.map(jnp.copy, state), begun, stop=lambda: next(asked, True)
    )
    log_ratio = np.asarray(loop.programs.logps(moved.params, batch).logp) - old
    rows = range(len(log_ratio) * 3 // 4, len(log_ratio))
    tokens, decode = begun.completions.tokens, loop.policy.tokenizer.decode
    return [
        {
            "adv": round(float(batch.adv[b]), 4),
            "log_ratio": [round(float(x), 5) for x in log_ratio[b][batch.mask[b]]],
            "tokens": [decode([int(t)]) for t in tokens[b][batch.mask[b]]],
        }
        for b in rows
    ]


# ----------------------------------------------------------------------------- what they say


def arrays(
    responses: list[dict[str, Any]],
) -> tuple[Float[np.ndarray, "B T"], Float[np.ndarray, " B"], Bool[np.ndarray, "B T"]]:
    """Log-ratios, advantages and mask, as a loss takes them."""
    length = np.array([len(r["log_ratio"]) for r in responses])
    mask = np.arange(length.max())[None] < length[:, None]
    log_ratio = np.zeros(mask.shape, np.float32)
    log_ratio[mask] = np.concatenate([r["log_ratio"] for r in responses])
    return log_ratio, np.array([r["adv"] for r in responses], np.float32), mask


def clipped(responses: list[dict[str, Any]], loss: str, low: float, high: float) -> float:
    """The share of the tokens that a loss clips."""
    log_ratio, adv, mask = map(jnp.asarray, arrays(responses))
    found = LOSSES[loss](log_ratio, jnp.zeros(mask.shape), adv, mask, clip_low=low, clip_high=high)
    return float(found[1]["clip_frac"])


def spread_by_length(
    responses: list[dict[str, Any]], joined: np.ndarray = JOINED, draws: int = 4000
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """As if responses were longer: some, drawn at random, are joined to one.

    Returns:
        Their mean length, and over `draws` of them the standard deviation of the sum of all
        log-ratios and of the mean.
    """
    log_ratio, _, mask = arrays(responses)
    sums, counts = log_ratio.sum(1), mask.sum(1)
    generator = np.random.default_rng(0)
    length, of_sum, of_mean = [], [], []
    for count in joined:
        drawn = generator.integers(0, len(sums), (draws, count))
        total, tokens = sums[drawn].sum(1), counts[drawn].sum(1)
        length.append(tokens.mean())
        of_sum.append(total.std())
        of_mean.append((total / tokens).std())
    return np.array(length), np.array(of_sum), np.array(of_mean)


# ----------------------------------------------------------------------------------- figures


def draw_ratios(responses: list[dict[str, Any]], path: Path) -> None:
    """Left one response token by token, right how many of all tokens and responses have moved."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), width_ratios=[1.35, 1])
    _one_response(left, max(responses, key=lambda r: np.sum(np.abs(r["log_ratio"]) > 0.01)))
    log_ratio, _, mask = arrays(responses)
    of_tokens, of_rows = log_ratio[mask], [np.mean(r["log_ratio"]) for r in responses]
    for values, color, label in ((of_tokens, ORANGE, "tokens"), (of_rows, BLUE, "responses")):
        x = np.sort(np.abs(np.expm1(values)))
        right.plot(x, 100 * (1 - np.arange(len(x)) / len(x)), color=color, label=label)
    _mark_defaults(right, 60, "right")
    right.set(title="Further from 1 than x", xlabel="x", ylabel="% of them", ylim=(-2, 100))
    right.set_xscale("log")
    right.set_xlim(1e-5, 1)
    _label_powers(right)
    right.legend(loc="upper left", bbox_to_anchor=(0.38, 0.75), handlelength=1.2)
    _save(figure, path)


def _one_response(axis: Axes, response: dict[str, Any]) -> None:
    ratio = np.exp(response["log_ratio"])
    shown = {"": "end", "\n": "⏎", "\\boxed": "\\b", " \\boxed": "\\b"}
    axis.bar(range(len(ratio)), 1e3 * (ratio - 1), color=ORANGE, width=0.8)
    s = 1e3 * (np.exp(np.mean(response["log_ratio"])) - 1)
    axis.axhline(s, color=BLUE, lw=1.2)
    axis.set(title="One response: w of its tokens, s (line)", ylabel="ratio - 1, in thousandths")
    axis.set_xticks(range(len(ratio)), [shown.get(t) or t for t in response["tokens"]], fontsize=7)
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")
    axis.set_axisbelow(True)


def draw_lengths(responses: list[dict[str, Any]], path: Path) -> None:
    """Left the spread of sum and mean by length, right what a range clips, by its width."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.5))
    lengths, of_sum, of_mean = spread_by_length(responses)
    left.plot(lengths, of_sum, color=GREY, marker="o", ms=3, label="sum")
    left.plot(lengths, of_mean, color=BLUE, marker="o", ms=3, label="mean: log s")
    left.axhspan(3e-4, 4e-4, color="#f1f3f6", zorder=0)
    left.set(title="Spread of log-ratios", xlabel="|y|, tokens")
    left.set(ylabel="standard deviation", xscale="log", yscale="log")
    ticks = [26, 102, 408, 1632, 6528]
    left.set_xticks(ticks, [str(n) for n in ticks])
    left.xaxis.set_minor_locator(NullLocator())
    left.set_yticks([1e-3, 1e-2, 1e-1, 1], ["0.001", "0.01", "0.1", "1"])
    left.legend(loc="best", handlelength=1.4)
    width = np.geomspace(1e-4, 1, 60)
    for loss, color in (("gspo", BLUE), ("grpo", ORANGE)):
        share = [100 * clipped(responses, loss, x, x) for x in width]
        right.plot(width, share, color=color, label=loss)
    _mark_defaults(right, 46, "left")
    right.set(title="Clipped by a range of ±ε", xlabel="ε")
    right.set(ylabel="% of tokens", xscale="log", ylim=(-1.5, 48))
    _label_powers(right)
    right.legend(loc="upper left", bbox_to_anchor=(0.42, 0.85), handlelength=1.4)
    _save(figure, path)


def _mark_defaults(axis: Axes, height: float, side: str) -> None:
    """The ranges that GSPO and GRPO have by default."""
    for x, text, where in ((3.5e-4, "3e-4,\n4e-4", side), (0.2, "0.2", "left")):
        axis.axvline(x, color=GREY, lw=0.9, ls=(0, (3, 2)))
        beside = x * 1.15 if where == "left" else x / 1.15
        axis.text(beside, height, text, fontsize=7.5, color=GREY, va="top", ha=where)


def _label_powers(axis: Axes) -> None:
    ticks = [1e-4, 1e-3, 1e-2, 1e-1, 1]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})  # the same bytes on every run
    plt.close(figure)


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--measure", action="store_true", help="train and sample first")
    if made.parse_args().measure:
        KEPT.write_text(json.dumps(measure(), ensure_ascii=False) + "\n", encoding="utf-8")
    responses = json.loads(KEPT.read_text(encoding="utf-8"))["responses"]
    OUT.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({**STYLE, **SVG}):
        draw_ratios(responses, OUT / "ratios.svg")
        draw_lengths(responses, OUT / "lengths.svg")


if __name__ == "__main__":
    main()
