"""Prompts -> groups of completions -> texts -> scores, and from there to training rows."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gspo_jax.algo.advantages import soft_overlong
from gspo_jax.batch import Completions, Problem, Rollout, TrainBatch
from gspo_jax.mesh.distributed import gathered, own_rows
from gspo_jax.numbers.tally import Tally, merged, numbers, packed, unpacked
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.rollout.engine import PureModel, generate
from gspo_jax.rollout.schedule import bucket

Scorer = Callable[..., tuple[dict[str, np.ndarray], np.ndarray, dict[str, Tally]]]


def encode_prompts(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[list[int]]:
    """Token ids of each prompt under the chat template."""
    return [tokenizer.encode_prompt(p.prompt) for p in problems]


def rendered(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[Problem]:
    """The problems, each with what its prompt opens under the chat template (`Problem.opened`)."""
    return [replace(p, opened=tokenizer.opened(p.prompt)) for p in problems]


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
    record_routing: bool = False,
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
        record_routing=record_routing,
    )
    rows = zip(completions.tokens, completions.mask, strict=True)
    return completions, [tokenizer.decode(row[m].tolist()) for row, m in rows]


def score_completions(
    scorer: Scorer,
    problems: list[Problem],
    prompts: list[list[int]],
    completions: Completions,
    texts: list[str],
    *,
    overlong_buffer: int = 0,
) -> Rollout:
    """The finished rollout: every completion scored by every reward function.

    With `overlong_buffer` > 0, responses that end within that many tokens of the limit T lose up
    to 1 of their reward (`advantages.soft_overlong`); "overlong" then stands among the rewards.
    """
    ids = [row[m].tolist() for row, m in zip(completions.tokens, completions.mask, strict=True)]
    rewards, reward, log = score_together(scorer, problems, texts, ids)
    if overlong_buffer:
        length, limit = completions.mask.sum(1, dtype=np.int32), completions.mask.shape[1]
        punishment = soft_overlong(jnp.asarray(length), max_length=limit, buffer=overlong_buffer)
        rewards = rewards | {"overlong": np.asarray(punishment)}
        reward = reward + rewards["overlong"]
    return Rollout(problems, prompts, completions, texts, rewards, reward, log)


def score_together(
    scorer: Scorer,
    problems: Sequence[Problem],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Tally]]:
    """What `scorer` says of all responses, each process having asked it for its own problems'."""
    if jax.process_count() == 1:
        return scorer(problems, texts, ids)
    mine, size = own_rows(len(problems)), len(texts) // len(problems)
    rows, said = slice(mine.start * size, mine.stop * size), None
    if own := problems[mine]:
        rewards, reward, log = scorer(own, texts[rows], ids[rows])
        said = {k: v.tolist() for k, v in rewards.items()}, reward.tolist(), packed(log)
    shares = [share for share in gathered(said) if share is not None]
    names = shares[0][0]

    def joined(lists) -> np.ndarray:
        return np.concatenate([np.asarray(x, np.float32) for x in lists])

    return (
        {name: joined(share[0][name] for share in shares) for name in names},
        joined(share[1] for share in shares),
        merged(unpacked(log) for *_, log in shares),
    )


def trained_mask(completions: Completions, mask_truncated: bool) -> Bool[np.ndarray, "B T"]:
    """The tokens to train on: with `mask_truncated`, none of a response that hit the limit."""
    left = ~completions.truncated if mask_truncated else np.ones_like(completions.truncated)
    return completions.mask & left[:, None]


def groups_with_spread(rollout: Rollout, mask_truncated: bool = False) -> list[int]:
    """Groups with two different scores at least: the only ones that a baseline can learn from.

    Compared are the responses that are trained on.
    """
    trained = trained_mask(rollout.completions, mask_truncated).any(1)
    reward = np.where(trained, rollout.reward, np.nan).reshape(len(rollout.problems), -1)
    scored = np.isfinite(reward)
    highest = np.where(scored, reward, -np.inf).max(1)
    lowest = np.where(scored, reward, np.inf).min(1)
    return np.flatnonzero(highest > lowest).tolist()


def join_groups(parts: Sequence[tuple[Rollout, Sequence[int]]]) -> Rollout:
    """One rollout of the chosen groups of several, in order."""
    rollouts = [(rollout, list(groups)) for rollout, groups in parts if len(groups)]
    size = len(rollouts[0][0].texts) // len(rollouts[0][0].problems)
    rows = [[g * size + i for g in groups for i in range(size)] for _, groups in rollouts]
    routed = [r.completions.routing for r, _ in rollouts if r.completions.routing is not None]
    widest = max((x.shape[1] for x in routed), default=None)

    def stack(field: Callable[[Rollout], np.ndarray]) -> np.ndarray:
        return np.concatenate([field(r)[n] for (r, _), n in zip(rollouts, rows, strict=True)])

    return Rollout(
        problems=[r.problems[g] for r, groups in rollouts for g in groups],
        prompts=[r.prompts[g] for r, groups in rollouts for g in groups],
        completions=Completions(
            tokens=stack(lambda r: r.completions.tokens),
            mask=stack(lambda r: r.completions.mask),
            logp=stack(lambda r: r.completions.logp),
            truncated=stack(lambda r: r.completions.truncated),
            routing=None if widest is None else stack(lambda r: _routing(r.completions, widest)),
        ),
        texts=[r.texts[i] for (r, _), n in zip(rollouts, rows, strict=True) for i in n],
        rewards={name: stack(lambda r, n=name: r.rewards[n]) for name in rollouts[0][0].rewards},
        reward=stack(lambda r: r.reward),
        log=merged(r.log for r, _ in rollouts),
    )


def fill_with_spread(
    sample: Callable[[int], Rollout], prompts: int, rounds: int, mask_truncated: bool = False
) -> tuple[Rollout, Rollout]:
    """Dynamic sampling: draw whole rollouts until `prompts` groups have spread, `rounds` at most.

    Yu et al., 2025 (DAPO), https://arxiv.org/abs/2503.14476, §3.2. Where the rounds run out first,
    groups without spread fill the batch: they have advantage 0 and keep its shape.

    Args:
        sample: round number -> a rollout of that round's own prompts.
        mask_truncated: whether spread among responses at the length limit counts for nothing.

    Returns:
        The rollout to train on, and all that was sampled, to report rewards without selection.
    """
    drawn, chosen, count = [], [], 0
    for number in range(rounds):
        drawn.append(sample(number))
        good = groups_with_spread(drawn[-1], mask_truncated)[: prompts - count]
        chosen.append(good)
        count += len(good)
        if count == prompts:
            break
    for rollout, groups in zip(drawn, chosen, strict=True):
        others = [g for g in range(len(rollout.problems)) if g not in groups][: prompts - count]
        count += len(others)
        groups[:] = sorted(groups + others)  # as sampled: every minibatch has its share of them
    everything = [(r, range(len(r.problems))) for r in drawn]
    return join_groups(list(zip(drawn, chosen, strict=True))), join_groups(everything)


def to_train_batch(
    rollout: Rollout,
    adv: Float[np.ndarray, " B"] | None = None,
    *,
    mask_truncated: bool = False,
    pad_id: int = 0,
    width: int = 0,
) -> TrainBatch:
    """Rows of prompt + response, right-padded to `width`, or to the longest of them (`bucket`).

    Token ids go straight from the sampler to the update, never through text. With
    `mask_truncated`, responses that ran into the length limit are not trained on.
    """
    completions = rollout.completions
    mask = trained_mask(completions, mask_truncated)
    group_size = mask.shape[0] // len(rollout.prompts)
    prompt_length, length = (x.astype(np.int32) for x in text_lengths(rollout))
    B = mask.shape[0]
    tokens = np.full((B, width or bucket(int((prompt_length + length).max()))), pad_id, np.int32)
    for row in range(B):
        response = completions.tokens[row, : length[row]]
        filled = [*rollout.prompts[row // group_size], *response.tolist()]
        tokens[row, : len(filled)] = filled
    routing = None if completions.routing is None else _routing(completions, tokens.shape[1])
    return TrainBatch(tokens, prompt_length, length, mask, adv, routing)


def _routing(completions: Completions, width: int) -> Int[np.ndarray, "B S M X"]:
    """The recorded experts, cut or filled up with -1 to `width` positions."""
    assert completions.routing is not None
    cut = completions.routing[:, :width]
    fill = ((0, 0), (0, width - cut.shape[1]), (0, 0), (0, 0))
    return np.pad(cut, fill, constant_values=-1)


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


def text_lengths(rollout: Rollout) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Tokens of each response's prompt, and of the response."""
    size = len(rollout.texts) // len(rollout.problems)
    prompt = np.repeat([len(ids) for ids in rollout.prompts], size)
    return prompt, rollout.completions.length


def token_count(rollout: Rollout) -> int:
    """Prompt tokens, once per response, and response tokens."""
    return int(sum(lengths.sum() for lengths in text_lengths(rollout)))


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
