"""The command line: its commands and options, and a wrong one told in one line."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gspo_jax import __version__
from gspo_jax.config.names import SETTINGS, alike
from gspo_jax.errors import ConfigError
from gspo_jax.text.spelling import meant

IS_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")

Commands = Mapping[str, tuple[Callable[[argparse.Namespace], int], str]]


def parsed(argv: Sequence[str] | None, commands: Commands) -> argparse.Namespace:
    """The command line, with CONFIG.yaml and section.key=value in any order among the options.

    Args:
        argv: without the program; None is that of this process.
        commands: name -> what runs it, and a line of help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(commands)
    _check_command(parser, argv, commands)
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "settings") or any(text.startswith("-") for text in rest):
        if rest:
            arguments.parser.error(_unknown(rest, arguments.parser))
        return arguments
    given = [*arguments.settings, *rest]
    arguments.overrides = [text for text in given if IS_OVERRIDE.match(text)]
    if getattr(arguments, "resume", None):
        arguments.overrides.append(f"run.resume={arguments.resume}")
    files = [text for text in given if not IS_OVERRIDE.match(text)]
    if argv[0] == "eval":
        arguments.models = [text for text in files if not text.endswith((".yaml", ".yml"))]
        files = [text for text in files if text not in arguments.models]
    files += [arguments.config] if arguments.config else []
    if len(files) > 1:
        named = " and ".join(files)
        arguments.parser.error(
            f"one config file at most, not {named}; settings are written section.key=value"
        )
    arguments.config = files[0] if files else None
    return arguments


def say_error(text: str) -> None:
    """One line on stderr, without what a terminal would obey and without credentials."""
    from gspo_jax.text.inert import inert, redact

    print(f"gspo-jax: {inert(redact(text))}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, with a wrong usage told in one line."""

    def error(self, message: str) -> Any:
        say_error(f"{message.rstrip('.')}; see {self.prog} --help")
        self.exit(ConfigError.exit_code)


def _check_command(parser: Parser, argv: Sequence[str], commands: Commands) -> None:
    first = argv[0] if argv else ""
    if not first or first in (*commands, "--help", "-h", "--version"):
        return
    if first.startswith("-"):
        parser.error(f"unknown argument {first}.{meant(first, ['--help', '--version'])}")
    like = meant(first, commands)
    if IS_OVERRIDE.match(first) or first.endswith((".yaml", ".yml")):
        like = f" Did you mean train {first}?"
    parser.error(f"unknown command {first}.{like} The commands are {', '.join(commands)}")


def _unknown(rest: Sequence[str], parser: Parser) -> str:
    """What is said of arguments that nobody knows."""
    first = next((text for text in rest if text.startswith("-")), rest[0])
    name = first.lstrip("-").partition("=")[0]
    if not first.startswith("-"):
        return f"unknown argument {first}"
    options = [option for action in parser._actions for option in action.option_strings]
    like = meant(first.partition("=")[0], options)
    found = alike(name.replace("-", "_"))
    if found and (not like or name in SETTINGS or found[0].endswith(f".{name}")):
        like = f" A setting is written without dashes, {found[0]}=VALUE"
    return f"unknown argument {first}.{like}"


def _parser(commands: Commands) -> Parser:
    parser = Parser(
        prog="gspo-jax",
        description="GSPO post-training of Qwen-family language models in JAX.",
        epilog="Start with: gspo-jax demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gspo-jax {__version__}")
    described = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (command, text) in commands.items():
        sub = described.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command, parser=sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in ("export", "replay", "report"):
            add_runs(sub, name)
        elif name in ("compare", "sweep"):
            add_experiment(sub, name)
        elif name == "monitor":
            add_monitor(sub)
        elif name != "doctor":
            add_settings(sub, name)
        if name in ("demo", "train", "sft"):
            add_processes(sub)
        if name == "eval":
            add_benchmarks(sub)
        if name in ("train", "sft"):
            sub.add_argument("--resume", metavar="PATH", help="a checkpoint; run.resume=PATH")
        if name == "plan":
            add_plan(sub)
    return parser


def add_runs(sub: argparse.ArgumentParser, name: str) -> None:
    """The run, or the runs, that a command reads."""
    if name == "report":
        sub.add_argument("runs", metavar="RUN", nargs="+", help="run directories")
        where = "default: RUN/plots, or report/ beside several runs"
        sub.add_argument("--out", metavar="DIR", help=where)
        return
    sub.add_argument("run", metavar="RUN", help="a run directory, like runs/demo-seed0")
    if name == "export":
        sub.add_argument("out", metavar="OUT", nargs="?", help="default: RUN/export")
        moved = "a directory of the same model, to take tokenizer and template from"
        sub.add_argument("--like", metavar="DIR", help=moved)
    else:
        sub.add_argument("--step", type=_whole, required=True, metavar="K", help="1 or more")


def add_plan(sub: argparse.ArgumentParser) -> None:
    """Of what device, and how closely."""
    sub.add_argument("--no-compile", action="store_true", help="estimate; takes seconds")
    sub.add_argument("--memory", type=_above_0, metavar="GB", help="of another device; estimates")
    where = "compile for devices that are not here: h200:8, v6e:2x4"
    sub.add_argument("--target", metavar="KIND:SHAPE", default="", help=where)
    sub.add_argument("--shardings", action="store_true", help="where every array of a step lives")


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


def add_processes(sub: argparse.ArgumentParser) -> None:
    """How several processes find each other."""
    group = sub.add_argument_group("several processes (srun, mpirun and the like need none of it)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--processes", type=_count, metavar="N", help="how many there are")
    group.add_argument("--process", type=_whole, metavar="I", help="the number of this one, from 0")


def add_monitor(sub: argparse.ArgumentParser) -> None:
    """What to watch, and where to show it."""
    runs = "run directories, or a directory of them: its newest; default: runs"
    sub.add_argument("runs", metavar="RUN", nargs="*", help=runs)
    sub.add_argument(
        "--port", type=_whole, default=8765, metavar="N", help="8765, or the next free"
    )
    host = "127.0.0.1; another serves to the network, with a token"
    sub.add_argument("--host", default="127.0.0.1", metavar="NAME", help=host)
    sub.add_argument("--terminal", action="store_true", help="show them here instead")
    sub.add_argument("--open", action="store_true", help="open the page in a browser")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number from 1")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number from 0")
    return int(text)


def _above_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a number above 0")
    return number
