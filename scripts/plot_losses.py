"""Draw the figures of docs/equations.md by running the losses themselves.

    python scripts/plot_losses.py [OUT_DIR]

Nothing here knows a formula: weights are jax.grad of `gspo_jax.algo.losses`, clip fractions are the
`clip_frac` that the losses return.
"""

import sys
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gspo_jax.algo.losses import LOSSES, RATIO, kl
from gspo_jax.view.drawing import BLUE, GREEN, GREY, ORANGE, RED, STYLE

OUT = Path(__file__).parent.parent / "docs" / "images"
SVG: dict[Any, Any] = {
    "svg.hashsalt": "gspo_jax",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "svg.fonttype": "none",
}

# The ratios to show; those of the narrow bands are labelled by their distance from 1.
RANGES = {
    "gspo": (1 - 1e-3, 1 + 1e-3),
    "gspo_token": (1 - 1e-3, 1 + 1e-3),
    "luspo": (1 - 5e-3, 1 + 5e-3),
    "gmpo": (0.4, 2.0),
    "grpo": (0.0, 2.2),
    "sapo": (0.0, 5.0),
    "dr_grpo": (0.0, 2.2),
    "dapo": (0.0, 2.2),
    "ppo": (0.0, 4.0),
    "cispo": (0.0, 7.0),
    "reinforce": (0.0, 2.2),
}
# A second curve, dashed: its label, the loss and its options.
COMPARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gspo": ("luspo's band", "luspo", {}),
    "luspo": ("gspo's band", "gspo", {}),
    "sapo": ("grpo", "grpo", {}),
    "cispo": ("grpo", "grpo", {}),
    "ppo": ("with delta = 3", "ppo", {"delta": 3.0}),
}
LENGTHS = np.array([1, 2, 4, 8, 16, 32, 64])

# Clip ranges of the figure on short responses: label, loss, low, high, colour.
BANDS = [
    ("gspo, the paper's 3e-4, 4e-4", "gspo", 3e-4, 4e-4, BLUE),
    ("luspo's 2e-3, 2.5e-3", "gspo", 2e-3, 2.5e-3, GREEN),
    ("the demo's 3e-3, 4e-3", "gspo", 3e-3, 4e-3, ORANGE),
    ("1e-2, 1.3e-2", "gspo", 1e-2, 1.3e-2, RED),
    ("grpo's 0.2, 0.2", "grpo", 0.2, 0.2, GREY),
]


def gradient_weights(
    name: str, ratio: Float[np.ndarray, " R"], **options: float
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """∂J/∂log π_θ of a token at each ratio, where its advantage is 1 and where it is -1.

    Each response has one token, so that all means agree. gspo_token has both advantages in one
    response of two tokens, of which each weighs half.
    """
    adv = np.repeat([[1.0], [-1.0]], len(ratio), axis=1).ravel()
    if name == "gspo_token":
        adv = np.tile([[1.0, -1.0]], (len(ratio), 1))
    log_ratio = np.log(np.maximum(ratio, 1e-6))
    logp = np.tile(log_ratio, 2)[:, None] if adv.ndim == 1 else np.tile(log_ratio[:, None], 2)

    def objective(logp):
        inputs = jnp.zeros(logp.shape), jnp.array(adv, jnp.float32), jnp.ones(logp.shape, bool)
        return -LOSSES[name](logp, *inputs, **options)[0].total

    weight = jax.jit(jax.grad(objective))(jnp.array(logp, jnp.float32))
    good, bad = (2 * weight).T if adv.ndim == 2 else weight.reshape(2, -1)
    return good, bad


def length_weights(name: str, lengths: np.ndarray = LENGTHS) -> Float[np.ndarray, " B"]:
    """∂J/∂log π_θ of one token of each response on-policy, relative to the mean over tokens.

    The batch has one response of each length, all of advantage 1.
    """
    mask = np.arange(max(lengths))[None] < lengths[:, None]
    ones = jnp.ones(len(lengths))

    def objective(logp):
        return -LOSSES[name](logp, None, ones, jnp.array(mask))[0].total

    weight = np.asarray(jax.jit(jax.grad(objective))(jnp.full(mask.shape, -1.0)))
    return weight[:, 0] / weight[mask].mean()


def clip_fraction(
    name: str, std: Float[np.ndarray, " N"], clip_low: float, clip_high: float, count: int = 4000
) -> Float[Array, " N"]:
    """The share that is clipped when log-ratios are normal around 0, for each standard deviation.

    Instead of random responses one at each of `count` quantiles, once good and once bad: the
    log-ratio is then independent of the advantage, which is noise and no learning.
    """
    quantiles = jax.scipy.special.ndtri((jnp.arange(count, dtype=jnp.float32) + 0.5) / count)
    noise = jnp.tile(quantiles, 2)[:, None]
    adv = jnp.repeat(jnp.array([1.0, -1.0]), count)
    loss = partial(LOSSES[name], clip_low=clip_low, clip_high=clip_high)

    def share(std):
        _, metrics = loss(noise * std, jnp.zeros(noise.shape), adv, jnp.ones(noise.shape, bool))
        return metrics["clip_frac"]

    return jax.jit(jax.vmap(share))(jnp.array(std, jnp.float32))


# ----------------------------------------------------------------------------------- figures


def draw_loss(name: str, path: Path) -> None:
    """Left the weight against the ratio, right against the length of the response."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.3), width_ratios=[1.5, 1])
    low, high = RANGES[name]
    # An even count: no sample lies on a bound, where the weight jumps.
    ratio = np.linspace(low, high, 700)
    narrow = high - low < 0.1
    x = 1e3 * (ratio - 1) if narrow else ratio
    if name in COMPARED:
        label, other, options = COMPARED[name]
        for i, weight in enumerate(gradient_weights(other, ratio, **options)):
            left.plot(x, weight, color=GREY, lw=1, ls=(0, (3, 2)), label=None if i else label)
    good, bad = gradient_weights(name, ratio)
    left.plot(x, good, color=BLUE, label="Â = 1")
    left.plot(x, bad, color=ORANGE, label="Â = -1")
    _shade_band(left, name, narrow)
    kind = "s" if narrow else "w"  # of gmpo, whose bound is per token, it is w too
    left.set(title="Weight against the ratio", ylabel="∂J / ∂log π", xlim=(x[0], x[-1]))
    left.set_xlabel(f"{kind} - 1, in thousandths" if narrow else kind)
    left.axhline(0, color="#9aa1ab", lw=0.8, zorder=0)
    left.margins(y=0.12)
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)

    right.plot(LENGTHS, length_weights(name), color=GREEN, marker="o", ms=3)
    right.set(title="and the length", xlabel="|y|, tokens", ylabel="share per token")
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    right.set_yticks([0.25, 1, 4, 16], ["¼", "1", "4", "16"])
    right.set_ylim(0.2, 24)
    _save(figure, path)


def _shade_band(axis: Axes, name: str, narrow: bool) -> None:
    options = {p.name: p.default for p in signature(LOSSES[name]).parameters.values()}
    if "clip_low" in options:
        edges = 1 - options["clip_low"], 1 + options["clip_high"]
    elif "log_clip_low" in options:
        edges = np.exp(-options["log_clip_low"]), np.exp(options["log_clip_high"])
    else:
        return
    axis.axvspan(*(1e3 * (e - 1) if narrow else e for e in edges), color="#f1f3f6", zorder=0)


def draw_clip_fraction(path: Path) -> None:
    """The share of responses that noise alone clips, against their length."""
    figure, axes = plt.subplots(1, 2, figsize=(6.8, 2.6), sharey=True)
    lengths = np.geomspace(8, 16384, 45)
    for axis, sigma in zip(axes, (0.005, 0.02), strict=True):
        for label, name, low, high, color in BANDS:
            is_sequence = RATIO[name] == "sequence"
            std = sigma / np.sqrt(lengths) if is_sequence else np.full(len(lengths), sigma)
            share = clip_fraction(name, std, low, high)
            axis.plot(lengths, share, color=color, label=label, lw=1.6 if is_sequence else 1.2)
        axis.set(title=f"σ = {sigma:g} per token", xlabel="|y|, tokens", ylim=(-0.015, 0.5))
        axis.set_xscale("log", base=2)
        ticks = [8, 64, 512, 4096]
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_ylabel("clipped by noise alone")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.4)
    _save(figure, path)


def draw_kl(path: Path) -> None:
    """The three estimators at one token, and their gradients as a loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.3))
    log_ratio = jnp.linspace(-2.0, 2.0, 301)[:, None]  # log π_θ - log π_ref
    zero, mask = jnp.zeros(log_ratio.shape), jnp.ones(log_ratio.shape, bool)
    for kind, color in (("k1", BLUE), ("k2", GREEN), ("k3", ORANGE)):
        value = jax.vmap(lambda x, k=kind: kl(x[None], zero[:1], mask[:1], k)[0].total)(log_ratio)
        slope = jax.grad(lambda x, k=kind: kl(x, zero, mask, k)[0].total)(log_ratio)
        left.plot(log_ratio[:, 0], value, color=color, label=kind)
        right.plot(log_ratio[:, 0], slope[:, 0], color=color, label=kind)
    left.set(title="Value", ylabel="nats")
    right.set(title="Gradient in log π, as a loss")
    for axis in (left, right):
        axis.set(xlabel="log π - log π_ref", ylim=(-2.2, 4.6), xlim=(-2, 2))
        axis.axhline(0, color="#9aa1ab", lw=0.8, zorder=0)
    right.set_ylim(-4.6, 2.2)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})  # the same bytes on every run
    plt.close(figure)


def main(out: Path = OUT) -> None:
    """Write one SVG per loss, and those of the clip range and the KL estimators."""
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({**STYLE, **SVG}):
        for name in LOSSES:
            draw_loss(name, out / f"{name}.svg")
        draw_clip_fraction(out / "clip_fraction.svg")
        draw_kl(out / "kl.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
