"""Runs of seconds, in this process or in a child, for tests that disturb them."""

import subprocess
import sys
import time

from faults import tools
from gspo_jax.config.load import load_config

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from gspo_jax.cli.commands import main; sys.exit(main())",
]
VARIES = ("step_time", "compile_time", "compiles", "tokens_per_second")


def settings(model, directory, *more, reward="short_words"):
    """Four steps of two updates, measured before, in the middle and at the end."""
    own = [f"task.rewards=[{tools.REWARDS}:{reward}]", "eval.split=train", "eval.samples=0"]
    return [*tools.tiny_run(model, directory), *own, "eval.every=2", *more]


def config(model, directory, *more, **options):
    return load_config(None, settings(model, directory, *more, **options))


def metrics(run_dir):
    """Lines of metrics.jsonl but for what takes time, which is never the same twice."""
    return [
        {k: v for k, v in line.items() if k not in VARIES and not k.startswith(("time/", "speed/"))}
        for line in tools.metrics(run_dir)
    ]


def start(settings, *, command=COMMAND, cached=True, **variables):
    """`gspo-jax train` in a child with one device."""
    variables |= {} if cached else {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    env = tools.environment(XLA_FLAGS="", **variables)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, "train", *settings], env=env, **streams)


def eventually(condition, seconds=300.0, process=None):
    """Wait for a condition; not for a process that has ended."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    return found
