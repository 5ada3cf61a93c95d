"""Rows 21, 24, 28 and 33 at the level of one scoring: what a child may do, and what comes of it."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from faults.small_runs import eventually
from faults.tools import REWARDS
from gspo_jax.batch import Problem
from gspo_jax.errors import DataError
from gspo_jax.files import stopping
from gspo_jax.files.stopping import Abandoned, Stop
from gspo_jax.numbers.tally import Average, Count
from gspo_jax.reward import remote, rewards
from gspo_jax.reward.remote import load_remote


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "GRACE", 0.1)


@pytest.fixture(scope="module")
def judge():
    """One child for many tests, started again where one has killed it."""
    return load_remote([f"{REWARDS}:fails_where_asked"], seconds=1.0, memory=4.0)


@pytest.fixture(scope="module")
def echo():
    return load_remote([f"{REWARDS}:returns_the_column"], seconds=20.0)


def score(functions, levels, column="level", texts=None, **options):
    problems = [Problem(f"p{i}", "q", None, {column: level}) for i, level in enumerate(levels)]
    texts = ["x" * (i + 1) for i in range(len(levels))] if texts is None else texts
    return rewards.score(functions, None, problems, texts, [[1]] * len(texts), **options)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise", "raised ZeroDivisionError: as asked"),
        ("sleep", "gave no answer within 1 s"),
        ("spin", "gave no answer within 1 s"),
        ("die", "lost its process to SIGKILL (out of memory?)"),
        ("exit", "ended its process with exit code 3"),
        ("memory", "raised MemoryError"),
    ],
)
def test_row_33_what_is_lost_scores_0_and_all_others_keep_their_place(judge, what, reason, caplog):
    levels = [None, what, None, "raise", None]
    got, reward, log = score(judge, levels, errors="zero", told=set())
    np.testing.assert_array_equal(got["fails_where_asked"], [1, 0, 3, 0, 5])
    np.testing.assert_array_equal(reward, [1, 0, 3, 0, 5])
    assert log == {"rewards/fails_where_asked/errors": Count(2)}
    assert f"reward fails_where_asked {reason}" in caplog.text and "(on 2 of 5" in caplog.text


@pytest.mark.parametrize("what", ["raise", "die"])
def test_row_28_strict_stops_instead_with_one_line(judge, what):
    with pytest.raises(DataError, match=r"^reward fails_where_asked .* \(on 1 of 2 resp") as caught:
        score(judge, [None, what], errors="stop")
    assert "\n" not in str(caught.value)


def test_row_21_a_function_that_always_hangs_costs_three_limits_and_no_more(judge):
    began = time.monotonic()
    got, _, log = score(judge, ["sleep"] * 40, errors="zero", told=set())
    # 3 children, each with 1 s to answer, and a start; then the rest fails at once.
    assert time.monotonic() - began < 30
    np.testing.assert_array_equal(got["fails_where_asked"], np.zeros(40))
    assert log == {"rewards/fails_where_asked/errors": Count(40)}


def test_row_33_a_child_killed_from_outside_in_mid_batch_is_replaced(tmp_path):
    where = tmp_path / "pids"
    functions = load_remote([f"{REWARDS}:tells_its_process"], seconds=20.0)
    killed = []

    def kill_the_third():
        eventually(lambda: where.exists() and where.read_text().count("\n") == 3)
        killed.append(int(where.read_text().split()[-1]))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_third)
    thread.start()
    got, _, log = score(functions, [str(where)] * 6, "where", errors="zero", told=set())
    thread.join()
    np.testing.assert_array_equal(got["tells_its_process"], [1, 2, 0, 4, 5, 6])
    assert log == {"rewards/tells_its_process/errors": Count(1)}
    pids = where.read_text().split()
    assert len(set(pids[:3])) == len(set(pids[3:])) == 1 and pids[0] != pids[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, None, float("nan")], r"returned nan \(float\) for response 2 of 3 \(to problem p2"),
        ([1.0, float("inf"), 0.0], r"returned inf \(float\) for response 1 of 3 \(to problem p1"),
        ([True, 0.0, 0.0], r"returned True \(bool\) for response 0 of 3 \(to problem p0"),
        ([0.0, "1.0", 0.0], r"returned '1.0' \(str\) for response 1 of 3 \(to problem p1"),
        ([0.0, 1.0], "returned 2 numbers for 3 responses"),
        (1.0, r"returned 1.0 \(float\), wanted a list of 3 numbers"),
    ],
    ids=repr,
)
def test_row_24_a_wrong_value_from_a_child_is_one_line_with_function_and_row(echo, values, message):
    with pytest.raises(DataError, match=rf"^reward returns_the_column {message}") as caught:
        score(echo, [values] * 3)
    assert "\n" not in str(caught.value)
    counted = score(echo, [values] * 3, errors="zero")[2]["rewards/returns_the_column/errors"]
    assert counted.value in (1, 3)
    got, _, _ = score(echo, [[1.0, None, 2.0]] * 3)  # None is no error, and the child goes on
    np.testing.assert_array_equal(got["returns_the_column"], [1, np.nan, 2])


def test_row_28_the_first_traceback_is_told_once(judge, caplog):
    told = set()
    for _ in range(3):
        score(judge, ["raise", None], errors="zero", told=told)
    assert caplog.text.count("ZeroDivisionError: as asked\n") == 1
    assert (
        "fails_where_asked" in caplog.text and 'raise ZeroDivisionError("as asked")' in caplog.text
    )


def test_row_33_children_end_with_a_parent_that_is_killed(tmp_path):
    """Even in the middle of a call into C that holds the interpreter's lock."""
    where = tmp_path / "pids"
    script = textwrap.dedent(f"""
        import sys, time
        sys.path[:] = {sys.path!r}
        from gspo_jax.batch import Problem
        from gspo_jax.reward.rewards import score
        from gspo_jax.reward.remote import load_remote
        functions = load_remote(["{tmp_path}/spins.py:f"], seconds=1000.0)
        score(functions, None, [Problem("p", "q")], ["x"], [[1]])
    """)
    (tmp_path / "spins.py").write_text(
        f"import os, subprocess\ndef f(completion):\n"
        f"    open({str(where)!r}, 'w').write(str(os.getpid()) + '\\n')\n"
        f"    return sum(range(10**15))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    eventually(lambda: where.exists() and where.read_text().endswith("\n"), 30)
    child = int(where.read_text())
    assert alive(child)
    parent.kill()
    parent.wait()
    eventually(lambda: not alive(child))


def test_a_child_outlives_the_thread_that_started_it():
    """An executor's thread that loads or scores and ends; Linux ties a child to its thread."""
    made = []
    spec = f"{REWARDS}:short_words"
    thread = threading.Thread(target=lambda: made.append(load_remote([spec], seconds=20.0)))
    thread.start()
    thread.join()
    eventually(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists())
    running = made[0]["short_words"].child._running
    assert rewards.score(made[0], None, [Problem("p", "q")], ["A"], [[1]])[1] == [1.0]
    assert running is made[0]["short_words"].child._running and alive(running.process.pid)


def test_threads_that_share_a_child_get_their_own_answers(judge):
    lengths = {}

    def ask(first):
        texts = ["x" * (first + i) for i in range(60)]
        lengths[first] = score(judge, [None] * 60, texts=texts)[1].tolist()

    threads = [threading.Thread(target=ask, args=(first,)) for first in (1, 101, 201)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {first: [first + i for i in range(60)] for first in (1, 101, 201)}


def test_the_module_of_a_reward_file_is_found_by_processes_that_it_starts(tmp_path):
    (tmp_path / "pooled_lengths.py").write_text(
        "import multiprocessing\n"
        "def length(text):\n    return float(len(text))\n"
        "def pooled(completions):\n"
        "    told = []\n"
        "    for way in ('spawn', 'forkserver'):\n"
        "        with multiprocessing.get_context(way).Pool(1) as pool:\n"
        "            told.append(pool.map_async(length, completions).get(60))\n"
        "    assert told[0] == told[1]\n"
        "    return told[0]\n"
    )
    functions = load_remote([f"{tmp_path}/pooled_lengths.py:pooled"], seconds=120.0)
    got, _, _ = score(functions, [None] * 3)
    np.testing.assert_array_equal(got["pooled"], [1, 2, 3])


def test_a_wish_to_stop_ends_the_wait_for_a_child(judge, monkeypatch):
    stop = Stop()
    monkeypatch.setattr(stopping, "_listening", [stop])
    threading.Timer(0.3, stop.ask, ["preempted"]).start()
    began = time.monotonic()
    with pytest.raises(Abandoned):
        score(judge, ["sleep"], errors="zero")
    assert time.monotonic() - began < 1.0
    monkeypatch.undo()
    assert score(judge, [None])[1] == [1.0]  # another child


def test_what_functions_log_and_ask_for_crosses_the_border(tmp_path, capfd):
    (tmp_path / "chatty.py").write_text(
        "async def waits(completion, answer):\n"
        "    import asyncio\n"
        "    await asyncio.sleep(1e6 if completion == 'never' else 0)\n"
        "    return 1.0\n"
        "def chats(completions, trainer_state, log_metric, log_extra, data, **_):\n"
        "    print('seen', trainer_state.global_step)\n"
        "    log_metric('share', 0.25)\n"
        "    log_extra('words', [1, 2, 6])\n"
        "    return [float(d[(1, 2)] is d) for d in data]\n"
        "class Longer:\n"
        "    def __call__(self, completions):\n        return [len(c) for c in completions]\n"
        "chats_2 = Longer()\n"
    )
    odd = {}  # no JSON could say this
    odd[(1, 2)] = odd
    names = ("waits", "chats", "chats_2")
    functions = load_remote([f"{tmp_path}/chatty.py:{name}" for name in names], seconds=1.0)
    assert list(functions) == ["waits", "chats", "Longer"]
    texts = ["a", "never", "ccc"]
    got, _, log = score(functions, [odd] * 3, "data", texts, errors="zero", told=set(), step=7)
    np.testing.assert_array_equal(got["waits"], [1, 0, 1])
    np.testing.assert_array_equal(got["chats"], [1, 1, 1])
    np.testing.assert_array_equal(got["Longer"], [1, 5, 3])
    errors = {"rewards/waits/errors": Count(1)}
    assert log == {"share": Average(0.25, 3), "words": Average(3.0, 3)} | errors
    assert capfd.readouterr().out == "seen 7\n"


def test_functions_that_are_found_wrong_in_a_child_are_refused_as_elsewhere(tmp_path):
    (tmp_path / "broken.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    for spec, message in [
        ("nothing.py:f", r"reward nothing\.py:f: no such file"),
        ("gspo_jax.answers.verify:acuracy", r"Did you mean gspo_jax\.answers\.verify:accuracy\?"),
        (f"{tmp_path}/broken.py:f", r"broken\.py:f: importing it lost its process to SIGSEGV\."),
    ]:
        with pytest.raises(DataError, match=message):
            load_remote([spec], seconds=1.0)
    problem = Problem("p", "q", None, {"lock": threading.Lock()})
    functions = load_remote([f"{REWARDS}:short_words"], seconds=5.0)
    with pytest.raises(DataError, match="the data's columns cannot be sent to the process"):
        rewards.score(functions, None, [problem], ["x"], [[1]])


def test_a_child_leaves_no_process_behind_and_never_imports_jax(tmp_path):
    (tmp_path / "looks.py").write_text(
        "import os, sys\n"
        "def looks(completions):\n"
        "    assert not {'jax', 'flax', 'transformers'} & set(sys.modules)\n"
        "    return [float(os.getpid())] * len(completions)\n"
    )
    functions = load_remote([f"{tmp_path}/looks.py:looks"] * 2, seconds=5.0)
    assert list(functions) == ["looks", "looks_2"]
    got, _, _ = rewards.score(functions, None, [Problem("p", "q")], ["x"], [[1]])
    pid = functions["looks"].child._running.process.pid
    assert alive(pid) and abs(got["looks"][0] - pid) < 1 and got["looks"] == got["looks_2"]
    del functions
    eventually(lambda: not alive(pid))
