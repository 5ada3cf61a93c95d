"""Reward functions of the user's own: found by name, called by their signature, checked row by row.

`signatures` says how; functions may be async. A function that `workers` runs in another process
is asked in the same way.
"""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.signatures import Batch, accepted, convention, is_number, trl
from gspo_jax.stopping import raise_if_asked

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
        name = unused(own_name(function), functions)
        convention(name, function)  # refuses here what could not be called later
        functions[name] = function
    return functions


def own_name(function: Callable) -> str:
    """A function's, or the class's of an object that can be called."""
    return getattr(function, "__name__", type(function).__name__)


def unused(base: str, taken: Mapping[str, Any]) -> str:
    """`base`, or the first of "base_2", "base_3", ... that is free."""
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def score(
    functions: "Mapping[str, Callable | Apart]",
    weights: Sequence[float | int] | None,
    problems: Sequence[Problem],
    texts: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    *,
    step: int | None = None,
    strict: bool = True,
    told: set[str] | None = None,
) -> tuple[dict[str, Float[np.ndarray, " B"]], Float[np.ndarray, " B"], dict[str, float]]:
    """Score B responses to P problems; response b answers problem b // (B / P).

        reward[b] = Σ_f weight_f * rewards[f][b], over the functions that scored response b

    A function returns None for a response that it does not apply to: NaN in `rewards`, and NaN
    in `reward` where no function applied.

    Args:
        functions: by name, as `load_rewards` or `workers.load_remote` returns them.
        weights: one per function; None is 1 each.
        texts: the responses as text, without special tokens.
        token_ids: the responses as sampled, for functions that ask for `completion_ids`.
        step: what `trainer_state.global_step` shows to functions that ask for it.
        strict: raise if a function fails, which is to raise, to hang or to crash. Otherwise what
            it was scoring gets 0, and `rewards/<name>/errors` counts those responses.
        told: functions whose first failure has been logged; the caller keeps it.

    Returns:
        Each function's scores, their weighted sum, and the means of the numbers that functions
        logged or returned beside their score.

    Raises:
        DataError: a function that failed, or returned anything but one finite number or None
            per response; the message names it and the response.
        Abandoned: the run in progress was asked to stop.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if not functions or len(weights) != len(functions):
        raise ConfigError(f"got {len(weights)} weights for {len(functions)} reward functions.")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"the reward weights {weights} must be finite.")
    B = len(texts)
    if not problems or B % len(problems) or len(token_ids) != B:
        raise ValueError(f"{B} texts, {len(token_ids)} id lists, {len(problems)} problems.")
    batch = Batch.of(problems, texts, token_ids, step)
    rewards = {}
    for name, function in functions.items():
        apart = isinstance(function, Apart)
        found = function.answers_of_child(name, batch) if apart else answers(name, function, batch)
        values, failed = np.full(B, np.nan, np.float32), []
        for answer in found:
            values[answer.rows] = answer.values
            failed += [answer] if answer.failure else []
        if failed:
            _fail(name, failed, batch, strict, set() if told is None else told)
        rewards[name] = values
    each = np.stack(list(rewards.values()))  # [functions, B]
    scored = ~np.isnan(each)
    parts = np.where(scored, each, 0) * np.asarray(weights, np.float64)[:, None]
    reward = np.where(scored.any(0), parts.sum(0), np.nan).astype(np.float32)
    return rewards, reward, {k: float(np.mean(v)) for k, v in batch.logged.items()}


class Failure(NamedTuple):
    """Why responses have no score of the function's: what it did, after its name."""

    what: str  # "raised ZeroDivisionError: division by zero"
    trace: str = ""
    cause: Exception | None = None  # where it was called in this process


class Answer(NamedTuple):
    """What a function says of some responses: numbers, NaN where it does not apply."""

    rows: list[int]
    values: list[float]  # 0 with a failure
    failure: Failure | None = None


@runtime_checkable
class Apart(Protocol):
    """A function that is called in another process."""

    def answers_of_child(self, name: str, batch: Batch) -> Iterator[Answer]: ...


class _Elsewhere(Exception):
    """Stands for an exception of another process, of which the traceback came here."""


def answers(
    name: str,
    function: Callable,
    batch: Batch,
    rows: Sequence[int] | None = None,
    *,
    seconds: float | None = None,
) -> Iterator[Answer]:
    """Call the function for these responses, or for all; in order, but for async ones.

    Args:
        seconds: for an async function to return; nothing here interrupts the others.

    Raises:
        DataError: what it returned is not what it should be.
    """
    wanted, batch = convention(name, function), batch.as_read(function)
    rows = range(len(batch.texts)) if rows is None else rows
    if whole := wanted is trl:
        calls = [(list(rows), trl(batch))]
    else:
        calls = [([b], wanted(batch, b)) for b in rows]
    calls = [(asked, accepted(name, function, given, batch)) for asked, given in calls]
    waiting = []
    for asked, given in calls:
        raise_if_asked()
        try:
            result = function(**given)
        except Exception as error:  # code of the user: anything
            result = error
        if inspect.isawaitable(result):
            waiting.append((asked, result))
        else:
            yield _answer(name, asked, result, batch, whole)
    results = _await_all([result for _, result in waiting], seconds) if waiting else []
    for (asked, _), result in zip(waiting, results, strict=True):
        yield _answer(name, asked, result, batch, whole)


def calls_one_by_one(name: str, function: Callable) -> bool:
    """Whether the function is called for one response after the other."""
    called = function if inspect.isroutine(function) else type(function).__call__
    return convention(name, function) is not trl and not inspect.iscoroutinefunction(called)


def _answer(name: str, rows: list[int], result: Any, batch: Batch, whole: bool) -> Answer:
    if isinstance(result, Exception):
        what = f"raised {type(result).__name__}: {_one_line(result)}"
        trace = "".join(traceback.format_exception(result))
        return Answer(rows, [0.0] * len(rows), Failure(what, trace, result))
    values = result if whole else [_number_of(name, result, batch)]
    return Answer(rows, _checked(name, values, rows, batch))


def _fail(name: str, failed: list[Answer], batch: Batch, strict: bool, told: set[str]) -> None:
    """Raise, or count the responses and log the first failure of the run."""
    count, (what, trace, cause) = sum(len(a.rows) for a in failed), failed[0].failure or Failure("")
    text = f"reward {name} {what} (on {count} of {len(batch.texts)} responses)."
    if strict:
        raise DataError(text) from (cause or (_Elsewhere(trace) if trace else None))
    batch.log(f"rewards/{name}/errors", count)
    if name not in told:
        told.add(name)
        with suppress(Exception):  # a handler of the user's own may raise
            logger.warning("%s They score 0, here and later.\n%s", text, trace)


def _await_all(waiting: list[Any], seconds: float | None) -> list[Any]:
    """What the awaitables came to, an exception where they raised; all of them run at once."""

    async def all_of_them() -> list[Any]:
        limited = [asyncio.wait_for(each, seconds) for each in waiting]
        return await asyncio.gather(*limited, return_exceptions=True)

    # A thread of its own, because a notebook's thread already runs an event loop.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(all_of_them())).result()


def _number_of(name: str, result: Any, batch: Batch) -> Any:
    """A per-response result without its wrapping: verl's {"score": ..., "acc": ...}."""
    if not isinstance(result, dict):
        return result
    for key, value in result.items():
        if key != "score" and is_number(value):
            batch.log(f"rewards/{name}/{key}", value)
    return result.get("score", "no 'score'")


def _checked(name: str, values: Any, asked: list[int], batch: Batch) -> list[float]:
    """One number for each response asked about; NaN for None."""
    B = len(batch.texts)
    try:
        found = None if isinstance(values, str | Mapping) else list(values)
    except TypeError:
        found = None
    if found is None:
        raise DataError(f"reward {name} returned {_shown(values)}, wanted a list of {B} numbers.")
    if len(found) != len(asked):
        raise DataError(
            f"reward {name} returned {len(found)} numbers for {B} responses; "
            "it must return one per response, or None where it does not apply."
        )
    out = []
    for b, value in zip(asked, found, strict=True):
        value = value.item() if getattr(value, "shape", None) == () else value
        if value is not None and (not is_number(value) or abs(value) > LARGEST):
            raise DataError(
                f"reward {name} returned {_shown(value)} for response {b} of {B} (to problem "
                f"{batch.problems[b].id}); wanted a finite number, or None for no score."
            )
        out.append(math.nan if value is None else float(value))
    return out


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


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
