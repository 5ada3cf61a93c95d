"""What a reward function is called with, which follows from the names of its parameters.

    prompts, completions, ...                    once per batch (TRL); returns a list
    solution_str, ground_truth, ...              once per response (verl's compute_score)
    completion, answer, ...                      once per response (verifiers)
    answer, entry                                once per response (reasoning-gym)
    query, response, and perhaps item            once per response

Other parameters are filled with the data's columns of the same name.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from types import SimpleNamespace
from typing import Any

from gspo_jax.answers.verify import COUNTS_REASONING, after_reasoning, boxed
from gspo_jax.batch import Problem
from gspo_jax.errors import DataError
from gspo_jax.numbers.tally import Average, Count, Tally, merged

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids"}


@dataclass(frozen=True)
class Batch:
    """What reward functions may ask for, one entry per response."""

    problems: list[Problem]
    texts: list[str]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]
    step: int | None
    logged: dict[str, Tally] = field(default_factory=dict)

    @classmethod
    def of(cls, problems, texts, token_ids, step) -> "Batch":
        group = len(texts) // len(problems)
        rows = [problem for problem in problems for _ in range(group)]
        names = dict.fromkeys(k for p in problems for k in p.columns if k not in _RESERVED)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        # The gold answer as the task understood it, rather than as the data spells it.
        if "answer" not in columns or any(p.answer is not None for p in problems):
            columns["answer"] = [row.answer for row in rows]
        return cls(rows, list(texts), [list(ids) for ids in token_ids], columns, step)

    def completion(self, b: int) -> str | list[dict[str, str]]:
        """The response in the form of its prompt: a text, or a chat of one message."""
        if isinstance(self.problems[b].prompt, str):
            return self.texts[b]
        return [{"role": "assistant", "content": self.texts[b]}]

    def as_read(self, function: Callable) -> "Batch":
        """This batch as `function` reads it: see `tasks.verify.counts_reasoning`."""
        opened = [problem.opened for problem in self.problems]
        if not any(opened) or not getattr(function, COUNTS_REASONING, False):
            return self
        return replace(self, texts=[a + b for a, b in zip(opened, self.texts, strict=True)])

    def log(self, name: str, value: Any) -> None:
        """A number that holds for all responses alike."""
        self.add({name: Average(float(value), len(self.texts))})

    def count(self, name: str, number: int) -> None:
        self.add({name: Count(number)})

    def add(self, logged: Mapping[str, Tally]) -> None:
        """To what was logged before."""
        self.logged.update(merged([self.logged, logged]))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """TRL's columns for a table of responses; of these, numbers are averaged and logged."""
        numbers = [float(v) for v in values if is_number(v)]
        if numbers:
            self.add({column: Average(math.fsum(numbers) / len(numbers), len(numbers))})


def trl(batch: Batch) -> dict[str, Any]:
    rows = range(len(batch.texts))
    return {
        **batch.columns,
        "prompts": [problem.prompt for problem in batch.problems],
        "completions": [batch.completion(b) for b in rows],
        "completion_ids": batch.token_ids,
        "trainer_state": SimpleNamespace(global_step=batch.step),
        "log_metric": batch.log,
        "log_extra": batch.log_extra,
    }


def _row(batch: Batch, b: int) -> dict[str, Any]:
    return {name: values[b] for name, values in batch.columns.items()}


def _verl(batch: Batch, b: int) -> dict[str, Any]:
    row, answer = _row(batch, b), batch.problems[b].answer
    if answer is None:  # what its functions compare may be an object
        answer = row.get("ground_truth", (row.get("reward_model") or {}).get("ground_truth"))
    return {
        "data_source": None,
        "extra_info": None,
        **row,
        "solution_str": batch.texts[b],
        "ground_truth": answer,
    }


def _verifiers(batch: Batch, b: int) -> dict[str, Any]:
    return {
        **_row(batch, b),
        "prompt": batch.problems[b].prompt,
        "completion": batch.completion(b),
    }


def _reasoning_gym(batch: Batch, b: int) -> dict[str, Any]:
    problem = batch.problems[b]
    text = after_reasoning(problem.opened + batch.texts[b])  # the answer is read here, for it
    tagged = _TAGGED.findall(text)
    row = _row(batch, b)
    return {
        "answer": tagged[-1].strip() if tagged else boxed(text),
        "entry": {"question": problem.prompt, "metadata": {}, **row, "answer": problem.answer},
    }


def _query(batch: Batch, b: int) -> dict[str, Any]:
    row, prompt = _row(batch, b), batch.problems[b].prompt
    return {
        **row,
        "query": prompt,
        "response": batch.texts[b],
        "item": {**row, "prompt": prompt},
    }


def convention(name: str, function: Callable) -> Callable:
    """Which of these ways a function wants to be called, from its parameters' names."""
    if not callable(function):
        raise DataError(f"reward {name}: got {type(function).__name__}, wanted a function.")
    parameters = parameters_of(name, function)
    if {"prompts", "completions", "completion_ids"} & set(parameters):
        return trl
    if {"solution_str", "ground_truth"} <= set(parameters):
        return _verl
    if {"answer", "entry"} <= set(parameters):
        return _reasoning_gym
    if {"query", "response"} <= set(parameters):
        return _query
    if "completion" in parameters:
        return _verifiers
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return trl
    raise DataError(
        f"reward {name} takes {list(parameters)}; it must take `completions` (all of them, and "
        "return a list), or `completion`, or `query` and `response`, or `solution_str` and "
        "`ground_truth`."
    )


def parameters_of(name: str, function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some functions written in C
        raise DataError(f"reward {name}: its parameters are unknown; wrap it in a def.") from None


def accepted(name: str, function: Callable, given: dict, batch: Batch) -> dict[str, Any]:
    """The part of `given` that the function has parameters for.

    Raises:
        DataError: a parameter that nothing fills; the text goes on after the function's name.
    """
    parameters = parameters_of(name, function)
    for parameter in parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in given:
            raise DataError(
                f"takes {parameter.name!r}, but the data has no such column; "
                f"it has {sorted(batch.columns)}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {key: value for key, value in given.items() if key in parameters}


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False
