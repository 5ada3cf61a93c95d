"""What a step says of its rollout: metrics, samples for people, a digest to compare runs by."""

import hashlib
from typing import Any

import numpy as np

from gspo_jax.batch import Completions, Rollout
from gspo_jax.numbers.tally import numbers
from gspo_jax.rollout.dynamic_sampling import groups_with_spread


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Rewards, group spread and lengths of a rollout, under TRL's names where it has one."""
    reward = rollout.reward.reshape(len(rollout.problems), -1)
    scored = np.isfinite(reward)
    counts = scored.sum(1)
    mean = np.where(counts > 0, np.nansum(reward, 1) / np.maximum(counts, 1), 0.0)
    squares = np.where(scored, (reward - mean[:, None]) ** 2, 0.0).sum(1)
    std = np.sqrt(squares / np.maximum(counts - 1, 1))
    lengths = rollout.completions.mask.sum(1)
    ended = lengths[~rollout.completions.truncated]
    metrics = {
        "reward": float(reward[scored].mean()) if scored.any() else float("nan"),
        "reward_std": float(std.mean()),
        "frac_reward_zero_std": 1 - len(groups_with_spread(rollout)) / len(reward),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/mean_terminated_length": float(ended.mean()) if ended.size else 0.0,
        "completions/clipped_ratio": float(rollout.completions.truncated.mean()),
    }
    for name, values in rollout.rewards.items():
        known = values[np.isfinite(values)]
        metrics[f"rewards/{name}/mean"] = float(known.mean()) if known.size else float("nan")
        metrics[f"rewards/{name}/std"] = float(known.std()) if known.size else float("nan")
    return metrics | numbers(rollout.log)


def sample_rows(rollout: Rollout, adv: np.ndarray, prompts: int = 4) -> list[dict[str, Any]]:
    """The best and the worst response to each of the first few prompts, for people to read."""
    rows, group = [], len(rollout.texts) // len(rollout.problems)
    if adv.ndim == 2:  # one per token, 0 outside the mask: their mean
        adv = adv.sum(1) / np.maximum(rollout.completions.mask.sum(1), 1)
    for p, problem in enumerate(rollout.problems[:prompts]):
        rewards = np.nan_to_num(rollout.reward[p * group : (p + 1) * group], nan=-np.inf)
        for b in sorted({int(rewards.argmax()), int(rewards.argmin())}):
            row = p * group + b
            rows.append(
                {
                    "prompt": problem.prompt,
                    "completion": rollout.texts[row],
                    "answer": problem.answer,
                    **{f"rewards/{name}": r[row] for name, r in rollout.rewards.items()},
                    "reward": rollout.reward[row],
                    "advantage": adv[row],
                }
            )
    return rows


def digest(completions: Completions) -> str:
    """SHA-256 of the responses and of which of their tokens were sampled, in hexadecimal."""
    mask = completions.mask
    within = np.arange(mask.shape[1])[None] < completions.length[:, None]
    found = hashlib.sha256(str(mask.shape).encode())
    found.update(np.ascontiguousarray(mask).tobytes())
    found.update(np.where(within, completions.tokens, 0).astype("<i4").tobytes())
    return found.hexdigest()
