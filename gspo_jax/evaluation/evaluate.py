"""Accuracy on held-out problems: greedy, avg@k, pass@k and maj@k, with n and 95 % intervals.

responses     one record per response, batch by batch
summary       records -> metrics, from memory or from saved files
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from gspo_jax.batch import Problem
from gspo_jax.config.load import Config
from gspo_jax.errors import DataError
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.numbers.statistics import estimate
from gspo_jax.numbers.summary import Record, measures
from gspo_jax.policy import Policy, Problems, load_policy, load_problems, within_positions
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.rollout.engine import PureModel
from gspo_jax.rollout.stages import Scorer, sample_completions, score_together, with_opened
from gspo_jax.tasks.task import boxed_in


def evaluate(
    model: PureModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    scorer: Scorer,
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    key: Key[Array, ""],
    batch: int = 64,
    answer_in: Callable[[Problem, str], str | None] = boxed_in,
) -> dict[str, float]:
    """Score greedy and sampled completions of every problem.

    Args:
        samples: completions per problem for avg@k, pass@k and maj@k; 0 skips them.
        temperature: of the samples.
        key: drives the samples; the same key gives the same ones at any `batch`.
        batch: prompts at a time.
        answer_in: the answer that is read out of a response, as `Task.answer_in`.

    Returns:
        `eval/greedy`, `eval/avg@k`, `eval/pass@k` and `eval/maj@k` with `_low` and `_high` (95 %),
        `eval/n` problems, and over the samples (without any, the greedy completions) the shares
        `eval/truncated`, `eval/no_answer` (none that `answer_in` reads) and `eval/not_scored`
        (which count as 0), and `eval/mean_length` in tokens. Where some problem has no answer to
        compare with, neither `eval/maj@k` nor `eval/no_answer`.
    """
    run = partial(
        responses,
        model,
        tokenizer,
        problems,
        scorer,
        max_new_tokens=max_new_tokens,
        key=key,
        batch=batch,
        answer_in=answer_in,
    )
    drawn = run(samples=samples, temperature=temperature) if samples else ()
    found = measures(chain.from_iterable(chain(run(), drawn)))
    result: dict[str, float] = {}
    for kind in ("greedy", *(f"{kind}@{samples}" for kind in ("avg", "pass", "maj"))):
        if kind in found:
            value, low, high, _ = estimate(*found[kind])
            result |= {f"eval/{kind}": value, f"eval/{kind}_low": low, f"eval/{kind}_high": high}
    of = f"avg@{samples}" if samples else "greedy"
    names = {
        "truncated": "truncated",
        "no_answer": "no answer",
        "not_scored": "not scored",
        "mean_length": "tokens",
    }
    return result | {
        "eval/n": len(problems),
        **{
            f"eval/{k}": float(found[f"{of}/{what}"].values.mean())
            for k, what in names.items()
            if f"{of}/{what}" in found
        },
    }


def responses(
    model: PureModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    scorer: Scorer,
    *,
    max_new_tokens: int,
    key: Key[Array, ""],
    samples: int = 0,
    temperature: float = 0.0,
    batch: int = 64,
    answer_in: Callable[[Problem, str], str | None] = boxed_in,
    start: int = 0,
) -> Iterator[list[Record]]:
    """The records of `summary`, of one batch of problems after the other.

    Args:
        samples: responses per problem, which are numbered from 1; 0 is the greedy one, number 0.
        temperature: of the samples.
        start: the problem to begin with, a multiple of `batch`. What follows is what would have
            followed the problems before it.
    """
    group, first = max(samples, 1), min(samples, 1)
    for begin in range(start, len(problems), batch):
        part = with_opened(tokenizer, problems[begin : begin + batch])
        completions, texts = sample_completions(
            model,
            tokenizer,
            tokenizer.encode_prompts([p.prompt for p in part]),
            key=key,
            group_size=group,
            max_new_tokens=max_new_tokens,
            temperature=temperature if samples else 0.0,
            first_prompt=begin,
        )
        ids = completions.ids
        reward = score_together(scorer, part, texts, ids)[1]
        yield [
            _record(
                part[b // group],
                text,
                answer_in,
                index=begin + b // group,
                sample=first + b % group,
                score=float(reward[b]) if np.isfinite(reward[b]) else None,
                tokens=len(ids[b]),
                truncated=bool(completions.truncated[b]),
            )
            for b, text in enumerate(texts)
        ]


def _record(
    problem: Problem, text: str, answer_in: Callable[[Problem, str], str | None], **rest: Any
) -> Record:
    """A record; without an "answer" where there is none to compare one with."""
    opened = {"opened": problem.opened} if problem.opened else {}
    read = answer_in(problem, problem.opened + text)
    answer = {} if problem.answer is None else {"answer": read}
    return {"id": problem.id, **rest, **answer, **opened, "text": text}


def evaluate_policy(
    config: Config, policy: Policy, problems: Problems, params: PyTree
) -> dict[str, float]:
    """`evaluate` as `config.eval` says; {} if its split has no problems, or nothing scores them."""
    e = config.eval
    if problems.task.unscored and not config.task.rewards:
        return {}
    count = min(e.problems, len(problems.indices.get(e.split, ())))
    if not count:
        return {}
    return evaluate(
        policy.sampler(params),
        policy.tokenizer,
        problems.get(e.split, range(count)),
        problems.scorer,
        samples=e.samples,
        temperature=e.temperature,
        max_new_tokens=config.rollout.max_completion_length,
        key=evaluation_key(config),
        batch=e.batch,
        answer_in=problems.task.answer_in,
    )


def evaluate_path(config: Config) -> dict[str, float]:
    """Evaluate the model directory that `config.model.path` names, as it stands."""
    policy = load_policy(config)
    problems = load_problems(config, policy.tokenizer, train=False)
    shape = read_model_config(policy.directory)
    problems = within_positions(config, shape, problems, [config.eval.split])
    with jax.set_mesh(policy.mesh):
        result = evaluate_policy(config, policy, problems, policy.params)
    if not result:
        raise DataError(
            f"eval.split={config.eval.split} has no problems; it has {problems.task.size}."
        )
    return result


def evaluation_key(config: Config) -> Key[Array, ""]:
    """Of the samples: steps are numbered from 1, so 0 is free, and the same at every evaluation."""
    return jax.random.fold_in(jax.random.key(config.run.seed), 0)
