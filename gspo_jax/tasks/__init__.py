"""Where problems come from: the table of built-in tasks, and data of the user's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_jax.errors import ConfigError
from gspo_jax.tasks.countdown import countdown_numbers
from gspo_jax.tasks.data import user_data
from gspo_jax.tasks.knights import knights_and_knaves
from gspo_jax.tasks.math import arithmetic
from gspo_jax.tasks.reasoning import reasoning_mix
from gspo_jax.tasks.task import SPLITS, Task, order
from gspo_jax.tasks.zebra import zebra_synth

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

    Args:
        name, path: exactly one of them.
        seed: chooses the problems of a task that makes them up; data has none to choose.
        fields: columns of the data.
        options: keyword arguments of the task.

    Raises:
        ConfigError: both or neither, an unknown name, or an option the task does not take.
        DataError: the data is not what it should be.
    """
    if (name is None) == (path is None):
        raise ConfigError(f"got task name {name!r} and path {path!r}; wanted one of the two.")
    if path is not None:
        return user_data(path, fields=fields, **options)
    if name not in TASKS:
        raise ConfigError(f"task.name={name}: the tasks are {sorted(TASKS)}.")
    if fields:
        raise ConfigError(f"task.fields: these are columns of task.path; {name} has none.")
    return TASKS[name](seed=seed, **options)


TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": arithmetic,
    "countdown": countdown_numbers,
    "knights": knights_and_knaves,
    "reasoning": reasoning_mix,
    "zebra-synth": zebra_synth,
}
