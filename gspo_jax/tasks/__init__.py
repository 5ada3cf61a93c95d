"""Where problems come from: the table of built-in tasks, and data files of the user's own."""

from collections.abc import Callable
from typing import Any

from gspo_jax.errors import ConfigError
from gspo_jax.tasks.math import arithmetic
from gspo_jax.tasks.task import SPLITS, Task, order

__all__ = ["SPLITS", "TASKS", "Task", "load_task", "order"]


def load_task(name: str | None = None, *, seed: int = 0, **options: Any) -> Task:
    if name not in TASKS:
        raise ConfigError(f"task.name={name}: the tasks are {sorted(TASKS)}.")
    return TASKS[name](seed=seed, **options)


TASKS: dict[str, Callable[..., Task]] = {"arithmetic": arithmetic}
