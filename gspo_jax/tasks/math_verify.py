"""Answers that are the same mathematics in other words, as math-verify judges (extra `math`).

`verify` comes first, and has the only word on what is not one box, on what is exactly right, and
on numbers: a gold number has to be answered by a number, exactly. What is left are roots,
intervals, sets, tuples and formulas. These math-verify reads as LaTeX and compares by computing,
which may take forever: it does so in a process of its own (`latex`), within limits of time and
memory.

Because it computes, a question boxed again would be right. An expression that stands in the
question is therefore left to `verify`; and so are answers whose bases, times of day or brackets
differ, which math-verify reads over: it holds 4210_7 for 4210_5, and {0,1} for (0,1).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from gspo_jax.answers.notation import choice, comparable, computes, spaceless
from gspo_jax.answers.verify import (
    Verdict,
    accuracy,
    asked,
    check,
    counts_reasoning,
    numeric,
    own_words,
)
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError

MISSING = "checker=math-verify needs the package math-verify: pip install 'gspo_jax[math]'."
CHECKERS = ("exact", "math-verify")


def reward_of(checker: str) -> Callable[..., list[float | None]]:
    """The reward function of a task whose answers are checked so: "exact" or "math-verify".

    Raises:
        ConfigError: another name, or the package is not installed.
    """
    if checker not in CHECKERS:
        raise ConfigError(f"checker={checker}: wanted one of {list(CHECKERS)}.")
    if checker == "exact":
        return accuracy
    if find_spec("math_verify") is None:
        raise ConfigError(MISSING)
    return math_verify_apart()


def math_verify_apart() -> Callable[..., list[float | None]]:
    """A reward function that asks a process of its own about what `verify` cannot decide.

    The process starts when it is first needed. An answer that keeps it busy for too long, or that
    it dies of, scores 0; the metric `math_verify/lost` counts them.
    """
    from gspo_jax.reward.remote import checker  # which imports the package of tasks on its way

    ask = checker("gspo_jax.tasks.latex:math_verify")

    @counts_reasoning
    def reward(prompts, completions, answer, log_metric=None, **columns):
        scores: list[float | None] = []
        left: list[tuple[int, str, Problem]] = []
        for b, (prompt, completion, gold) in enumerate(
            zip(prompts, completions, answer, strict=True)
        ):
            if gold is None:
                scores.append(None)
                continue
            verdict, is_final = decided(prompt, completion, gold)
            scores.append(verdict.score)
            if not is_final:
                text = rf"\boxed{{{verdict.answer}}}"
                left.append((b, text, Problem(str(b), "", str(gold))))
        if left:
            found, lost = ask([problem for *_, problem in left], [text for _, text, _ in left])
            for (b, *_), value in zip(left, found, strict=True):
                scores[b] = value
            if log_metric is not None:
                log_metric("math_verify/lost", lost)
        return scores

    return reward


def decided(prompt: Any, completion: Any, gold: str) -> tuple[Verdict, bool]:
    """What `verify` says of a completion, and whether that is the last word."""
    question, gold = asked(prompt), str(gold)
    verdict = check(own_words(prompt, completion), gold, question)
    if verdict.reason != "wrong" or not gold.strip():
        return verdict, True
    answer = str(verdict.answer)
    if numeric(gold) is not None or choice(gold) is not None or not comparable(answer, gold):
        return verdict, True
    return verdict, computes(answer) and spaceless(answer) in spaceless(question)
