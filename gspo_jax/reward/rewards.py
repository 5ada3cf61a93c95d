"""Reward functions of the user's own: found by name, called by their signature, checked row by row.

`signatures` says how; functions may be async. A function that `remote` runs in another process
is asked in the same way. Whatever keeps a function from giving a number is one thing, a `Failure`
of the responses that it was asked about, and one rule (`score`) says what comes of it.
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
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.files.stopping import raise_if_asked
from gspo_jax.numbers.tally import Average, Tally
from gspo_jax.reward.signatures import Batch, accepted, convention, is_number, trl

LARGEST = float(np.finfo(np.float32).max)  # of a reward

Errors = Literal["zero", "unscored", "stop"]  # as settings.TaskConfig.reward_errors has them

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
    errors: Errors = "stop",
    told: set[str] | None = None,
) -> tuple[dict[str, Float[np.ndarray, " B"]], Float[np.ndarray, " B"], dict[str, Tally]]:
    """Score B responses to P problems; response b answers problem b // (B / P).

        reward[b] = Σ_f weight_f * rewards[f][b], over the functions that scored response b

    A function returns None for a response that it does not apply to: NaN in `rewards`, and NaN
    in `reward` where no function applied.

    Args:
        functions: by name, as `load_rewards` or `remote.load_remote` returns them.
        weights: one per function; None is 1 each.
        texts: the responses as text, without special tokens.
        token_ids: the responses as sampled, for functions that ask for `completion_ids`.
        step: what `trainer_state.global_step` shows to functions that ask for it.
        errors: what comes of responses on which a function fails: it raises, hangs or crashes, or
            returns anything but one finite number or None for each. "zero" gives them 0 from it;
            "unscored" gives them no `reward` at all, NaN, since the other functions' sum would
            not compare with the rest of their group. `rewards/<name>/errors` counts them.
        told: functions whose first failure has been logged; the caller keeps it.

    Returns:
        Each function's scores, their weighted sum, and what functions logged or returned beside
        their score: means of it, and counts of errors.

    Raises:
        DataError: with errors="stop", a function that failed; the message names it, and the
            response where there is one.
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
    rewards, unscored = {}, np.zeros(B, bool)
    for name, function in functions.items():
        apart = isinstance(function, Apart)
        found = function.answers_of_child(name, batch) if apart else answers(name, function, batch)
        values, failed = np.full(B, np.nan, np.float32), []
        for answer in found:
            values[answer.rows] = answer.values
            failed += [answer] if answer.failure else []
        if failed:
            _count_or_stop(name, failed, batch, errors, set() if told is None else told)
        if errors == "unscored":
            rows = [b for answer in failed for b in answer.rows]
            values[rows], unscored[rows] = np.nan, True
        rewards[name] = values
    each = np.stack(list(rewards.values()))  # [functions, B]
    scored = ~np.isnan(each)
    parts = np.where(scored, each, 0) * np.asarray(weights, np.float64)[:, None]
    total = np.clip(parts.sum(0), -LARGEST, LARGEST)  # of finite numbers, and finite
    reward = np.where(scored.any(0) & ~unscored, total, np.nan).astype(np.float32)
    return rewards, reward, batch.logged


class Failure(NamedTuple):
    """Why responses have no score of the function's: what it did, after its name."""

    what: str  # "raised ZeroDivisionError: division by zero", "returned nan (float) for ..."
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
    """
    wanted, batch = convention(name, function), batch.as_read(function)
    rows = range(len(batch.texts)) if rows is None else rows
    if whole := wanted is trl:
        calls = [(list(rows), trl(batch))]
    else:
        calls = [([b], wanted(batch, b)) for b in rows]
    waiting = []
    for asked, given in calls:
        raise_if_asked()
        try:
            given = accepted(name, function, given, batch)
        except DataError as error:
            yield _failed(asked, str(error))
            continue
        try:
            result = function(**given)
        except Exception as error:  # code of the user: anything
            result = error
        if inspect.isawaitable(result):
            waiting.append((asked, result))
        else:
            yield from _answers(name, asked, result, batch, whole)
    results = _await_all([result for _, result in waiting], seconds) if waiting else []
    for (asked, _), result in zip(waiting, results, strict=True):
        yield from _answers(name, asked, result, batch, whole)


def calls_one_by_one(name: str, function: Callable) -> bool:
    """Whether the function is called for one response after the other."""
    called = function if inspect.isroutine(function) else type(function).__call__
    return convention(name, function) is not trl and not inspect.iscoroutinefunction(called)


def _answers(
    name: str, rows: list[int], result: Any, batch: Batch, whole: bool
) -> Iterator[Answer]:
    """What a call came to: the numbers that it gave, and a failure for each that is none."""
    if isinstance(result, Exception):
        yield _raised(rows, result)
        return
    values = result if whole else [_number_of(name, result, batch)]
    B = len(batch.texts)
    try:
        listed = None if isinstance(values, str | Mapping) else list(values)
    except TypeError:
        listed = None
    except Exception as error:  # a generator of the user's: anything
        yield _raised(rows, error)
        return
    if listed is None:
        yield _failed(rows, f"returned {_shown(values)}, wanted a list of {B} numbers")
    elif len(listed) != len(rows):
        yield _failed(
            rows,
            f"returned {len(listed)} numbers for {B} responses; it must return one per response, "
            "or None where it does not apply",
        )
    else:
        numbers: list[float] = []
        good: list[int] = []
        for b, value in zip(rows, listed, strict=True):
            value = value.item() if getattr(value, "shape", None) == () else value
            if value is None or (is_number(value) and abs(value) <= LARGEST):
                good.append(b)
                numbers.append(math.nan if value is None else float(value))
                continue
            where = f"response {b} of {B} (to problem {batch.problems[b].id})"
            wanted = "wanted a finite number, or None for no score"
            yield _failed([b], f"returned {_shown(value)} for {where}; {wanted}")
        yield Answer(good, numbers)


def _failed(rows: list[int], what: str, trace: str = "", cause: Exception | None = None) -> Answer:
    return Answer(rows, [0.0] * len(rows), Failure(what, trace, cause))


def _raised(rows: list[int], error: Exception) -> Answer:
    trace = "".join(traceback.format_exception(error))
    return _failed(rows, f"raised {type(error).__name__}: {_one_line(error)}", trace, error)


def _count_or_stop(
    name: str, failed: list[Answer], batch: Batch, errors: Errors, told: set[str]
) -> None:
    """Raise, or count the responses and log the first failure of the run."""
    count, (what, trace, cause) = sum(len(a.rows) for a in failed), failed[0].failure or Failure("")
    text = f"reward {name} {what.removesuffix('.')} (on {count} of {len(batch.texts)} responses)."
    if errors == "stop":
        raise DataError(text) from (cause or (_Elsewhere(trace) if trace else None))
    batch.count(f"rewards/{name}/errors", count)
    if name not in told:
        told.add(name)
        fate = "score 0" if errors == "zero" else "are not scored"
        with suppress(Exception):  # a handler of the user's own may raise
            logger.warning("%s They %s, here and later.\n%s", text, fate, trace)


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
            batch.add({f"rewards/{name}/{key}": Average(float(value), 1)})
    return result.get("score", "no 'score'")


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
    name = path.stem if _leads_to(path.stem, path) else f"gspo_jax_reward_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # it is a .py file
    loader, module = module_spec.loader, importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        _import(spec, lambda: loader.exec_module(module))
    except DataError:
        del sys.modules[name]
        raise
    return module


def _leads_to(name: str, path: Path) -> bool:
    """Whether `import name` finds this file: then processes that it starts by spawn find it, too.

    They are told what the module is called, and sys.path; a name that something installed has, or
    that another reward file had first, would lead them elsewhere.
    """
    importlib.invalidate_caches()
    try:
        spec = None if "." in name else importlib.util.find_spec(name)
    except ValueError:  # "__main__", which is not imported by its name
        spec = None
    origin = None if spec is None else spec.origin
    return origin is not None and Path(origin).resolve() == path


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
