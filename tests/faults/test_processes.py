"""Row 55, and what it rests on: two processes of one device each are one process of two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gspo_jax.run import checkpoint

SMALL = {
    "run": {"save_every": 1, "log_completions": 0, "name": "run"},
    "rollout": {"prompts": 4, "group_size": 4, "max_completion_length": 16},
    "eval": {"problems": 8, "samples": 2, "batch": 8},
    "mesh": {"data": 2},
}
MAIN = "import sys; from gspo_jax.cli.commands import main; sys.exit(main())"
MACHINE = ("time/", "speed/", "step_time", "compile", "tokens_per_second")  # not of the run


def start(directory: Path, *options: str, devices: int = 1, steps: int = 3) -> subprocess.Popen:
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "small.yaml"
    config.write_text(json.dumps(SMALL | {"run": SMALL["run"] | {"dir": str(directory)}}))
    log = (directory / f"{len(list(directory.glob('*.log')))}.log").open("w")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "train", config, f"run.steps={steps}", *options],
        env=env | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
        stdout=log,
        stderr=log,
    )


def start_two(directory: Path, steps: int = 3) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = ("--coordinator", address, "--processes", "2", "--process")
    return [start(directory, *common, str(i), steps=steps) for i in range(2)]


def said(directory: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(directory.glob("*.log")))


def metrics(run: Path) -> list[dict]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE)} for row in rows]


@pytest.mark.faults
def test_two_processes_are_one_process_with_two_devices(tmp_path):
    for process in start_two(tmp_path / "two"):
        assert process.wait(300) == 0, said(tmp_path / "two")
    assert start(tmp_path / "one", devices=2).wait(300) == 0, said(tmp_path / "one")
    two, one = tmp_path / "two" / "run", tmp_path / "one" / "run"
    assert metrics(two) == metrics(one)
    assert metrics(two / "processes" / "1") == metrics(one)
    name = "export/model.safetensors"
    assert (two / name).read_bytes() == (one / name).read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_row_55_a_killed_process_takes_the_others_along_and_no_checkpoint(tmp_path, victim):
    both = start_two(tmp_path, steps=1000)
    checkpoints = tmp_path / "run" / "checkpoints"
    patience = time.monotonic() + 240
    while not checkpoint.steps(checkpoints):
        assert time.monotonic() < patience and all(p.poll() is None for p in both), said(tmp_path)
        time.sleep(0.1)
    both[victim].kill()
    assert both[1 - victim].wait(60) != 0
    newest = checkpoint.steps(checkpoints)[-1]
    # One process with two devices goes on from what two have written.
    more = newest + 1
    assert start(tmp_path, devices=2, steps=more).wait(300) == 0, said(tmp_path)
    assert metrics(tmp_path / "run")[-1]["step"] == more


@pytest.mark.faults
def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(tmp_path):
    both = start_two(tmp_path, steps=1000)
    file, patience = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not file.exists() or file.read_text().count("\n") < 2:
        assert time.monotonic() < patience and all(p.poll() is None for p in both), said(tmp_path)
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    assert [process.wait(120) for process in both] == [75, 75], said(tmp_path)
    saved = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert metrics(tmp_path / "run")[-1]["step"] == saved
