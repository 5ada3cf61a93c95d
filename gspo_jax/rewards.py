"""Reward functions of the user's own: found by name, called by their signature, checked row by row.

What a function is called with follows from the names of its parameters:

    prompts, completions, ...                    once per batch (TRL); returns a list
    solution_str, ground_truth, ...              once per response (verl's compute_score)
    completion, answer, ...                      once per response (verifiers)
    answer, entry                                once per response (reasoning-gym)

Other parameters are filled with the data's columns of the same name. Functions may be async.
"""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import logging
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.tasks.verify import boxed

_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids"}

LARGEST = float(np.finfo(np.float32).max)  # of a reward

logger = logging.getLogger(__name__)


def load_rewards(specs: Sequence[str | Callable]) -> dict[str, Callable]:
    """Reward functions by name, from "package.module:function" or "path/file.py:function".

    Modules are also looked for in the current directory. A function given as such is taken as
    it is. Where two have the same name, the later one is called "name_2".

    Raises:
        ConfigError: a text that is neither form.
        DataError: no such file, module or function, or one that cannot be imported or called.
    """
    functions: dict[str, Callable] = {}
    for spec in specs:
        function = _find(spec) if isinstance(spec, str) else spec
        base = name = getattr(function, "__name__", type(function).__name__)
        number = 1
        while name in functions:
            number += 1
            name = f"{base}_{number}"
        _convention(name, function)  # refuses here what could not be called later
        functions[name] = function
    return functions


def score(
    functions: Mapping[str, Callable],
    weights: Sequence[float | int] | None,
    problems: Sequence[Problem],
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    *,
    step: int | None = None,
    strict: bool = True,
) -> tuple[dict[str, Float[np.ndarray, " B"]], Float[np.ndarray, " B"], dict[str, float]]:
    """Score B responses to P problems; response b answers problem b // (B / P).

        reward[b] = Σ_f weight_f * rewards[f][b], over the functions that scored response b

    A function returns None for a response that it does not apply to: NaN in `rewards`, and NaN
    in `reward` where no function applied.

    Args:
        functions: by name, as `load_rewards` returns them.
        weights: one per function; None is 1 each.
        texts: the responses as text, without special tokens.
        token_ids: the responses as sampled, for functions that ask for `completion_ids`.
        step: what `trainer_state.global_step` shows to functions that ask for it.
        strict: raise if a function raises. Otherwise what it was scoring gets 0, and
            `rewards/<name>/errors` counts those responses.

    Returns:
        Each function's scores, their weighted sum, and the means of the numbers that functions
        logged or returned beside their score.

    Raises:
        DataError: a function that raised, or returned anything but one finite number or None
            per response; the message names it and the response.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if not functions or len(weights) != len(functions):
        raise ConfigError(f"got {len(weights)} weights for {len(functions)} reward functions.")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"the reward weights {weights} must be finite.")
    B = len(texts)
    if not problems or B % len(problems) or len(token_ids) != B:
        raise ValueError(f"{B} texts, {len(token_ids)} id lists, {len(problems)} problems.")
    batch = _Batch.of(problems, texts, token_ids, step)
    rewards = {}
    for name, function in functions.items():
        rewards[name] = _checked(name, _call(name, function, batch, strict), batch)
    each = np.stack(list(rewards.values()))  # [functions, B]
    scored = ~np.isnan(each)
    parts = np.where(scored, each, 0) * np.asarray(weights, np.float64)[:, None]
    reward = np.where(scored.any(0), parts.sum(0), np.nan).astype(np.float32)
    return rewards, reward, {k: float(np.mean(v)) for k, v in batch.logged.items()}


@dataclass(frozen=True)
class _Batch:
    """What reward functions may ask for, one entry per response."""

    problems: list[Problem]
    texts: list[str]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]
    step: int | None
    logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, problems, texts, token_ids, step) -> "_Batch":
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

    def log(self, name: str, value: Any) -> None:
        self.logged[name].append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """TRL's columns for a table of responses; of these, numbers are averaged and logged."""
        numbers = [float(v) for v in values if _is_number(v)]
        if numbers:
            self.log(column, math.fsum(numbers) / len(numbers))


def _call(name: str, function: Callable, batch: _Batch, strict: bool) -> Any:
    """What the function returned, as one entry per response, not yet checked."""
    convention = _convention(name, function)
    if convention is _trl:
        arguments = [_trl(batch)]
    else:
        arguments = [convention(batch, b) for b in range(len(batch.texts))]
    calls = [_accepted(name, function, given, batch) for given in arguments]
    results, errors = _run(function, calls)
    if errors:
        first = next(error for error in errors if error is not None)
        failed = sum(error is not None for error in errors)
        rows = len(batch.texts) if convention is _trl else failed
        if strict:
            raise DataError(
                f"reward {name} raised {type(first).__name__}: {_one_line(first)} "
                f"(on {rows} of {len(batch.texts)} responses)."
            ) from first
        batch.log(f"rewards/{name}/errors", rows)
        logger.warning("reward %s raised on %d responses", name, rows, exc_info=first)
        failure = [0.0] * len(batch.texts) if convention is _trl else 0.0
        results = [failure if e else r for r, e in zip(results, errors, strict=True)]
    if convention is _trl:
        return results[0]
    return [_number_of(name, result, batch) for result in results]


def _trl(batch: _Batch) -> dict[str, Any]:
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


def _row(batch: _Batch, b: int) -> dict[str, Any]:
    return {name: values[b] for name, values in batch.columns.items()}


def _verl(batch: _Batch, b: int) -> dict[str, Any]:
    return {
        "data_source": None,
        "extra_info": None,
        **_row(batch, b),
        "solution_str": batch.texts[b],
        "ground_truth": batch.problems[b].answer,
    }


def _verifiers(batch: _Batch, b: int) -> dict[str, Any]:
    return {
        **_row(batch, b),
        "prompt": batch.problems[b].prompt,
        "completion": batch.completion(b),
    }


def _reasoning_gym(batch: _Batch, b: int) -> dict[str, Any]:
    problem, text = batch.problems[b], batch.texts[b]
    tagged = _TAGGED.findall(text)
    row = _row(batch, b)
    return {
        "answer": tagged[-1].strip() if tagged else boxed(text),
        "entry": {"question": problem.prompt, "metadata": {}, **row, "answer": problem.answer},
    }


def _convention(name: str, function: Callable) -> Callable:
    """Which of the four ways a function wants to be called, from its parameters' names."""
    if not callable(function):
        raise DataError(f"reward {name}: got {type(function).__name__}, wanted a function.")
    parameters = _parameters(name, function)
    if {"prompts", "completions", "completion_ids"} & set(parameters):
        return _trl
    if {"solution_str", "ground_truth"} <= set(parameters):
        return _verl
    if {"answer", "entry"} <= set(parameters):
        return _reasoning_gym
    if "completion" in parameters:
        return _verifiers
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return _trl
    raise DataError(
        f"reward {name} takes {list(parameters)}; it must take `completions` (all of them, and "
        "return a list), or `completion`, or `solution_str` and `ground_truth`."
    )


def _parameters(name: str, function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some functions written in C
        raise DataError(f"reward {name}: its parameters are unknown; wrap it in a def.") from None


def _accepted(name: str, function: Callable, given: dict, batch: _Batch) -> dict[str, Any]:
    """The part of `given` that the function has parameters for."""
    parameters = _parameters(name, function)
    for parameter in parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and parameter.name not in given:
            raise DataError(
                f"reward {name} takes {parameter.name!r}, but the data has no such column; "
                f"it has {sorted(batch.columns)}."
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {key: value for key, value in given.items() if key in parameters}


def _run(function: Callable, calls: list[dict]) -> tuple[list[Any], list[Exception | None]]:
    """Results and errors of the calls; errors is empty if there are none."""
    results: list[Any] = []
    for call in calls:
        try:
            results.append(function(**call))
        except Exception as error:  # code of the user: anything
            results.append(error)
    if any(inspect.isawaitable(result) for result in results):
        results = _await_all(results)
    errors = [result if isinstance(result, Exception) else None for result in results]
    return results, errors if any(errors) else []


def _await_all(results: list[Any]) -> list[Any]:
    """The same list, with what the awaitables in it came to; all of them run at once."""

    async def all_of_them() -> list[Any]:
        waiting = [r for r in results if inspect.isawaitable(r)]
        done = iter(await asyncio.gather(*waiting, return_exceptions=True))
        return [next(done) if inspect.isawaitable(r) else r for r in results]

    # A thread of its own, because a notebook's thread already runs an event loop.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(all_of_them())).result()


def _number_of(name: str, result: Any, batch: _Batch) -> Any:
    """A per-response result without its wrapping: verl's {"score": ..., "acc": ...}."""
    if not isinstance(result, dict):
        return result
    for key, value in result.items():
        if key != "score" and _is_number(value):
            batch.log(f"rewards/{name}/{key}", value)
    return result.get("score", "no 'score'")


def _checked(name: str, values: Any, batch: _Batch) -> Float[np.ndarray, " B"]:
    B = len(batch.texts)
    try:
        rows = None if isinstance(values, str | Mapping) else list(values)
    except TypeError:
        rows = None
    if rows is None:
        raise DataError(f"reward {name} returned {_shown(values)}, wanted a list of {B} numbers.")
    if len(rows) != B:
        raise DataError(
            f"reward {name} returned {len(rows)} numbers for {B} responses; "
            "it must return one per response, or None where it does not apply."
        )
    out = np.full(B, np.nan, np.float32)
    for b, value in enumerate(rows):
        value = value.item() if getattr(value, "shape", None) == () else value
        if value is None:
            continue
        if not _is_number(value) or abs(value) > LARGEST:
            raise DataError(
                f"reward {name} returned {_shown(value)} for response {b} of {B} (to problem "
                f"{batch.problems[b].id}); wanted a finite number, or None for no score."
            )
        out[b] = value
    return out


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _find(spec: str) -> Callable:
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ConfigError(f"reward {spec!r}: wanted module:function or file.py:function.")
    module = _from_file(Path(where), spec) if where.endswith(".py") else _from_name(where, spec)
    try:
        function = getattr(module, name)
    except AttributeError:
        close = difflib.get_close_matches(name, dir(module), 1)
        hint = f" Did you mean {where}:{close[0]}?" if close else ""
        raise DataError(f"reward {spec}: {where} has no {name!r}.{hint}") from None
    if not callable(function):
        raise DataError(f"reward {spec}: got {type(function).__name__}, wanted a function.")
    return function


def _from_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise DataError(f"reward {spec}: no such file {path}.")
    path = path.resolve()
    _add_path(path.parent)  # its neighbours can be imported, as when it is run as a script
    name = f"gspo_jax_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # it is a .py file
    loader, module = module_spec.loader, importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    _import(spec, lambda: loader.exec_module(module))
    return module


def _from_name(name: str, spec: str) -> ModuleType:
    _add_path(Path(os.getcwd()))
    return _import(spec, lambda: importlib.import_module(name))


def _add_path(directory: Path) -> None:
    # At the end, so that nothing installed is shadowed by a file that happens to lie there.
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _import(spec: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # code of the user: anything
        raise DataError(
            f"reward {spec}: importing it raised {type(error).__name__}: {_one_line(error)}."
        ) from error


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300].removesuffix(".")
