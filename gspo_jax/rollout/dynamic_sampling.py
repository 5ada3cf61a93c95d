"""Dynamic sampling: more rounds of prompts, until enough groups have spread in their rewards.

Yu et al., 2025 (DAPO), https://arxiv.org/abs/2503.14476, §3.2.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from gspo_jax.batch import Rollout
from gspo_jax.numbers.tally import merged
from gspo_jax.rollout.train_rows import with_routing
from gspo_jax.rollout.truncation import trained_mask


def fill_with_spread(
    sample: Callable[[int], Rollout], prompts: int, rounds: int, mask_truncated: bool = False
) -> tuple[Rollout, Rollout]:
    """Dynamic sampling: draw whole rollouts until `prompts` groups have spread, `rounds` at most.

    Where the rounds run out first, groups without spread fill the batch: they have advantage 0 and
    keep its shape.

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
    chosen = [(rollout, list(groups)) for rollout, groups in parts if len(groups)]
    rollouts = [rollout for rollout, _ in chosen]
    size = len(rollouts[0].texts) // len(rollouts[0].problems)
    rows = [[g * size + i for g in groups for i in range(size)] for _, groups in chosen]
    widest = max(0 if (x := r.completions.routing) is None else x.shape[1] for r in rollouts)

    def stack(*fields: np.ndarray) -> np.ndarray:
        return np.concatenate([field[n] for field, n in zip(fields, rows, strict=True)])

    return Rollout(
        problems=[r.problems[g] for r, groups in chosen for g in groups],
        prompts=[r.prompts[g] for r, groups in chosen for g in groups],
        completions=jax.tree.map(stack, *(with_routing(r.completions, widest) for r in rollouts)),
        texts=[r.texts[i] for r, n in zip(rollouts, rows, strict=True) for i in n],
        rewards={name: stack(*(r.rewards[name] for r in rollouts)) for name in rollouts[0].rewards},
        reward=stack(*(r.reward for r in rollouts)),
        log=merged(r.log for r in rollouts),
    )
