"""Rows 17 to 21: a run that is told to stop does, and loses at most the step in flight."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_end_to_end import stored

from faults.driven_run import at
from faults.small_runs import config, eventually, metrics, settings, start
from faults.tools import REWARDS, environment, one_line, status
from gspo_jax.cli.commands import main
from gspo_jax.errors import DataError
from gspo_jax.files import stopping
from gspo_jax.files.stopping import Abandoned, listening, out_of_time, raise_if_asked
from gspo_jax.run import checkpoint
from gspo_jax.text.console import Display
from gspo_jax.train import train

DRIVEN = [sys.executable, str(Path(__file__).parent / "driven_run.py")]


@pytest.fixture(scope="module")
def undisturbed(tiny_dir, tmp_path_factory):
    """The same run that nobody disturbs."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return train(config(tiny_dir, directory)).run_dir


def assert_same_run(got, wanted):
    """Every array of the last checkpoint, and every metric of every step."""
    ours, theirs = stored(got, 4), stored(wanted, 4)
    assert ours.keys() == theirs.keys() and len(ours) > 60
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert metrics(got) == metrics(wanted)


# While a step samples and scores it is given up; then its rollout is saved with the updates that
# are done ("2+1"). The first update is mostly compilation.
PLACES = [
    ("generate", 3, "2"),
    ("reward", 3, "2"),
    ("advantage", 3, "2+0"),
    ("update", 1, "0+1"),
    ("update", 3, "2+1"),
    ("save", 3, "3"),
    ("evaluate", 0, "0"),
    ("evaluate", 2, "2"),
    ("evaluate", 4, "4"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("place", "step", "saved"), PLACES)
def test_row_17_a_signal_in_any_phase_saves_and_the_rerun_is_bitwise_the_same(
    tiny_dir, tmp_path, monkeypatch, undisturbed, place, step, saved
):
    at(place, step, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch.setattr)
    more = ["run.save_every=3"] if place == "save" else []
    result = train(config(tiny_dir, tmp_path, *more))
    done = int(saved.partition("+")[0])
    assert (result.state, result.exit_code, result.steps) == ("preempted", 75, done)
    said = status(result.run_dir)
    assert (said["state"], said["step"]) == ("preempted", done)
    assert checkpoint.names(result.run_dir / "checkpoints")[-1] == saved
    monkeypatch.undo()
    assert train(config(tiny_dir, tmp_path, *more)).state == "finished"
    assert_same_run(result.run_dir, undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "state", "code"),
    [
        (signal.SIGTERM, "preempted", 75),
        (signal.SIGINT, "interrupted", 130),
        # Row 19: Slurm's --signal=USR1@120 comes before the end of the job; the same as SIGTERM.
        (signal.SIGUSR1, "preempted", 75),
    ],
)
def test_row_19_every_signal_has_its_state_and_exit_code(
    tiny_dir, tmp_path, monkeypatch, capsys, number, state, code
):
    at("reward", 2, lambda: os.kill(os.getpid(), number), monkeypatch.setattr)
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    assert main(["train", *settings(tiny_dir, tmp_path, "eval.split=test")]) == code
    assert status(tmp_path / "run")["state"] == state
    said = " ".join(capsys.readouterr().out.split())
    assert f"{signal.Signals(number).name}: saving and stopping; a second one stops at" in said
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "step"), [("generate", 1), ("reward", 2), ("update", 1), ("evaluate", 2), ("save", 2)]
)
def test_row_17_a_signal_from_outside_to_a_process_of_its_own(
    tiny_dir, tmp_path, undisturbed, place, step
):
    """Nothing is in the compiler's cache: the first update is mostly compilation."""
    given = settings(tiny_dir, tmp_path, "run.save_every=1", "run.keep=9")
    arguments = [place, str(step), "tell"]
    told = tmp_path / "told"
    process = start(given, command=[*DRIVEN, *arguments], cached=False, TOLD=str(told))
    eventually(told.exists, process=process)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert status(tmp_path / "run")["state"] == "preempted"
    assert train(config(tiny_dir, tmp_path, *given[-2:])).state == "finished"
    assert_same_run(tmp_path / "run", undisturbed)


def pid_of(run_dir):
    return status(run_dir)["pid"] if (run_dir / "status.json").exists() else None


@pytest.mark.faults
def test_row_17_signals_at_random_moments_until_the_run_is_done(tiny_dir, tmp_path, undisturbed):
    """Each attempt is given a little longer, so that the later ones come to a step or two."""
    rng, codes, run_dir = np.random.default_rng(0), [], tmp_path / "run"
    while not codes or codes[-1] != 0:
        process = start(settings(tiny_dir, tmp_path))
        eventually(lambda p=process: pid_of(run_dir) == p.pid, process=process)
        end = time.monotonic() + rng.uniform(0, 0.3 * len(codes))
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT][len(codes) % 3])
        out, _ = process.communicate(timeout=120)
        codes.append(process.returncode)
        assert codes[-1] in (0, 75, 130) and len(codes) < 30, (codes, out)
    assert len(codes) > 5 and {75, 130} <= set(codes)
    assert_same_run(run_dir, undisturbed)


# ------------------------------------------------------------------------------ twice


IN_C = """
    import hashlib
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
"""
IN_XLA = """
    import jax, jax.numpy as jnp
    def deep(x):
        for i in range(20_000):
            x = jnp.sin(x) * x[::-1] + i
        return x
    lowered = jax.jit(deep).lower(jnp.ones(100))
    print("compiling", flush=True)
    lowered.compile()
"""


@pytest.mark.faults
@pytest.mark.parametrize("work", [IN_C, IN_XLA], ids=["C", "XLA"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGUSR1, 15)],
)
def test_row_18_a_second_signal_ends_a_process_that_is_deep_in_c(work, first, second):
    """Python's own handlers never run there: the interpreter's lock is free, but no bytecode is."""
    script = textwrap.dedent("""
        from gspo_jax.files.stopping import listening
        with listening(lambda text: print(text, flush=True)):
            print("listening", flush=True)
    """) + work.replace("\n    ", "\n    ")
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment()
    )
    for line in process.stdout:
        if line.strip() == ("compiling" if work is IN_XLA else "listening"):
            break
    time.sleep(0.5)
    process.send_signal(first)
    assert "saving and stopping" in process.stdout.readline()
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(second)
    assert process.wait(10) == 128 + second
    assert time.monotonic() - began < 2


@pytest.mark.faults
def test_row_18_the_checkpoint_before_a_forced_end_is_whole(tiny_dir, tmp_path, undisturbed):
    """In the update of the third step, which will not return."""
    told = tmp_path / "told"
    given = settings(tiny_dir, tmp_path, "run.save_every=2")
    process = start(given, command=[*DRIVEN, "update", "3", "spin"], TOLD=str(told))
    eventually(told.exists, 120, process)
    # Saved in the background: on a busy machine it may still be under way.
    eventually(lambda: checkpoint.steps(tmp_path / "run" / "checkpoints") == [2], 60, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert time.monotonic() - began < 2
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    assert train(config(tiny_dir, tmp_path, "run.save_every=2")).state == "finished"
    assert_same_run(tmp_path / "run", undisturbed)


def test_row_18_an_echo_of_the_first_signal_is_not_a_second():
    """`timeout` and schedulers signal the process and then its group, which it is in."""
    said = []
    with listening(said.append) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "preempted"
        with pytest.raises(Abandoned):
            raise_if_asked()
        eventually(lambda: said)
    raise_if_asked()  # heard by nobody any more
    assert len(said) == 1


def test_several_processes_do_not_give_a_step_up():
    with listening(lambda text: None, abandon=False) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == "preempted"
        raise_if_asked()


# ---------------------------------------------------------------------------- a budget


@pytest.mark.faults
def test_save_by_stops_before_the_step_that_would_pass_it(tiny_dir, tmp_path, monkeypatch):
    """Two steps fit; the third would end later. A later process has its own time."""
    given = ["eval.split=test", "run.save_by=10"]
    later, monotonic, counter = [0.0], time.monotonic, time.perf_counter
    monkeypatch.setattr(stopping, "BEGAN", monotonic())
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + later[0])
    monkeypatch.setattr(time, "perf_counter", lambda: counter() + later[0])

    def step_takes_4_minutes():
        later[0] += 240

    for step in (1, 2, 3, 4):
        at("reward", step, step_takes_4_minutes, monkeypatch.setattr)
    result = train(config(tiny_dir, tmp_path, *given))
    assert (result.state, result.exit_code, result.steps) == ("preempted", 75, 2)
    monkeypatch.setattr(stopping, "BEGAN", time.monotonic())
    result = train(config(tiny_dir, tmp_path, *given))
    assert (result.state, result.steps) == ("finished", 4)


@pytest.mark.parametrize(
    ("minutes", "need", "over"), [(0.0, 1e9, False), (1.0, 9.0, False), (1.0, 11.0, True)]
)
def test_a_budget_of_minutes_counts_from_the_start_of_the_process(monkeypatch, minutes, need, over):
    monkeypatch.setattr(stopping, "BEGAN", time.monotonic() - 50)
    assert out_of_time(minutes, need) is over


# ------------------------------------------------------------------------- a long pause


@pytest.mark.faults
@pytest.mark.parametrize("pause", [3.0, 30.0])
def test_row_20_a_stopped_process_continues_as_if_nothing_had_been(
    tiny_dir, tmp_path, undisturbed, pause
):
    """With the child that is scoring, whose limit is shorter than the pause: as a laptop sleeps."""
    told = tmp_path / "told"
    limit = ["task.reward_timeout=1.5"]
    given = settings(tiny_dir, tmp_path, *limit, reward="slow")
    process = start(given, command=[*DRIVEN, "reward", "2", "tell"], TOLD=str(told))
    eventually(told.exists, 120, process)
    time.sleep(0.1)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [pid for thread in threads for pid in thread.read_text().split()]
    asleep = [process.pid, *map(int, children)]
    assert len(asleep) > 1
    for number, seconds in ((signal.SIGSTOP, pause), (signal.SIGCONT, 0)):
        for pid in asleep:
            os.kill(pid, number)
        time.sleep(seconds)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    rows = [
        {k.replace("/slow/", "/short_words/"): v for k, v in row.items()}
        for row in metrics(tmp_path / "run")
    ]
    assert rows == metrics(undisturbed)  # which has no errors of the reward function


@pytest.mark.parametrize(
    ("times", "left"), [([10, 3000], "1:20"), ([3000, 10, 11], "1:17"), ([9, 10, 11, 3000], "1:00")]
)
def test_row_20_the_estimate_forgets_a_pause(times, left):
    out = io.StringIO()
    display = Display(Console(file=out, width=200), of=10)
    for number, seconds in enumerate(times, 1):
        display.step(number, {"step_time": seconds})
    assert f"eta {left}" in out.getvalue().splitlines()[-1]


# -------------------------------------------------------------------------------- a hang


@pytest.mark.faults
def test_row_21_a_reward_that_never_returns_is_killed_counted_and_the_run_goes_on(
    tiny_dir, tmp_path, capsys
):
    given = ["task.reward_timeout=1", "run.steps=3", "eval.split=test"]
    run_dir = train(config(tiny_dir, tmp_path, *given, reward="hangs_at_second_call")).run_dir
    rows = metrics(run_dir)
    assert status(run_dir)["state"] == "finished"
    # The first call of a process returns: the rehearsal, and the second step in a new one.
    errors = [row.get("rewards/hangs_at_second_call/errors") for row in rows]
    assert errors == [16, None, 16]
    assert [row["reward"] == 0 for row in rows] == [True, False, True]
    said = " ".join(capsys.readouterr().out.split())
    told = "reward hangs_at_second_call gave no answer within 1 s (task.reward_timeout) (on 16 of"
    assert said.count(told) == 1
    assert told in (run_dir / "warnings.log").read_text()


@pytest.mark.faults
def test_row_28_a_reward_that_raises_scores_0_or_stops_the_run(tiny_dir, tmp_path, capsys):
    more = ["eval.split=test", "run.steps=3"]
    given = settings(tiny_dir, tmp_path, "run.name=zero", *more, reward="divides_by_zero")
    assert main(["train", *given]) == 0
    rows = metrics(tmp_path / "zero")
    errors = [row.get("rewards/divides_by_zero/errors") for row in rows]
    assert errors == [None, 16, None] and rows[1]["reward"] == 0
    log = (tmp_path / "zero" / "warnings.log").read_text()
    assert log.count("ZeroDivisionError: division by zero\n") == 1
    assert f'File "{REWARDS}"' in log
    capsys.readouterr()
    given = settings(tiny_dir, tmp_path, "run.name=stop", *more, reward="divides_by_zero")
    assert main(["train", *given, "task.reward_errors=stop"]) == 3
    line = one_line(capsys.readouterr().err)
    assert "reward divides_by_zero raised ZeroDivisionError: division by zero (on 16 of" in line
    assert status(tmp_path / "stop")["state"] == "failed"
    assert checkpoint.names(tmp_path / "stop" / "checkpoints") == ["1"]  # the step that was whole
    assert [row["step"] for row in metrics(tmp_path / "stop")] == [1]


@pytest.mark.faults
def test_row_28_a_stop_at_a_reward_in_an_evaluation_keeps_the_step_before_it(tiny_dir, tmp_path):
    given = ["run.steps=3", "task.reward_errors=stop"]
    given = config(tiny_dir, tmp_path, *given, reward="fails_at_the_second_evaluation")
    with pytest.raises(DataError, match="fails_at_the_second_evaluation raised RuntimeError: late"):
        train(given)
    run_dir = tmp_path / "run"
    assert checkpoint.names(run_dir / "checkpoints") == ["2"]
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2] and "reward" in rows[-1]
