"""Where problems come from: the table of built-in tasks, and data of the user's own.

In reading order:

    task         what a task is, and the order in which a run visits its problems
    draw         making problems up: draws that no Python version changes, splits apart
    mixture      several tasks in fixed shares
    sources      rows of data files, each with its place for an error message
    rows         one row as a Problem: the only reader of columns
    data         problems from data of the user's own
    published    readers of published sets
    math_verify  answers that are the same mathematics in other words (extra `math`)
    latex        the same in a process that can be killed
    made/        problems made up on the spot
    zebra/       logic grids
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gspo_jax.errors import ConfigError
from gspo_jax.tasks.data import user_data
from gspo_jax.tasks.draw import chosen_sizes
from gspo_jax.tasks.made.arithmetic import arithmetic
from gspo_jax.tasks.made.countdown import countdown_numbers
from gspo_jax.tasks.made.gym import reasoning_gym
from gspo_jax.tasks.made.knights import knights_and_knaves
from gspo_jax.tasks.made.reasoning import reasoning_mix
from gspo_jax.tasks.mixture import Part, mix, parsed_parts
from gspo_jax.tasks.published import READERS, recognised
from gspo_jax.tasks.task import SPLITS, Task, order
from gspo_jax.tasks.zebra.puzzles import zebra_synth
from gspo_jax.text.spelling import meant

__all__ = ["SPLITS", "TASKS", "Task", "load_task", "order", "user_data"]


def load_task(
    name: str | None = None,
    path: str | Path | None = None,
    *,
    seed: int = 0,
    fields: dict[str, str] | None = None,
    **options: Any,
) -> Task:
    """The built-in task `name`, or the data at `path`; see `TASKS` and `user_data`.

    A path that is a published set is read as the task of that set.

    Args:
        name, path: exactly one of them; but the reader of a published set may be told a path.
        seed: chooses the problems of a task that makes them up; data has none to choose.
        fields: columns of the data.
        options: keyword arguments of the task.

    Raises:
        ConfigError: both or neither, an unknown name, or an option the task does not take.
        DataError: the data is not what it should be.
    """
    if name in READERS and path is not None:
        options, path = {"path": str(path), **options}, None
    if (name is None) == (path is None):
        raise ConfigError(f"got task name {name!r} and path {path!r}; wanted one of the two.")
    try:
        if path is not None and not fields and (known := recognised(str(path))):
            name, path = known
            return READERS[name](path=path, **options)
        if path is not None:
            return user_data(path, fields=fields, **options)
        return _built_in(str(name), fields, options)(seed=seed, **options)
    except ConfigError as error:
        option = re.match(r"\w+", str(error))
        if option and option[0] in options:  # as it stands in a configuration
            raise ConfigError(f"task.options.{error}") from None
        raise


def _built_in(name: str, fields: Any, options: Mapping[str, Any]) -> Callable[..., Task]:
    if name not in TASKS:
        raise ConfigError(
            f"task.name={name}: no such task.{meant(name, TASKS)} The tasks are {sorted(TASKS)}."
        )
    if fields:
        raise ConfigError(f"task.fields: these are columns of task.path; {name} has none.")
    taken = inspect.signature(TASKS[name]).parameters
    if unknown := [option for option in options if option not in taken]:
        raise ConfigError(
            f"task.options.{unknown[0]}: {name} has no such option.{meant(unknown[0], taken)} "
            f"It takes {list(taken)}."
        )
    return TASKS[name]


def mixture_of(
    *, seed: int = 0, tasks: Mapping[str, Any] | None = None, sizes: dict[str, int] | None = None
) -> Task:
    """Several tasks in fixed shares; see `mix`.

    Args:
        seed: of every part.
        tasks: {name: weight} for built-in tasks, or {any name: {weight, name or path, fields,
            options}}, where the last four are those of `load_task`.
        sizes: the most problems of each split.

    Raises:
        ConfigError: tasks that are no such mapping, or a mixture inside of a mixture.
    """
    parts = {}
    for label, part in parsed_parts(tasks or {}).items():
        weight, options = part.pop("weight"), part.pop("options", {})
        if part.get("name") == "mixture":
            raise ConfigError(f"task.options.tasks.{label}: a mixture cannot hold another one.")
        try:
            parts[label] = Part(load_task(**part, seed=seed, **options), weight)
        except ConfigError as error:
            text = str(error).removeprefix("task.")
            raise ConfigError(f"task.options.tasks.{label}.{text}") from None
    return mix(parts, sizes=chosen_sizes({}, sizes))


TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": arithmetic,
    "countdown": countdown_numbers,
    "gym": reasoning_gym,
    "knights": knights_and_knaves,
    "mixture": mixture_of,
    "reasoning": reasoning_mix,
    "zebra-synth": zebra_synth,
    **READERS,
}
"""Every built-in task by its name in the configuration: the function that makes it of a seed."""
