"""The run directory's writer and the console."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from gspo_jax.errors import StorageError
from gspo_jax.files.jsonl import keep_until, plain
from gspo_jax.files.provenance import environment
from gspo_jax.files.whole import write_whole
from gspo_jax.numbers.shown import clock
from gspo_jax.run.metrics import RunLog
from gspo_jax.text.console import Display, advice, summary
from gspo_jax.text.inert import one_line, redact


def quiet(terminal=False, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def shown(console):
    return console.file.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_log(directory, step=None, **kwargs):
    log = RunLog(
        directory, of=kwargs.pop("of", 10), console=kwargs.pop("console", quiet()), **kwargs
    )
    log.start(step)
    return log


# ----------------------------------------------------------------------------------- files


def test_a_run_leaves_config_environment_status_and_one_line_per_step(tmp_path):
    with open_log(tmp_path, config="run: {steps: 2}\n", devices=["cpu 0"], of=2) as log:
        log.step(0, {"eval/avg@8": 0.25})
        log.step(1, {"reward": 0.5, "clip_frac_by_update": [0.0, 0.125]})
        log.step(2, {"reward": 0.75})
        log.status("finished")
    assert (tmp_path / "config.yaml").read_text() == "run: {steps: 2}\n"
    assert json.loads((tmp_path / "env.json").read_text())["devices"] == ["cpu 0"]
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval/avg@8": 0.25},
        {"step": 1, "reward": 0.5, "clip_frac_by_update": [0.0, 0.125]},
        {"step": 2, "reward": 0.75},
    ]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["of"]) == ("finished", 2, 2)


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    with open_log(tmp_path) as log:
        log.step(1, {"reward": 0.5})
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]


def test_a_step_that_is_written_again_replaces_its_line_and_is_shown_once(tmp_path):
    console = quiet()
    with open_log(tmp_path, console=console, of=2) as log:
        log.step(0, {"eval/avg@8": 0.25})
        log.step(1, {"reward": 0.5})
        log.step(2, {"reward": 0.75})
        log.step(2, {"reward": 0.75, "eval/avg@8": 0.5})
    with open_log(tmp_path, step=2, console=console, of=2) as log:
        log.step(2, {"reward": 0.75, "eval/avg@8": 0.625})  # evaluated after a resume at the end
    assert [(row["step"], row.get("eval/avg@8")) for row in lines(tmp_path / "metrics.jsonl")] == [
        (0, 0.25),
        (1, None),
        (2, 0.625),
    ]
    assert shown(console).count("step 2/2") == 1


def test_numbers_are_lossless_and_what_is_not_finite_is_null():
    third = np.float32(1) / np.float32(3)
    record = plain({"a": third, "b": float("nan"), "c": [np.inf, np.int32(4)], "d": np.arange(2)})
    back = json.loads(json.dumps(record, allow_nan=False))
    assert np.float32(back["a"]) == third
    assert back["b"] is None and back["c"] == [None, 4] and back["d"] == [0, 1]


def test_an_exception_leaves_the_state_failed_and_an_interrupt_interrupted(tmp_path):
    for error, state in ((ValueError, "failed"), (KeyboardInterrupt, "interrupted")):
        with pytest.raises(error), open_log(tmp_path) as log:
            log.step(3, {})
            raise error
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["state"], status["step"]) == (state, 3)


def test_a_resumed_run_has_one_line_per_step(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(1, 6):
            log.step(step, {"reward": step / 8})
            log.samples(step, [{"completion": f"at {step}"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    with open_log(tmp_path, step=3) as log:
        log.step(4, {"reward": 1.0})
        log.samples(4, [{"completion": "again"}])
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert lines(tmp_path / "metrics.jsonl")[-1]["reward"] == 1.0
    assert [row["completion"] for row in lines(tmp_path / "samples.jsonl")][2:] == ["at 3", "again"]


def test_a_new_run_in_a_used_directory_keeps_the_old_lines_aside(tmp_path):
    with open_log(tmp_path) as log:
        log.step(7, {"reward": 0.5})
    with open_log(tmp_path) as log:
        log.step(1, {"reward": 0.25})
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1]
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl.old")] == [7]


def test_replacing_a_file_leaves_no_part_behind_and_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_whole(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["status.json"]
    monkeypatch.undo()
    write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path):
    console = quiet()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with open_log(tmp_path, console=console) as log:
        for step in (1, 2):
            log.step(step, {"reward": 0.5})
    assert shown(console).count("metrics.jsonl is missing lines (No space left on device)") == 1


def test_lines_that_are_not_ours_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n[1]\n{"reward": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ------------------------------------------------------------------------------------ lock


def test_a_directory_in_use_is_refused_with_the_holder_and_touched_by_nothing(tmp_path):
    with open_log(tmp_path) as log:
        log.step(1, {})
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with pytest.raises(
            StorageError, match=rf"in use by another run \(process {os.getpid()} on"
        ):
            RunLog(tmp_path, of=1)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    RunLog(tmp_path, of=1).close()  # given back


def test_a_killed_run_leaves_no_claim(tmp_path):
    code = (
        "import os, pathlib, sys; from gspo_jax.run.metrics import lock\n"
        "held = lock(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert killed.returncode == -9
    assert "process" in (tmp_path / "lock").read_text()
    RunLog(tmp_path, of=1).close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written .*; set run\.dir elsewhere"):
        RunLog(tmp_path / "file" / "run", of=1)


# ------------------------------------------------------------------------------ environment


def test_no_secret_reaches_the_environment_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    argv = ["train", "x=0123456789abcdef", "y=https://me:pass@host/z", "hf_" + "a" * 30]
    monkeypatch.setattr(sys, "argv", argv)
    open_log(tmp_path).close()
    text = (tmp_path / "env.json").read_text()
    assert json.loads(text)["command"] == [
        "train",
        "x=(removed)",
        "y=https://(removed)@host/z",
        "(removed)",
    ]
    assert "0123456789abcdef" not in text and "WANDB" not in text


def test_an_objects_key_in_a_store_is_shown_and_a_key_that_opens_something_is_not(monkeypatch):
    monkeypatch.setenv("MODEL_S3_KEY", "models/Qwen3-0.6B")
    monkeypatch.setenv("STORAGE_KEY", "Zm9v/YmFyYmF6cXV4MTIzNDU2Nzg5/MA+x")
    monkeypatch.setenv("AWS_SECRET_KEY", "ab/cd/ef/gh")  # called a secret: whatever it looks like
    shown = redact("/mnt/models/Qwen3-0.6B Zm9v/YmFyYmF6cXV4MTIzNDU2Nzg5/MA+x ab/cd/ef/gh")
    assert shown == "/mnt/models/Qwen3-0.6B (removed) (removed)"


def test_redaction_leaves_plain_text_alone():
    assert redact("algo.loss.clip_low=3e-4 at runs/demo-seed0") == (
        "algo.loss.clip_low=3e-4 at runs/demo-seed0"
    )


def test_the_environment_names_versions_and_the_commit():
    env = environment()
    assert env["versions"]["jax"] and env["python"].startswith("3.")
    assert env["commit"] is None or len(env["commit"].partition("+")[0]) == 40


# --------------------------------------------------------------------------------- console

METRICS = {
    "reward": 0.4125,
    "clip_frac": 0.21,
    "clip_frac_low": 0.1,
    "clip_frac_high": 0.11,
    "completions/mean_length": 18.24,
    "completions/clipped_ratio": 0.015,
    "entropy": 0.4321,
    "tokens_per_second": 12345.6,
    "step_time": 2.0,
}


def test_the_numbers_to_watch():
    assert summary(METRICS) == [
        "reward 0.412",
        "clip 21.0% (low 10.0%, high 11.0%)",
        "length 18.2",
        "truncated 1.5%",
        "entropy 0.432",
    ]
    assert summary({"loss": 0.5, "reward": None}) == ["loss 0.5000"]  # supervised training


def test_without_a_terminal_a_run_is_about_twenty_plain_lines():
    console = quiet()
    display = Display(console, of=200)
    display.begin(0)
    for step in range(1, 201):
        display.step(step, METRICS)
    out = shown(console).splitlines()
    assert len(out) == 21  # the first step, then every tenth
    assert out[0].startswith("step   1/200") and out[-1].startswith("step 200/200")
    # 2 s per step and 100 steps to go at step 100
    assert "eta 3:20  12,346 tok/s  reward 0.412" in next(x for x in out if "100/200" in x)
    assert "\x1b" not in shown(console)


def test_on_a_terminal_the_bar_and_the_numbers_are_drawn_and_the_cursor_returns():
    console = quiet(terminal=True)
    display = Display(console, of=4)
    display.begin(0)
    display.step(1, METRICS)
    display.doing("update")
    display.end()
    assert "step 1/4" in shown(console) and "reward 0.412" in shown(console)
    assert shown(console).rstrip().endswith("\x1b[?25h")


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = quiet(terminal=True)
    Display(console, of=4).say("careful", style="yellow")
    assert "\x1b[33m" not in shown(console)


def test_one_suspended_step_does_not_move_the_estimate():
    console = quiet()
    display = Display(console, of=10)
    for step, seconds in enumerate([1.0, 1.0, 600.0, 1.0, 1.0], 1):
        display.step(step, {"step_time": seconds})
    assert "eta 0:05" in shown(console).splitlines()[-1]


def test_compilation_is_told_apart_from_the_step():
    console = quiet()
    Display(console, of=2).step(1, METRICS | {"compile_time": 23.14})
    assert "step 1: 23.1 s of compilation, not counted as step time." in shown(console)


def test_advice_is_given_once_and_only_when_there_is_reason():
    assert advice(METRICS) == {}
    bad = {"frac_reward_zero_std": 1.0, "completions/clipped_ratio": 0.3, "clip_frac": 0.6}
    assert set(advice(bad | {"skipped_updates": 1})) == {"equal", "truncated", "clipped", "skipped"}
    console = quiet()
    display = Display(console, of=100)
    display.step(2, bad)
    display.step(3, bad)
    assert shown(console).count("no advantage is left") == 1


def test_what_a_model_wrote_is_shown_inert():
    hostile = "[bold red]x[/] \x1b]0;title\x07\x1b[2J\u202etxt\r\n\x00<script>"
    assert one_line(hostile, 80) == "[bold red]x[/] txt⏎<script>"
    console = quiet(terminal=True)
    Display(console, of=1).samples(1, [{"prompt": "2+2", "completion": hostile, "reward": 1.0}])
    assert "[bold red]x[/] txt⏎<script>" in shown(console)
    assert "\x1b]0;" not in shown(console) and "\x1b[2J" not in shown(console)


def test_a_megabyte_of_text_is_one_line_of_the_width():
    assert len(one_line("A" * 1_000_000, 40)) == 40
    assert one_line("short", 40) == "short"


def test_a_chat_is_shown_by_its_last_message():
    assert one_line([{"role": "user", "content": "2+2?"}], 40) == "2+2?"


def test_a_response_that_was_not_scored_reads_none():
    console = quiet()
    Display(console, of=1).samples(1, [{"prompt": "p", "completion": "c", "reward": float("nan")}])
    assert "none" in shown(console)


def test_samples_fit_the_console():
    console = quiet(width=60)
    row = {"prompt": "p" * 200, "completion": "c" * 200, "answer": "7" * 50, "reward": 0.5}
    Display(console, of=1).samples(1, [row] * 9)
    out = shown(console).splitlines()
    assert max(map(len, out)) <= 60 and sum("ccc" in line for line in out) == 4


def test_clock():
    assert [clock(s) for s in (5.0, 72.0, 3672.0)] == ["0:05", "1:12", "1:01:12"]
