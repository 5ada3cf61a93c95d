"""Prompts -> groups of completions -> texts -> scores, and from there to training rows."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float, Key

from gspo_jax.batch import Completions, Problem, Rollout, TrainBatch
from gspo_jax.generate import PureModel, bucket, generate
from gspo_jax.tokenizer import Tokenizer

Scorer = Callable[..., tuple[dict[str, np.ndarray], np.ndarray, dict[str, float]]]


def encode_prompts(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[list[int]]:
    """Token ids of each prompt under the chat template."""
    return [tokenizer.encode_prompt(p.prompt) for p in problems]


def sample_completions(
    model: PureModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    key: Key[Array, ""],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    first_prompt: int = 0,
) -> tuple[Completions, list[str]]:
    """Completions of each prompt, and their texts without special tokens."""
    completions = generate(
        model,
        prompts,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        eos_ids=tokenizer.eos_ids,
        key=key,
        first_prompt=first_prompt,
    )
    rows = zip(completions.tokens, completions.mask, strict=True)
    return completions, [tokenizer.decode(row[m].tolist()) for row, m in rows]


def score_completions(
    scorer: Scorer,
    problems: list[Problem],
    prompts: list[list[int]],
    completions: Completions,
    texts: list[str],
) -> Rollout:
    """The finished rollout: every completion scored by every reward function."""
    ids = [row[m].tolist() for row, m in zip(completions.tokens, completions.mask, strict=True)]
    rewards, reward, log = scorer(problems, texts, ids)
    return Rollout(problems, prompts, completions, texts, rewards, reward, log)


def to_train_batch(
    rollout: Rollout,
    adv: Float[np.ndarray, " B"],
    *,
    mask_truncated: bool = False,
    pad_id: int = 0,
) -> TrainBatch:
    """Rows of prompt + response, right-padded to the longest of them (rounded, see `bucket`).

    Token ids go straight from the sampler to the update, never through text. With
    `mask_truncated`, responses that ran into the length limit are not trained on.
    """
    completions = rollout.completions
    mask = completions.mask
    if mask_truncated:
        mask = mask & ~completions.truncated[:, None]
    group_size = mask.shape[0] // len(rollout.prompts)
    lengths = np.repeat([len(p) for p in rollout.prompts], group_size).astype(np.int32)
    used = completions.mask.sum(1)
    B = mask.shape[0]
    tokens = np.full((B, bucket(int((lengths + used).max()))), pad_id, np.int32)
    for row in range(B):
        response = completions.tokens[row, : used[row]]
        filled = [*rollout.prompts[row // group_size], *response.tolist()]
        tokens[row, : len(filled)] = filled
    return TrainBatch(tokens, lengths, mask, np.asarray(adv))


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Rewards, group spread and lengths of a rollout, under TRL's names where it has one."""
    reward = rollout.reward.reshape(len(rollout.problems), -1)
    scored = np.isfinite(reward)
    counts = scored.sum(1)
    mean = np.where(counts > 0, np.nansum(reward, 1) / np.maximum(counts, 1), 0.0)
    squares = np.where(scored, (reward - mean[:, None]) ** 2, 0.0).sum(1)
    std = np.sqrt(squares / np.maximum(counts - 1, 1))
    highest = np.where(scored, reward, -np.inf).max(1)
    lowest = np.where(scored, reward, np.inf).min(1)
    lengths = rollout.completions.mask.sum(1)
    metrics = {
        "reward": float(reward[scored].mean()) if scored.any() else float("nan"),
        "reward_std": float(std.mean()),
        "frac_reward_zero_std": float((highest <= lowest).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": int(lengths.min()),
        "completions/max_length": int(lengths.max()),
        "completions/clipped_ratio": float(rollout.completions.truncated.mean()),
    }
    for name, values in rollout.rewards.items():
        known = values[np.isfinite(values)]
        metrics[f"rewards/{name}/mean"] = float(known.mean()) if known.size else float("nan")
        metrics[f"rewards/{name}/std"] = float(known.std()) if known.size else float("nan")
    return metrics | rollout.log
