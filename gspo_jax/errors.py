"""What a user can get wrong, and the exit code of each.

Every message is one line: what was got, what is wanted, what to change, with the name that the
user typed. The command line prints it and exits with `exit_code`; a traceback needs `--debug`.
"""

from typing import Any

# What helps where JAX finds no device; `doctor` says it too.
NO_DEVICES = "unset JAX_PLATFORMS, or install jax for what is here: pip install 'jax[cuda12]'"
FINISHED, UNEXPECTED, INTERRUPTED, PREEMPTED = 0, 1, 130, 75


class ConfigError(ValueError):
    """A setting, an argument or a combination of them is not possible."""

    exit_code = 2


class DataError(ValueError):
    """A data file, a reward function or a model directory is not what it should be."""

    exit_code = 3


class NumericalError(ArithmeticError):
    """The numbers are no longer finite, more often than the budget allows."""

    exit_code = 4


class OutOfMemory(MemoryError):
    """A device, or the machine, has less memory than the run needs."""

    exit_code = 5


class StorageError(OSError):
    """A run directory or a checkpoint cannot be read, written or locked."""

    exit_code = 6


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse an argument that is none of `choices`; a boolean is never one.

    To be called where a choice is taken: an unknown word that falls through to the last branch
    would compute something else without a word.

    Raises:
        ConfigError: names the argument, what it was, and the choices.
    """
    if not isinstance(value, str) or value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ConfigError(f"{name}={value!r:.60}: wanted one of {wanted}.")
