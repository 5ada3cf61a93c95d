"""Flags that scripts of other GSPO trainers are started with, as settings of ours.

    python scripts/train.py --model_name DIR --num_epochs 8 --batch_size 2 --output_dir OUT

For scripts/ alone: gspo-jax itself is told settings. What each flag became is printed; a flag that
is neither here nor one of gspo-jax is refused as everywhere.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gspo_jax.cli import commands as cli
from gspo_jax.cli.arguments import IS_OVERRIDE, say_error
from gspo_jax.errors import ConfigError
from gspo_jax.trainer_config import FIELDS

FLAGS = {field: setting for setting, field in FIELDS.items()} | {
    "model_name": "model.path",
    "dataset": "task.name, or task.path",
    "num_epochs": "run.steps",  # passes over the data; algo.epochs are passes over a rollout
    "output_dir": "run.dir and run.name; of a comparison --out",
    "use_wandb": "run.report_to",
    "algorithms": "--losses",
}
"""Every flag, and what it leads to: the fields of `GSPOConfig`, and some more."""

ONLY = {"algorithms": "compare", "seed": "train"}  # a comparison has --seeds
SWITCHES = ("use_wandb",)  # without a value
DATASETS = {"custom": {"task.name": "reasoning"}}  # else a task of that name, or a path
DEFAULTS = {
    "task.name": "reasoning",
    "task.options": {"sizes": {"train": 100, "val": 50, "test": 100}},
}
"""Without --dataset, a config file or a task among the settings: as many made-up problems as
`GSPOCustomDataset().generate_dataset()` makes."""
SHORT = {"task.max_prompt_length": 192, "rollout.max_completion_length": 64}
"""For the embedded model, which was made for 256 positions."""

Say = Callable[[str], None]


def main(command: str, argv: Sequence[str]) -> int:
    """gspo-jax COMMAND with these arguments; the exit code."""
    try:
        translated = in_our_words(command, argv, say_error)
    except Exception as error:
        code, text = cli.explain(error)
        say_error(text)
        return code
    return cli.main([command, *translated])


def in_our_words(command: str, argv: Sequence[str], say: Say) -> list[str]:
    """The arguments of gspo-jax `command` that mean the same; `say` is told what became of each.

    Raises:
        ConfigError: a flag without its value, or with one that cannot be.
        DataError: --num_epochs of data that cannot be read.
    """
    flags, ours = _parted(argv, [n for n in FLAGS if ONLY.get(n, command) == command])
    if not flags:
        return list(ours)
    file = next(
        (a for a in ours if a.endswith((".yaml", ".yml")) and not IS_OVERRIDE.match(a)), None
    )
    typed = [text for text in ours if IS_OVERRIDE.match(text)]
    settings: list[str] = []
    if not file and "dataset" not in flags and not _sets(typed, "task.name", "task.path"):
        settings += _told(say, "without --dataset", _assigned(DEFAULTS))
    if not file and flags.get("model_name", "demo") == "demo" and not _sets(typed, "model.path"):
        settings += _told(say, "for the demo model", _assigned(SHORT))
    options: list[str] = []
    for name, value in flags.items():
        if name in ("batch_size", "num_epochs"):  # what they are depends on the others
            continue
        if name == "algorithms":
            options += _told(say, f"--{name} {value}", ["--losses", value.lower().replace(" ", "")])
        elif name == "output_dir" and command == "compare":
            options += _told(say, f"--{name} {value}", ["--out", value])
        else:
            settings += _told(say, f"--{name} {value}".rstrip(), _of(name, value))
    for name, became in (("batch_size", _batches), ("num_epochs", _steps)):
        if name in flags:
            number = _whole(name, flags[name])
            found, why = became(number, file, [*settings, *typed])
            settings += _told(say, f"--{name} {number}", found, why)
    return [*settings, *options, *ours]  # of two values of a setting the last one counts


def _parted(argv: Sequence[str], known: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """These flags with their values, and all other arguments."""
    flags: dict[str, str] = {}
    others: list[str] = []
    left = list(argv)
    while left:
        text = left.pop(0)
        name, equals, value = text.partition("=")
        flag = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or flag not in known:
            others.append(text)
            continue
        if not equals and flag not in SWITCHES:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"{name} needs a value, as {FLAGS[flag]}.")
            value = left.pop(0)
        flags[flag] = value
    return flags, others


def _of(name: str, value: str) -> list[str]:
    if name == "output_dir":  # the run's own directory
        path = Path(value).resolve() if Path(value).name in ("", "..") else Path(value)
        return _assigned({"run.dir": str(path.parent), "run.name": path.name})
    if name == "use_wandb":
        return ["run.report_to=[wandb]"]
    if name == "dataset":
        from gspo_jax.tasks import TASKS

        named = {"task.name": value} if value in TASKS else {"task.path": value}
        return _assigned(DATASETS.get(value, named))
    return [f"{FLAGS[name]}={value}"]


def _batches(number: int, file: str | None, settings: Sequence[str]) -> tuple[list[str], str]:
    """Prompts per step; as many updates per step as divide them, and no more than there were."""
    most = _config(file, [s for s in settings if not _sets([s], "algo.minibatches")])
    chosen = _sets(settings, "algo.minibatches")
    parts = max(n for n in range(1, most.algo.minibatches + 1) if number % n == 0)
    return [f"rollout.prompts={number}", *([] if chosen else [f"algo.minibatches={parts}"])], ""


def _steps(epochs: int, file: str | None, settings: Sequence[str]) -> tuple[list[str], str]:
    """So many passes over the problems whose prompts fit."""
    from gspo_jax.config.load import model_dir
    from gspo_jax.policy import load_problems
    from gspo_jax.prompt.tokenizer import load_tokenizer

    config = _config(file, settings)
    problems = load_problems(config, load_tokenizer(model_dir(config)))
    count, prompts = len(problems.indices["train"]), config.rollout.prompts
    why = f"{epochs} passes over {count} problems, {prompts} a step"
    return [f"run.steps={-(-epochs * count // prompts)}"], why


def _config(file: str | None, settings: Sequence[str]) -> Any:
    from gspo_jax.config.load import config_file, load_config
    from gspo_jax.experiment.trials import is_experiment

    path = None if file is None else Path(config_file(file))
    if path is not None and is_experiment(path):
        raise ConfigError(
            f"{file} is an experiment, whose runs have settings of their own: write run.steps=N "
            "and rollout.prompts=N in place of --num_epochs and --batch_size."
        )
    return load_config(path, settings)


def _sets(settings: Sequence[str], *names: str) -> bool:
    return any(text.partition("=")[0] in names for text in settings)


def _assigned(settings: dict[str, Any]) -> list[str]:
    texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in settings.items()}
    return [f"{name}={text}" for name, text in texts.items()]


def _told(say: Say, what: str, became: list[str], why: str = "") -> list[str]:
    say(f"{what}: {' '.join(became)}{f' ({why})' if why else ''}")
    return became


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--{name} {text}: wanted a whole number from 1.")
    return int(text)
