"""Rows 72 and 73 with processes of their own: a run whose terminal, pipe or disk goes away."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from faults.small_runs import COMMAND, config, eventually, metrics, settings
from faults.tools import environment, status
from gspo_jax.run import checkpoint
from gspo_jax.train import train

pytestmark = pytest.mark.faults
DRIVEN = [sys.executable, str(Path(__file__).parent / "driven_run.py")]


@pytest.fixture(scope="module")
def undisturbed(tiny_dir, tmp_path_factory):
    """The metrics of the same run with a console."""
    return metrics(train(config(tiny_dir, tmp_path_factory.mktemp("undisturbed"))).run_dir)


@pytest.mark.parametrize(
    ("streams", "lost"),
    [
        (">/dev/full", ["stdout"]),
        (">/dev/full 2>&1", ["stdout", "stderr"]),
        ("<&- >&- 2>&-", []),  # nothing is there from the start, so nothing is lost
    ],
)
def test_row_72_a_run_without_a_place_to_write_to_finishes_as_with_one(
    tiny_dir, tmp_path, undisturbed, streams, lost
):
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", *COMMAND, "train"]
    made = settings(tiny_dir, tmp_path)
    ended = subprocess.run([*command, *made], env=environment(XLA_FLAGS=""), timeout=300)
    run = tmp_path / "run"
    assert ended.returncode == 0 and status(run)["state"] == "finished"
    assert metrics(run) == undisturbed and checkpoint.steps(run / "checkpoints")[-1] == 4
    warnings = run / "warnings.log"
    said = warnings.read_text() if warnings.exists() else ""
    reason = "is left out from here on (No space left on device)"
    assert [said.count(f"{name} {reason}") for name in lost] == [1] * len(lost), said
    assert said.count("left out") == len(lost), said


def test_row_73_a_terminal_that_closes_leaves_a_checkpoint_that_the_rerun_goes_on_from(
    tiny_dir, tmp_path, undisturbed
):
    """The kernel's own SIGHUP: the child leads the terminal's session, and its other end closes."""
    keyboard, terminal = pty.openpty()
    made, told = settings(tiny_dir, tmp_path), tmp_path / "told"
    leads = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    leads += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", leads, *DRIVEN, "reward", "2", "wait", "train", *made],
        env=environment(XLA_FLAGS="", TOLD=str(told)),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    os.set_blocking(keyboard, False)

    def reached():
        with suppress(BlockingIOError):  # a terminal that nobody reads would hold the run up
            os.read(keyboard, 65536)
        return told.exists() or process.poll() is not None

    eventually(reached, 120)
    os.close(keyboard)
    assert process.wait(120) == 75
    run = tmp_path / "run"
    assert status(run)["state"] == "preempted" and checkpoint.names(run / "checkpoints")
    assert "SIGHUP: saving and stopping" in (run / "warnings.log").read_text()
    assert train(config(tiny_dir, tmp_path)).state == "finished"
    assert metrics(run) == undisturbed
