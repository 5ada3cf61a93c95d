"""What a policy tries instead of answering scores 0 in every task whose answers are boxed."""

from pathlib import Path

import pytest

from gspo_jax.reward.rewards import score
from gspo_jax.tasks import load_task
from gspo_jax.tasks.made.reasoning import MIX, TYPES

NONE = {"train": 0, "val": 0, "test": 3}
GSM8K = Path(__file__).parents[1] / "fixtures" / "gsm8k"
CASES = {
    "arithmetic": ("arithmetic", {"sizes": NONE}),
    "countdown": ("countdown", {"sizes": NONE}),
    "knights": ("knights", {"sizes": NONE}),
    "gsm8k": ("gsm8k", {"path": str(GSM8K)}),
    "mixture": (
        "mixture",
        {"tasks": {n: {"options": {"sizes": NONE}} for n in ("arithmetic", "reasoning")}},
    ),
} | {
    f"{kind}, {level}": ("reasoning", {"types": [kind], "levels": [level], "sizes": NONE})
    for kind in TYPES
    for level in MIX
}


def tries(problem):
    """Name -> what is no answer to the problem, though much of it holds the gold answer."""
    gold, prompt = problem.answer, problem.prompt
    question = prompt.split("\n")[0]
    cues = "First, we reason step by step. Therefore, because it is so, the final answer is clearly"
    return {
        "nothing": "",
        "blank": " \n\t",
        "empty box": r"\boxed{}",
        "blank box": r"\boxed{ \, }",
        "question": prompt,
        "question twice": f"{prompt}\n{prompt}",
        "question repeated": f"You ask: {prompt} I answer.",
        "question boxed": rf"\boxed{{{question}}}",
        "prompt boxed": rf"\boxed{{{prompt}}}",
        "nan": r"\boxed{nan}",
        "infinity": r"\boxed{inf}",
        "None": r"\boxed{None}",
        "cue words": f"{cues} right. \\boxed{{right}}",
        "cue words and gold": f"{cues} {gold}.",
        "gold": gold,
        "gold in bold": f"The answer is **{gold}**.",
        "gold after hashes": f"#### {gold}",
        "gold in tags": f"<answer>{gold}</answer>",
        "two boxes": rf"\boxed{{{gold}}} or \boxed{{something else}}",
        "two boxes, gold last": rf"\boxed{{something else}} \boxed{{{gold}}}",
        "a hundred boxes": " ".join(rf"\boxed{{{n}}}" for n in range(100)) + rf"\boxed{{{gold}}}",
        "options": rf"\boxed{{{gold} or something else}}",
        "options as a list": rf"\boxed{{{gold}, 1, 2, 3, red, blue, knight, knave}}",
        "the same twice in a box": rf"\boxed{{{gold}, {gold}}}",
        "digits": r"\boxed{0123456789}",
        "more digits": rf"\boxed{{1{gold}}}",
        "a sentence in the box": rf"\boxed{{I think it is {gold}}}",
        "cut off": rf"so \boxed{{{gold}",
        "in the thoughts": rf"<think>so \boxed{{{gold}}}</think> Done.",
        "thoughts that never end": rf"<think>so \boxed{{{gold}}}",
    }


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_answer_scores_0_in_every_task(case):
    name, options = CASES[case]
    task = load_task(name, **options)
    for i in range(min(task.size["test"], 3)):
        problem = task.problem("test", i)
        given = tries(problem) | {"right": rf"so \boxed{{{problem.answer}}}"}
        texts = list(given.values())
        ids = [[1]] * len(texts)
        found = score({"task": task.reward}, None, [problem], texts, ids)[1].tolist()
        paid = [name for name, value in zip(given, found, strict=True) if value]
        assert paid == ["right"], problem


@pytest.mark.parametrize("mode", ["grid", "mc"])
def test_what_is_no_grid_scores_0(mode):
    task = load_task("zebra-synth", puzzles=["2*2", "3*2"], mode=mode, sizes=NONE)
    for i in range(3):
        problem = task.problem("test", i)
        texts = list(tries(problem).values())
        texts += [
            '{"solution": "nan"}',
            '{"answer": "A, B, C"}',
            '{"solution": {}}',
            '{"answer": ""}',
        ]
        found = score({"task": task.reward}, None, [problem], texts, [[1]] * len(texts))[1]
        assert not found.any()
