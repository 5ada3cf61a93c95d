"""A stream that goes away takes nothing with it."""

import errno
import io
import json
import logging
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from gspo_jax.cli import commands as cli
from gspo_jax.cli.commands import COMMANDS, main
from gspo_jax.files.stopping import SIGNALS, listening
from gspo_jax.run.metrics import RunLog
from gspo_jax.text.streams import Unfailing, guarded


class Broken(io.StringIO):
    def __init__(self, error, terminal):
        super().__init__()
        self.error, self.terminal = error, terminal

    def write(self, text):
        raise self.error

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),  # a terminal that was closed
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ValueError("I/O operation on closed file."),
    ],
    ids=["full", "terminal", "pipe", "closed"],
)
def test_a_run_whose_console_goes_away_keeps_its_lines_and_says_so_once(tmp_path, error, terminal):
    with RunLog(tmp_path, of=3, console=Console(file=Broken(error, terminal))) as log:
        log.start()
        for step in (1, 2, 3):
            log.step(step, {"reward": 1.0, "compile_time": 1.0})
            log.samples(step, [{"prompt": "p", "completion": "c", "reward": 1.0}])
        log.status("finished")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    (line,) = (tmp_path / "warnings.log").read_text().splitlines()
    assert "is left out from here on" in line and str(error.args[-1]) in line


def test_what_rich_cannot_draw_is_a_gap_in_the_display_and_not_in_the_run(tmp_path, monkeypatch):
    with RunLog(tmp_path, of=1, console=Console(file=io.StringIO())) as log:
        log.start()
        monkeypatch.setattr(log.display, "step", lambda *_: 1 / 0)
        log.step(1, {"reward": 1.0})
    assert "division by zero" in (tmp_path / "warnings.log").read_text()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_message_that_does_not_fit_its_arguments_is_not_the_runs_trouble(tmp_path, capsys):
    with RunLog(tmp_path, of=1, console=Console(file=io.StringIO())) as log:
        log._heard.emit(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "Logging error" in capsys.readouterr().err


def test_a_full_disk_behind_standard_output_is_gone_until_the_process_ends(monkeypatch):
    """Of a real descriptor: what its buffer holds must not raise again at the last flush."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with guarded("stdout"):
            print("a line")
            sys.stdout.flush()
            print("another", flush=True)
        assert sys.stdout is full
        full.flush()  # as the interpreter does; nothing is raised


def test_a_stream_that_is_not_there_takes_everything():
    stream = Unfailing(None)
    assert stream.write("text") == 4 and not stream.isatty()
    stream.flush()


def test_what_an_encoding_lacks_is_a_question_mark():
    raw = io.BytesIO()
    stream = Unfailing(io.TextIOWrapper(raw, "ascii", write_through=True))
    stream.write("a⏎b")
    stream.write("c")
    assert raw.getvalue() == b"a?bc"


def test_the_story_after_a_run_does_not_change_how_it_ended(monkeypatch, tmp_path, capsys):
    ended = SimpleNamespace(state="finished", exit_code=0, run_dir=tmp_path / "nowhere")
    monkeypatch.setattr(cli, "_train", lambda config: ended)
    monkeypatch.setattr("gspo_jax.cli.story.after_run", lambda *_: 1 / 0)
    assert main(["train", f"run.dir={tmp_path}"]) == 0
    assert "division by zero" in capsys.readouterr().err


def test_what_was_asked_to_be_printed_and_is_not_is_an_error(monkeypatch):
    def prints(arguments):
        print("what was asked for", flush=True)
        return 0

    monkeypatch.setitem(COMMANDS, "doctor", (prints, ""))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["doctor"]) == 6
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.fixture
def hangup():
    """Sets what SIGHUP does, however these tests were started."""
    earlier = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, earlier)


@pytest.mark.parametrize("times", [1, 3])
def test_a_terminal_that_closes_asks_to_stop_however_often_it_says_so(hangup, times):
    hangup(signal.SIG_DFL)
    with listening(lambda text: None) as stop:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.15)  # longer than an echo
        assert stop.asked == "preempted"


def test_nohup_is_believed(hangup):
    hangup(signal.SIG_IGN)
    with listening(lambda text: None) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked is None and signal.SIGHUP in SIGNALS
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
