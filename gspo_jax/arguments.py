"""Options of the command line that several lines of help explain, by what they are for."""

import argparse
import os
from pathlib import Path

from gspo_jax.errors import ConfigError


def add_settings(sub: argparse.ArgumentParser, name: str) -> None:
    """A config file and settings over it, and what only looks at them."""
    what = {"demo": "", "eval": "a YAML file, and models, the first to compare the others with; "}
    what = what.get(name, "a YAML file; ")
    files = {"demo": "", "eval": "CONFIG.yaml MODEL "}.get(name, "CONFIG.yaml ")
    sub.add_argument(
        "settings",
        metavar=f"{files}section.key=value",
        nargs="*",
        help=f"{what}settings over it, like rollout.group_size=16",
    )
    sub.add_argument("--config", metavar="CONFIG.yaml", help="the YAML file, by option")
    sub.add_argument("--print-config", action="store_true", help="print all settings and stop")
    sub.add_argument(
        "--dry-run", action="store_true", help="check model, data and rewards, touch nothing"
    )


def add_benchmarks(sub: argparse.ArgumentParser) -> None:
    """What `eval` takes beside models."""
    sub.add_argument(
        "--benchmarks",
        metavar="A,B",
        help="zebra, math, custom, a task's name, or NAME=PATH; else the config's own task",
    )
    sub.add_argument(
        "--out", metavar="DIR", help="of responses and results.json; default: runs/eval"
    )


def add_experiment(sub: argparse.ArgumentParser, name: str) -> None:
    """What `compare` and `sweep` take."""
    what = "an experiment" if name == "sweep" else "an experiment, or a config to compare losses by"
    sub.add_argument(
        "settings",
        metavar="FILE.yaml section.key=value",
        nargs="*",
        help=f"{what}; settings of all its runs",
    )
    sub.set_defaults(config=None)
    sub.add_argument("--jobs", type=_count, default=1, metavar="N", help="runs at a time")
    sub.add_argument("--out", metavar="DIR", help="of its runs; default: runs/NAME")
    sub.add_argument("--dry-run", action="store_true", help="list its runs, touch nothing")
    if name == "compare":
        sub.add_argument(
            "--losses", default="gspo,grpo,ppo", metavar="A,B", help="default: %(default)s"
        )
        sub.add_argument("--seeds", type=_count, default=3, metavar="N", help="default: 3")
        sub.add_argument("--against", metavar="A", help="what the others are compared with")


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number from 1")
    return int(text)


def add_processes(sub: argparse.ArgumentParser) -> None:
    """How several processes find each other."""
    group = sub.add_argument_group("several processes (srun, mpirun and the like need none of it)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="the number of this one, from 0")


def add_monitor(sub: argparse.ArgumentParser) -> None:
    """What to watch, and where to show it."""
    runs = "run directories, or a directory of them: its newest; default: runs"
    sub.add_argument("runs", metavar="RUN", nargs="*", help=runs)
    sub.add_argument("--port", type=int, default=8765, metavar="N", help="8765, or the next free")
    host = "127.0.0.1; another serves to the network, with a token"
    sub.add_argument("--host", default="127.0.0.1", metavar="NAME", help=host)
    sub.add_argument("--terminal", action="store_true", help="show them here instead")
    sub.add_argument("--open", action="store_true", help="open the page in a browser")


def config_file(path: str) -> str:
    """`path`, or the package's own file of that name where there is none here: `demo.yaml`.

    Raises:
        ConfigError: a directory, or a file of data.
    """
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a directory; wanted a config file, like demo.yaml.")
    if path.endswith((".jsonl", ".json", ".parquet")):
        raise ConfigError(f"{path} is no config but data; write task.path={path}.")
    if os.path.lexists(path) or Path(path).name != path:
        return path
    from gspo_jax.config import packaged_config

    packaged = packaged_config(path)
    return str(packaged) if packaged.is_file() else path
