"""What the fault tests share: a tiny run's settings, child processes, and what a run leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]
REWARDS = ROOT / "tests" / "reward_functions.py"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_run(model, place, *overrides):
    """Settings of a run that takes seconds: six prompts, four steps, two updates each."""
    data = place / "prompts.jsonl"
    if not data.exists():
        rows = [{"prompt": f"Say {word}", "answer": word, "split": "train"} for word in "abcdef"]
        write_rows(data, rows)
    return [
        f"model.path={model}",
        f"task.path={data}",
        f"task.rewards=[{REWARDS}:short_words]",
        "task.max_prompt_length=32",
        "rollout.prompts=4",
        "rollout.group_size=4",
        "rollout.max_completion_length=12",
        "algo.minibatches=2",
        "algo.loss={name: gspo, clip_low: 0.02, clip_high: 0.03}",
        "optim.learning_rate=3e-3",
        "mesh.data=1",
        f"run.dir={place}",
        "run.name=run",
        "run.steps=4",
        *overrides,
    ]


def environment(**variables):
    """Of a child process: this checkout's package and the tests' compilation cache."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | {"PYTHONPATH": path} | cache | variables


def python(code, *arguments, timeout=300, before=(), **options):
    """Run `code` in a child process; `before` is what the command starts with."""
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    options = {"env": environment(), "capture_output": True, "text": True} | options
    return subprocess.run(command, timeout=timeout, **options)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def status(run):
    return json.loads((run / "status.json").read_text())


def one_line(text):
    """The one line, besides warnings, that a refused command has written to stderr."""
    (line,) = [x for x in text.splitlines() if not x.startswith("gspo-jax: warning: ")]
    assert line.startswith("gspo-jax: ") and line.isprintable() and len(line) < 600, line
    return line
