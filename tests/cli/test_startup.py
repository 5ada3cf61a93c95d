"""What a command imports: one that only reads files, or refuses its input, comes without JAX."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "tokenizers"}
HEAVY |= {"datasets", "wandb", "tensorboard", "safetensors"}

RUN = """
import json, sys
heavy = set(json.loads(sys.argv[1]))
from gspo_jax.cli.commands import main
for line in json.loads(sys.argv[2]):
    sys.argv = ["gspo-jax", *line]
    try:
        code = main(line)
    except SystemExit as exit:
        code = exit.code
    print("\\n" + json.dumps([line, code, sorted(heavy & sys.modules.keys())]), file=sys.stderr)
"""


def imported(*lines, before="", heavy=HEAVY):
    """Runs the commands in one new process; [command, exit code, heavy modules] after each."""
    call = [sys.executable, "-c", before + RUN, json.dumps(sorted(heavy)), json.dumps(lines)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    assert [line for line, _, _ in told] == [list(line) for line in lines], done.stderr
    return told, done.stdout


def test_help_and_version_need_nothing_but_python():
    told, out = imported(
        ["--help"],
        ["--version"],
        ["doctor", "--help"],
        heavy=HEAVY | {"rich", "omegaconf", "numpy"},
    )
    assert [(code, heavy) for _, code, heavy in told] == [(0, [])] * 3
    assert "usage: gspo-jax [-h] [--version] COMMAND" in out and "gspo-jax 0." in out


def test_config_errors_and_whatever_reads_configs_alone_come_without_jax(tmp_path):
    demo, sweep = str(CONFIGS / "demo.yaml"), str(CONFIGS / "experiments" / "losses_sweep.yaml")
    told, out = imported(
        ["train", "rollout.group_sze=8"],
        ["train", "algo.loss=gsop"],
        ["train", "algo.minibatches=3"],
        ["eval", str(tmp_path / "nowhere")],
        ["train", demo, "--print-config"],
        ["compare", demo, "--losses", "gspo,grpo", "--dry-run"],
        ["sweep", sweep, "--dry-run"],
        heavy=HEAVY | {"matplotlib"},
    )
    assert [code for _, code, _ in told] == [2, 2, 2, 3, 0, 0, 0]
    assert all(not heavy for _, _, heavy in told), told
    assert "group_size: 8" in out and "gspo" in out


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "a-run"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return str(directory)


FETCHED = """
import os, signal, threading, urllib.request, webbrowser
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
def fetch(url):
    try:
        pages = [urllib.request.urlopen(url + path, timeout=60).read() for path in ("", "data")]
        print("fetched" if b"</html>" in pages[0] and b"a-run" in pages[1] else pages, flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
webbrowser.open = lambda url: threading.Thread(target=fetch, args=[url], daemon=True).start()
"""


def test_the_monitor_serves_its_page_without_jax_or_a_plotting_library(run):
    line = ["monitor", run, "--port", "0", "--open"]
    told, out = imported(line, before=FETCHED, heavy=HEAVY | {"matplotlib", "numpy", "omegaconf"})
    assert [(code, heavy) for _, code, heavy in told] == [(0, [])]
    assert "monitor: http://127.0.0.1:" in out and "fetched" in out


def test_a_report_needs_matplotlib_alone(run):
    ((_, code, heavy),), _ = imported(["report", run], heavy=HEAVY | {"matplotlib"})
    assert (code, heavy) == (0, ["matplotlib"])
