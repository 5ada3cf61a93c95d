"""gspo-jax demo | train | sft | eval | compare | sweep | plan | export | replay | report | monitor
| doctor

Settings are `section.key=value`, over a YAML file if one is named. Exit codes: 0 finished,
1 unexpected, 2 usage or configuration, 3 data or model directory, 4 numerical failure, 5 out of
memory, 6 storage, 75 preempted with the checkpoint saved, 130 interrupted. Errors are one line on
stderr. Whatever needs JAX is imported by the command that needs it.
"""

import argparse
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_jax.cli.arguments import parsed, say_error
from gspo_jax.errors import (
    INTERRUPTED,
    UNEXPECTED,
    ConfigError,
    DataError,
    OutOfMemory,
    StorageError,
)
from gspo_jax.files.compile_cache import keep_compiled
from gspo_jax.text.streams import guarded, open_closed

if TYPE_CHECKING:
    from gspo_jax.config.load import Config
    from gspo_jax.run.lifecycle import Result

IS_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is returned, the error printed."""
    open_closed()
    with guarded("stderr"):
        return _main(parsed(argv, COMMANDS))


def _main(arguments: argparse.Namespace) -> int:
    if not arguments.debug:  # XLA's own account of an error: hundreds of lines where memory ends
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        _hush()
    keep_compiled(os.environ)
    try:
        if getattr(arguments, "config", None):
            from gspo_jax.config.load import config_file

            arguments.config = config_file(arguments.config)
        return arguments.command(arguments)
    except KeyboardInterrupt:
        say_error("interrupted.")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in `gspo-jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNEXPECTED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        code, text = explain(error)
        say_error(text)
        return _leave(code)


def _leave(code: int) -> int:
    """Of several processes one that fails ends at once: at a regular exit it would wait for all."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(code)
    return code


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and one line on what to do about it."""
    text = " ".join(str(error).split())
    if (code := getattr(error, "exit_code", None)) is not None:
        return code, text
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return StorageError.exit_code, f"no space left ({text[:200]}); set run.dir to another disk."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        # `train` says more; this is loading, or another command.
        wanted = re.search(r"allocat\w* ([\d.]+ ?\w+)", text)
        return OutOfMemory.exit_code, (
            f"out of memory{f' (allocating {wanted[1]})' if wanted else ''}; lower "
            "algo.microbatch (responses at a time in the update) or "
            "rollout.max_completion_length (the cache and activations of each); in eval eval.batch."
        )
    kind, trace = type(error).__name__, traceback.extract_tb(error.__traceback__)
    if not text and trace:  # an assertion: its place is all it says
        text = f"in {trace[-1].name}, {Path(trace[-1].filename).name}:{trace[-1].lineno}"
    return UNEXPECTED, f"unexpected {kind}: {text[:300]} (--debug shows where)"


# ---------------------------------------------------------------------------------- commands


def demo(arguments: argparse.Namespace) -> int:
    """configs/demo.yaml with a story around it."""
    from gspo_jax.config.load import packaged_config

    if arguments.config:
        raise ConfigError(
            f"demo has its own config and takes settings alone; gspo-jax train {arguments.config}"
        )
    arguments.config = str(packaged_config("demo.yaml"))
    return _run(arguments, _train, is_demo=True)


def train(arguments: argparse.Namespace) -> int:
    """Reinforcement learning as the config says."""
    return _run(arguments, _train)


def sft(arguments: argparse.Namespace) -> int:
    """Supervised training on the task's worked solutions."""

    def action(config: "Config") -> "Result":
        from gspo_jax.sft import sft

        return sft(config)

    return _run(arguments, action)


def evaluate(arguments: argparse.Namespace) -> int:
    """Accuracy of model directories; a run's export/ is measured as that run measured."""
    models = arguments.models
    for path in models:
        if not Path(path).exists() and path != "demo" and not IS_HUB_ID.fullmatch(path):
            raise DataError(f"{path}: no such model directory or config file.")
    configs = [Path(path).resolve().parent / "config.yaml" for path in reversed(models)]
    if not arguments.config:
        arguments.config = next((str(path) for path in configs if path.is_file()), None)
    if models:
        own = [f"model.path={models[-1]}", "model.init=pretrained"]
        arguments.overrides = [*own, *arguments.overrides]
    if arguments.benchmarks or arguments.out or len(models) > 1:
        return _benchmark(arguments)
    if (config := _resolve(arguments)) is None:
        return 0
    from gspo_jax.cli import story
    from gspo_jax.evaluation.evaluate import evaluate_path

    story.show(story.comparison({config.model.path: evaluate_path(config)}))
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    """Several models, or several benchmarks; exit code 3 if one of these could not be had."""
    from gspo_jax.cli import story
    from gspo_jax.evaluation import benchmark

    asked = benchmark.named(arguments.benchmarks) if arguments.benchmarks else None
    if asked:  # all problems, however long; settings of the config's own task do not apply
        everything = [f"eval.problems={benchmark.ALL}", f"task.max_prompt_length={benchmark.ALL}"]
        arguments.overrides = [*everything, *arguments.overrides]
    if (config := _resolve(arguments)) is None:
        return 0
    out = Path(arguments.out or "runs/eval")
    results = benchmark.run(config, arguments.models or [config.model.path], asked, out, say_error)
    if results["scores"]:
        story.show(story.benchmarks(results))
        story.show(f"\npage      {out / 'results.md'}\nresponses {out}", wrap=False)
    return DataError.exit_code if results["missing"] else 0


def compare(arguments: argparse.Namespace) -> int:
    """Losses, or other variants, under one harness; a page, comparison.md and compare.json."""
    from gspo_jax.cli import story
    from gspo_jax.experiment import compare as comparing
    from gspo_jax.experiment import trials
    from gspo_jax.files.jsonl import plain, write_plain

    config, overrides = arguments.config and Path(arguments.config), arguments.overrides
    if config and trials.is_experiment(config):
        made = trials.read_experiment(config, overrides)
    else:
        losses = arguments.losses.lower().split(",")
        made = comparing.of_losses(config, losses, seeds=arguments.seeds, overrides=overrides)
    if arguments.against:
        made = trials.against(made, arguments.against)
    if arguments.dry_run:
        story.show(story.planned(made))
        return 0
    from gspo_jax.view.comparison import comparison_page

    out = Path(arguments.out or trials.default_directory(made, "compare", config))
    with guarded("stdout"):
        outcomes = trials.run_trials(made, out, jobs=arguments.jobs, say=story.show)
    found = plain(comparing.found(made, outcomes, ["gspo-jax", *sys.argv[1:]]))
    write_plain(out / "compare.json", found)
    page = comparison_page(found, out)
    story.show(story.compared(found))
    story.show(f"page      {page}", wrap=False)
    return trials.exit_code(outcomes)


def sweep(arguments: argparse.Namespace) -> int:
    """Every trial of an experiment file, ranked; sweep.json and the best settings."""
    from gspo_jax.cli import story
    from gspo_jax.experiment import sweep as sweeping
    from gspo_jax.experiment import trials
    from gspo_jax.files.jsonl import write_plain

    if not arguments.config:
        raise ConfigError(
            "sweep needs an experiment file; see configs/experiments/losses_sweep.yaml."
        )
    config = Path(arguments.config)
    made = trials.read_experiment(config, arguments.overrides)
    if arguments.dry_run:
        story.show(story.planned(made))
        return 0
    out = Path(arguments.out or trials.default_directory(made, "sweep", config))
    with guarded("stdout"):
        outcomes = trials.run_trials(made, out, jobs=arguments.jobs, say=story.show)
    rows = sweeping.ranked(made, outcomes)
    result = {"metric": made.metric, "best": sweeping.best(rows), "rows": rows}
    write_plain(out / "sweep.json", result)
    story.show(story.swept(made.metric, rows))
    story.show(f"table     {out / 'sweep.json'}", wrap=False)
    return trials.exit_code(outcomes)


def plan(arguments: argparse.Namespace) -> int:
    """Memory and cost of a run, before it is one; exit code 2 if it does not fit."""
    if (config := _resolve(arguments)) is None:
        return 0
    from gspo_jax.plan.report import report, sketched

    if arguments.shardings:
        from gspo_jax.plan.layout import page
        from gspo_jax.plan.target import target_of

        to = target_of(arguments.target) if arguments.target else None
        print(page(sketched(config, to=to)[0]))
        return 0
    limit = None if arguments.memory is None else int(arguments.memory * 1e9)
    # XLA's account of a CPU program says little of another device: it undoes rematerialisation.
    compiles = not arguments.no_compile and (limit is None or bool(arguments.target))
    report(config, compile=compiles, limit=limit, target=arguments.target)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """The newest checkpoint of a run as a Hugging Face directory."""
    from gspo_jax.run.export import export
    from gspo_jax.run.model_card import how_to_use

    run = Path(arguments.run)
    out = Path(arguments.out) if arguments.out else run / "export"
    made = export(run, out, like=arguments.like)
    print(made)
    print(how_to_use(made))
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """A recorded step computed again; exit code 4 if anything differs."""
    from gspo_jax.cli import story
    from gspo_jax.replay import replay

    done = replay(Path(arguments.run), arguments.step)
    story.show(story.replayed(done))
    return done.exit_code


def report(arguments: argparse.Namespace) -> int:
    """A page of one run, or of several beside each other."""
    from gspo_jax.view.report import report

    out = Path(arguments.out) if arguments.out else None
    print(report([Path(run) for run in arguments.runs], out))
    return 0


def monitor(arguments: argparse.Namespace) -> int:
    """Runs while they go: a page for this machine's browser, or a view in the terminal."""
    runs = [Path(run) for run in arguments.runs or ["runs"]]
    if arguments.terminal:
        from gspo_jax.view.terminal import show

        show(runs)
        return 0
    import webbrowser

    from gspo_jax.view.monitor import serve

    opened = webbrowser.open if arguments.open else None
    serve(runs, host=arguments.host, port=arguments.port, opened=opened)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """This installation, and what is wrong with it; exit code 2 if something is."""
    from gspo_jax.plan.doctor import doctor

    return doctor()


def _train(config: "Config") -> "Result":
    from gspo_jax.train import train

    return train(config)


def _run(
    arguments: argparse.Namespace,
    action: Callable[["Config"], "Result"],
    *,
    is_demo: bool = False,
) -> int:
    if (config := _resolve(arguments)) is None:
        return 0
    from gspo_jax.cli import story
    from gspo_jax.config.load import run_dir
    from gspo_jax.mesh.distributed import is_writer, join
    from gspo_jax.run.resume import check_named
    from gspo_jax.run.trackers import check_installed

    check_named(config.run.resume, run_dir(config) / "checkpoints")  # before anything is loaded
    check_installed(config.run.report_to)
    with guarded("stdout"):
        join(arguments.coordinator, arguments.processes, arguments.process, say_error)
        if is_demo and is_writer():
            story.before_demo(config)
        result = action(config)
        if is_writer():
            _told(story.after_demo if is_demo else story.after_run, config, result)
    return result.exit_code


def _told(story: Callable[["Config", "Result"], None], config: "Config", result: "Result") -> None:
    """What came out; the run has ended as it has, whatever goes wrong in telling it."""
    try:
        story(config, result)
    except Exception as error:
        say_error(f"warning: {explain(error)[1]}")


def _resolve(arguments: argparse.Namespace) -> "Config | None":
    """The config to run; None where the command was only to show or to check it."""
    from gspo_jax.config.load import load_config, warnings
    from gspo_jax.config.recorded import to_yaml

    config = load_config(arguments.config, arguments.overrides)
    for warning in warnings(config):
        say_error(f"warning: {warning}")
    if arguments.print_config:
        print(to_yaml(config), end="")
        return None
    if arguments.dry_run:
        from gspo_jax.plan.report import plan

        print(plan(config))
        return None
    return config


def _hush() -> None:
    """Of a write that fails Orbax tells a hundred times, from threads; we tell once."""
    import absl.logging  # makes its logger, which therefore must not exist before

    absl.logging.get_absl_logger().addFilter(_is_not_of_orbax)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _show_unraisable


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _show_unraisable(told: Any) -> None:
    if str(told.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(told)


COMMANDS = {
    "demo": (demo, "a tiny model learns arithmetic in minutes, on a CPU"),
    "train": (train, "GSPO (or a relative of it) as a config says"),
    "sft": (sft, "supervised training on worked solutions"),
    "eval": (evaluate, "held-out accuracy of models, on benchmarks too"),
    "compare": (compare, "losses, or other variants, under one harness"),
    "sweep": (sweep, "every trial of an experiment file, ranked"),
    "plan": (plan, "memory per device and cost of a step, without weights"),
    "export": (export, "a run's newest checkpoint as a Hugging Face directory"),
    "replay": (replay, "compute one recorded step of a run again, and compare"),
    "report": (report, "a page of what runs recorded, with figures"),
    "monitor": (monitor, "runs while they go: a live page, or a view in the terminal"),
    "doctor": (doctor, "what is installed here, and what is wrong with it"),
}
