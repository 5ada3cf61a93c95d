"""math-verify behind our own rules: what it may decide, and what it cannot be talked into."""

import importlib.util
import sys
import time

import numpy as np
import pytest
from faults.bombs import BOMBS, CODE, HACKS

from gspo_jax.answers.verify import accuracy
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.reward import remote
from gspo_jax.reward.remote import load_remote
from gspo_jax.reward.rewards import load_rewards, score
from gspo_jax.tasks import load_task, math_verify
from gspo_jax.tasks.math_verify import decided, math_verify_apart, reward_of

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="pip install 'gspo_jax[math]'"
)
SPEC = "gspo_jax.tasks.latex:math_verify"


@pytest.fixture(scope="module")
def judge():
    """One process for all tests of this file."""
    return math_verify_apart()


def scores(reward, cases, prompt="What is it?"):
    """[(text, gold)] -> scores, as a run calls a reward function."""
    problems = [Problem(str(i), prompt, gold) for i, (_, gold) in enumerate(cases)]
    texts = [text for text, _ in cases]
    return score({"f": reward}, None, problems, texts, [[1]] * len(texts))[1].tolist()


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\frac{3\pi}{2}", r"1.5\pi"),
    (r"(3, \frac{1}{2})", "(3,0.5)"),
    (r"\{3, 1, 2\}", r"\{1,2,3\}"),
    ("2, 1", "1, 2"),
    (r"[2, \infty)", r"\left[2,\infty\right)"),
    (r"(-\infty, 1) \cup (2, 3]", r"(-\infty,1)\cup(2,3]"),
    ("x^2 + 2x + 1", "(x+1)^2"),
    ("2+3i", "3i+2"),
    (r"y = 2x + 1", "y=1+2x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    (r"\frac{\sqrt2}2", r"\frac1{\sqrt2}"),
]
DIFFERENT = [
    (r"\sqrt{12}", r"3\sqrt{2}"),
    (r"(\frac{1}{2}, 3)", "(3,0.5)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("(2, 3)", "[2,3]"),
    (r"(-\infty, 1) \cup (2, 3)", r"(-\infty,1)\cup(2,3]"),
    ("x^2 + 2x + 2", "(x+1)^2"),
    ("-6", r"x^2-6\sqrt{2}"),
    (r"\sqrt{2}, \sqrt{3}", r"\sqrt{2}"),
    ("nan", r"\sqrt{2}"),
    (r"\infty", r"\sqrt{2}"),
    (r"\frac{1}{0}", r"\sqrt{2}"),
    ("?", r"\sqrt{2}"),
    (r"\sqrt{2", r"\sqrt{2}"),
]


@needs_math_verify
def test_the_same_mathematics_in_other_words_scores_1_and_other_mathematics_0(judge):
    cases = [(rf"so \boxed{{{answer}}}", gold) for answer, gold in EQUAL + DIFFERENT]
    found = scores(judge, cases)
    wrong = [
        c for c, s, e in zip(cases, found, [1] * len(EQUAL) + [0] * 99, strict=False) if s != e
    ]
    assert wrong == []


@needs_math_verify
def test_what_is_no_answer_scores_0_here_too(judge):
    cases = list(HACKS.values())
    assert scores(judge, cases) == [0.0] * len(cases)
    gold = r"2\sqrt{3}"
    texts = [
        "",
        gold,
        rf"\boxed{{{gold}",
        rf"<think>\boxed{{{gold}}}",
        rf"\boxed{{5}} \boxed{{{gold}}}",
    ]
    texts += [rf"\boxed{{{gold}}} \boxed{{\sqrt{{12}}}}", rf"\boxed{{{gold}, 5, 7}}"]
    assert scores(judge, [(text, gold) for text in texts]) == [0.0] * len(texts)


@pytest.mark.parametrize(
    ("prompt", "answer", "gold"),
    [
        ("What is 3+4?", "3+4", "7"),
        ("What is 3+4?", "4+3", "7"),
        ("What is 3+4?", "7=3+4", "7"),
        (r"Compute $\sqrt{36+64}$.", r"\sqrt{36+64}", "10"),
        (r"Compute $\sqrt{36+64}$.", r"\sqrt{64+36}", "10"),
        (r"Simplify $\sqrt{12}$.", r"\sqrt{12}", r"2\sqrt{3}"),
        (
            r"Expand $(x + 1)^2$.",
            r"\left(x+1\right)^2".replace(r"\left", "").replace(r"\right", ""),
            "x^2+2x+1",
        ),
    ],
)
def test_a_question_boxed_again_is_no_answer(prompt, answer, gold):
    """Although math-verify would find it equal: the last word is the exact comparison's."""
    verdict, is_final = decided(prompt, rf"\boxed{{{answer}}}", gold)
    assert (verdict.score, is_final) == (0.0, True)


def test_only_formulas_are_left_to_math_verify():
    assert decided("q", r"\boxed{0.5}", r"\frac12") == decided("q", r"\boxed{0.5}", "1/2")
    for text, gold in [(r"\boxed{7}", "7"), (r"\boxed{8}", "7"), ("7", "7"), (r"\boxed{\pi}", "7")]:
        assert decided("q", text, gold)[1]
    assert not decided("q", r"\boxed{2\pi}", r"\pi\cdot2")[1]
    chat = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": r"\boxed{a+1}"}]
    assert not decided(*chat, "1+a")[1]
    assert decided("q", r"\boxed{x}", r"\text{(C)}")[1]  # a letter is compared as a letter


@needs_math_verify
def test_a_bomb_scores_0_by_the_deadline_and_what_follows_is_scored(monkeypatch):
    """Row 29, by the clock of a limit that is shorter here."""
    monkeypatch.setattr(remote, "GRACE", 0.1)
    monkeypatch.setattr(remote, "CHECK_SECONDS", 2.0)
    gold = r"2\sqrt{3}"
    right, bomb = r"\boxed{\sqrt{12}}", r"\boxed{9^{9^{9^9}}}"
    logged = {}
    columns = {"prompts": ["q"] * 3, "completions": [right, bomb, right], "answer": [gold] * 3}
    found = math_verify_apart()(**columns, log_metric=logged.__setitem__)
    assert found == [1.0, 0.0, 1.0]
    assert logged == {"math_verify/lost": 1}


@needs_math_verify
@pytest.mark.long
def test_no_bomb_and_no_code_gets_through(judge, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    gold = r"2\sqrt{3}"
    boxes = list(BOMBS.values()) + [code.replace("CANARY", str(canary)) for code in CODE]
    began = time.monotonic()
    cases = [(rf"\boxed{{{box}}}", gold) for box in boxes]
    assert scores(judge, cases) == [0.0] * len(cases)
    assert not canary.exists() and time.monotonic() - began < 5 * len(cases)
    assert scores(judge, [(r"\boxed{\sqrt{12}}", gold)]) == [1.0]


@needs_math_verify
def test_it_can_be_named_among_the_rewards_of_a_run():
    functions = load_remote([SPEC], seconds=20.0)
    problems = [Problem("a", "q", r"2\sqrt{3}"), Problem("b", "q", None)]
    found, _, _ = score(functions, None, problems, [r"\boxed{\sqrt{12}}", "x"], [[1], [1]])
    np.testing.assert_array_equal(found["math_verify"], [1.0, np.nan])


@needs_math_verify
def test_a_task_of_formulas_is_scored_by_it(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Solve.", "answer": "2\\\\sqrt{3}"}\n')
    task = load_task(path=str(rows), checker="math-verify")
    problem = task.problem("train", 0)
    assert scores(task.reward, [(r"\boxed{\sqrt{12}}", problem.answer)]) == [1.0]
    assert scores(load_task(path=str(rows)).reward, [(r"\boxed{\sqrt{12}}", problem.answer)]) == [0]


def test_other_checkers_are_refused_and_a_missing_package_is_said_in_one_line(monkeypatch):
    assert reward_of("exact") is accuracy
    with pytest.raises(ConfigError, match=r"checker=sympy: wanted one of \['exact', 'math-ver"):
        load_task("gsm8k", path="x", checker="sympy")
    monkeypatch.setattr(math_verify, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gspo_jax\[math\]'\.$") as caught:
        load_task("gsm8k", path="x", checker="math-verify")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "gspo_jax.tasks.latex", raising=False)
    with pytest.raises(DataError, match=r"importing it raised ConfigError: checker=math-verify n"):
        load_rewards([SPEC])
