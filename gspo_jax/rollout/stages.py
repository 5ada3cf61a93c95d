"""The stages of a rollout: prompts -> groups of completions -> texts -> scores."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Array, Key

from gspo_jax.batch import Completions, Problem, Rollout
from gspo_jax.mesh.distributed import gathered, own_rows
from gspo_jax.numbers.tally import Tally, merged, packed, unpacked
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.rollout.engine import PureModel, generate
from gspo_jax.rollout.truncation import overlong_punishment

# `reward.rewards.score` with its functions bound.
Scorer = Callable[..., tuple[dict[str, np.ndarray], np.ndarray, dict[str, Tally]]]


def with_opened(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[Problem]:
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
    return completions, tokenizer.decode_batch(completions.ids)


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
    rewards, reward, log = score_together(scorer, problems, texts, completions.ids)
    if overlong_buffer:
        rewards = rewards | {"overlong": overlong_punishment(completions, overlong_buffer)}
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
