"""Accuracy on held-out problems: greedy and avg@k, each with n and a 95 % interval."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from gspo_jax.batch import Problem
from gspo_jax.config import Config
from gspo_jax.errors import DataError
from gspo_jax.generate import PureModel
from gspo_jax.policy import Policy, Problems, load_policy, load_problems
from gspo_jax.rollout import Scorer, encode_prompts, sample_completions, score_together
from gspo_jax.tasks.verify import boxed
from gspo_jax.tokenizer import Tokenizer

Z95 = 1.959964


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
) -> dict[str, float]:
    """Score greedy and sampled completions of every problem.

    Args:
        samples: completions per problem for avg@k; 0 skips them.
        temperature: of the samples.
        key: drives the samples; the same key gives the same ones at any `batch`.
        batch: prompts at a time.

    Returns:
        `eval/greedy` and `eval/avg@k` with `_low` and `_high` (95 %), `eval/n` problems, and over
        all completions the shares `eval/truncated` and `eval/no_answer` (no boxed answer) and
        `eval/mean_length` in tokens. A completion that was not scored counts as 0.
    """

    def run(temperature: float, group: int):
        scores, truncated, blank, lengths = [], [], [], []
        for start in range(0, len(problems), batch):
            part = list(problems[start : start + batch])
            completions, texts = sample_completions(
                model,
                tokenizer,
                encode_prompts(tokenizer, part),
                key=key,
                group_size=group,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                first_prompt=start,
            )
            rows = zip(completions.tokens, completions.mask, strict=True)
            ids = [row[m].tolist() for row, m in rows]
            reward = score_together(scorer, part, texts, ids)[1]
            scores.append(np.nan_to_num(reward).reshape(len(part), group))
            truncated.append(completions.truncated)
            blank.append([boxed(text) is None for text in texts])
            lengths.append(completions.mask.sum(1))
        return np.concatenate(scores), *map(np.concatenate, (truncated, blank, lengths))

    greedy, *of_greedy = run(0.0, 1)
    result = _with_interval("eval/greedy", greedy)
    others = of_greedy
    if samples:
        sampled, *others = run(temperature, samples)
        result |= _with_interval(f"eval/avg@{samples}", sampled)
    truncated, blank, lengths = others
    return result | {
        "eval/n": len(problems),
        "eval/truncated": float(np.mean(truncated)),
        "eval/no_answer": float(np.mean(blank)),
        "eval/mean_length": float(np.mean(lengths)),
    }


def evaluate_policy(
    config: Config, policy: Policy, problems: Problems, params: PyTree
) -> dict[str, float]:
    """`evaluate` as `config.eval` says; an empty dict if its split has no problems."""
    e = config.eval
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
        # Steps are numbered from 1: key 0 is free, and the same at every evaluation.
        key=jax.random.fold_in(jax.random.key(config.run.seed), 0),
        batch=e.batch,
    )


def evaluate_path(config: Config) -> dict[str, float]:
    """Evaluate the model directory that `config.model.path` names, as it stands."""
    policy = load_policy(config)
    problems = load_problems(config, policy.tokenizer)
    with jax.set_mesh(policy.mesh):
        result = evaluate_policy(config, policy, problems, policy.params)
    if not result:
        raise DataError(
            f"eval.split={config.eval.split} has no problems; it has {problems.task.size}."
        )
    return result


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927); it stays inside [0, 1]."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(scores: Float[np.ndarray, "N K"]) -> tuple[float, float]:
    """95 % interval of the mean over problems: samples of one problem are not independent."""
    per_problem = scores.mean(1)
    n = len(per_problem)
    half = Z95 * per_problem.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return float(per_problem.mean() - half), float(per_problem.mean() + half)


def _with_interval(name: str, scores: Float[np.ndarray, "N K"]) -> dict[str, float]:
    binary = scores.shape[1] == 1 and np.isin(scores, (0, 1)).all()
    low, high = wilson(int(scores.sum()), len(scores)) if binary else mean_interval(scores)
    return {name: float(scores.mean()), f"{name}_low": low, f"{name}_high": high}
