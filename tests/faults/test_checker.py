"""Rows 28 to 33: what a completion can do to the checker, and what it cannot."""

import json
import sys

import pytest

from faults.bombs import BOMBS, CODE, HACKS, LONG
from faults.tools import python
from gspo_jax.answers.verify import accuracy, boxed, check
from gspo_jax.batch import Problem
from gspo_jax.reward.rewards import score


def by_tags(answer, entry):
    """In reasoning-gym's form, so that the answer is looked for in <answer> tags too."""
    return check(rf"\boxed{{{answer}}}", entry["answer"]).score if answer else 0.0


def scored(function):
    """A reward function as a run calls it."""

    def one(text, gold, prompt="What is 3+4?"):
        return score({"f": function}, None, [Problem("p", prompt, gold)], [text], [[1]])[1][0]

    return one


SCORERS = {
    "check": lambda text, gold: check(text, gold).score,
    "accuracy": lambda text, gold: accuracy(["What is 3+4?"], [text], [gold])[0],
    "accuracy, as a run calls it": scored(accuracy),
    "tags, as a run calls them": scored(by_tags),
}

# In a process that may not have more than 2 GB, so that a mistake here costs nothing. The clock is
# that of the process, which other processes do not move.
UNDER_LIMITS = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
from faults.test_checker import SCORERS
for name, text, gold in json.load(sys.stdin):
    for scorer in SCORERS:
        began = time.process_time()
        score = SCORERS[scorer](text, gold)
        took = time.process_time() - began
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        peak = int(status["VmHWM"].split()[0]) / 2**10
        print(json.dumps([name, scorer, float(score), took, peak]))
"""


def in_a_child(cases):
    """(name, scorer, score, seconds, peak MB of the process) of each text and gold answer."""
    done = python(UNDER_LIMITS, input=json.dumps(cases))
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(cases) * len(SCORERS)
    return told


def test_row_29_a_bomb_in_an_answer_costs_less_than_a_second_and_no_memory():
    """As the answer, and as the gold answer that another answer is compared with."""
    assert len(BOMBS) >= 23
    cases = [(name, rf"so \boxed{{{bomb}}}", "314159") for name, bomb in BOMBS.items()]
    cases += [(f"gold {name}", r"\boxed{314159}", bomb) for name, bomb in BOMBS.items()]
    told = in_a_child(cases)
    start = told[0][-1]
    for name, scorer, value, took, peak in told:
        assert value == 0 and took <= 1 and peak - start < 100, (name, scorer, value, took, peak)


def test_row_30_code_in_an_answer_is_never_executed(tmp_path, monkeypatch):
    """No canary, and no event of the interpreter that running something would raise."""
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    dangerous = ("compile", "exec", "import", "open", "os.", "subprocess", "socket", "ctypes")
    seen, listening = [], [False]

    def listen(event, args):
        if listening[0] and event.startswith(dangerous):
            seen.append((event, args))

    sys.addaudithook(listen)
    for payload in CODE:
        code = payload.replace("CANARY", str(canary))
        forms = (code, rf"\boxed{{{code}}}", rf"<answer>{code}</answer>", rf"\boxed{{{code}")
        for name, scorer in SCORERS.items():
            scorer(r"\boxed{1}", "1")  # imports and compiles what it needs for itself
            listening[0] = True
            for text in forms:
                for gold in ("5", code + " ", "x" + code):
                    assert scorer(text, gold) in (0, 1), (name, text, gold)
            listening[0] = False
    assert seen == [] and not canary.exists() and list(tmp_path.iterdir()) == []
    eval(compile("1", "x", "eval"))
    listening[0] = True
    eval(compile("1", "x", "eval"))  # the trap itself works
    listening[0] = False
    assert seen


@pytest.mark.faults
def test_row_31_a_megabyte_takes_less_than_a_second():
    told = in_a_child([(name, text, "314159") for name, text in LONG.items()])
    for name, scorer, value, took, peak in told:
        assert value == 0 and took <= 1 and peak < 600, (name, scorer, value, took, peak)


def work(action):
    """Executed lines of Python."""
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        action()
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("name", LONG)
def test_row_31_twice_the_text_is_at_most_twice_the_work(name):
    half, quarter = LONG[name][: 2**16], LONG[name][: 2**15]
    for scorer in (boxed, lambda text: SCORERS["tags, as a run calls them"](text, "5")):
        assert work(lambda s=scorer: s(half)) <= 2.1 * work(lambda s=scorer: s(quarter)) + 200


@pytest.mark.parametrize("name", HACKS)
def test_row_32_what_is_not_the_one_boxed_answer_scores_0(name):
    text, gold = HACKS[name]
    # A function in reasoning-gym's form is given the last answer in tags, or the last box.
    tags = {"tags, as a run calls them"}
    given = "<answer>" in text or name in ("two boxes, right one last", "two options in boxes")
    for scorer in SCORERS.keys() - (tags if given else set()):
        assert SCORERS[scorer](text, gold) == 0, scorer


@pytest.mark.parametrize("prompt", [r"Is it \boxed{7}?", r"Answer like this: \boxed{7}.", "7"])
def test_row_32_an_echo_of_the_prompt_scores_0(prompt):
    for text in (prompt, prompt * 2, f"You ask: {prompt}"):
        assert scored(accuracy)(text, "7", prompt) == 0
    assert scored(accuracy)(prompt + r" \boxed{7}", "7", prompt) == 1
