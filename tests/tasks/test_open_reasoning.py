"""Where the prompt itself begins the reasoning, nothing before ``</think>`` is an answer.

The templates of R1, QwQ, Qwen3-Thinking and Qwen3.5 end the prompt with ``<think>``: a response
that is cut off while it thinks shows no mark at all, and looks like an answer.
"""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tasks.test_tasks_hacks import CASES

from gspo_jax import train
from gspo_jax.answers.verify import accuracy
from gspo_jax.batch import Completions, Problem
from gspo_jax.config.load import load_config
from gspo_jax.evaluation import evaluate
from gspo_jax.evaluation.benchmark import _annotated
from gspo_jax.prompt.chat_template import ChatTemplate
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.reward.rewards import score
from gspo_jax.tasks import load_task
from gspo_jax.tasks.zebra.score import worked
from gspo_jax.trainer import verified

ONE = {"train": 0, "val": 0, "test": 1}
TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
TURN += "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
THINKING = TURN + "{{ '<think>\\n' }}"
SWITCHED_OFF = TURN + "{{ '<think>\\n\\n</think>\\n\\n' }}"


def responses_with(right):
    """Text -> what it is worth after a prompt that ends with ``<think>``."""
    return {
        f"Maybe {right}? No wait": 0.0,  # cut off at the limit
        right: 0.0,
        f"Maybe {right}. </think> I do not know.": 0.0,
        f"hm </think> {right}": 1.0,
        f"<think> hm </think> {right}": 1.0,  # some models repeat the mark
    }


def scored(reward, problem, texts):
    return score({"f": reward}, None, [problem], texts, [[1]] * len(texts))[1].tolist()


@pytest.mark.parametrize("case", [*CASES, "zebra-synth", "zebra-synth as mc"])
def test_every_task_knows_that_the_prompt_began_the_reasoning(case):
    name, options = CASES.get(case, ("zebra-synth", {"puzzles": ["2*2"], "sizes": ONE}))
    task = load_task(name, **options, **({"mode": "mc"} if case.endswith(" as mc") else {}))
    problem = task.problem("test", 0)
    right = rf"so \boxed{{{problem.answer}}}"
    if name == "zebra-synth":
        right = worked(problem.answer) if "mc" in case else f'{{"solution": {problem.answer}}}'
    cases = responses_with(right)
    texts = list(cases)
    assert scored(task.reward, replace(problem, opened="<think>"), texts) == list(cases.values())
    assert scored(task.reward, problem, texts) == [1.0, 1.0, 0.0, 1.0, 1.0]  # as before


@pytest.mark.parametrize("reward", [accuracy, "math_verify", verified])
def test_scorers_that_are_named_among_the_rewards_know_it_too(reward):
    if reward == "math_verify":
        pytest.importorskip("math_verify")
        from gspo_jax.tasks.latex import math_verify as reward
    cases = responses_with(r"\boxed{4}")
    problem = Problem("a", "What is 2+2?", "4", {"answer": "4"}, opened="<think>")
    assert scored(reward, problem, list(cases)) == list(cases.values())


def test_a_function_of_the_users_own_sees_the_response_as_it_was_sampled():
    seen = []

    def mine(completions, **columns):
        seen.extend([*completions, sorted(columns)])
        return [0.0] * len(completions)

    plain = Problem("a", "q", "4")
    for problem in (plain, replace(plain, opened="<think>")):
        scored(mine, problem, [r"\boxed{4}"])
    assert seen[:2] == seen[2:] and seen[0] == r"\boxed{4}"


def test_an_answer_that_is_read_for_a_reasoning_gym_function_stands_after_the_reasoning():
    seen = []

    def score_answer(answer, entry):
        seen.append(answer)
        return 0.0

    texts = [r"\boxed{4}", "<answer>4</answer> no, wait", "hm</think> <answer>4</answer>"]
    scored(score_answer, Problem("a", "q", "4", opened="<think>"), texts)
    assert seen == [None, None, "4"]


def test_the_rendered_prompt_decides_and_not_the_words_of_the_question(tiny_dir):
    plain = load_tokenizer(tiny_dir)
    thinking, off, turn = (
        replace(plain, template=ChatTemplate(source)) for source in (THINKING, SWITCHED_OFF, TURN)
    )
    assert thinking.opened("What is 2+2?") == "<think>"
    assert [t.opened("Put your reasoning into <think>") for t in (off, turn)] == ["", ""]
    base = replace(plain, template=None)  # a base model, whose prompt begins the reasoning itself
    assert base.opened("User: 2+2? Assistant: <think>") == "<think>"
    assert base.opened("Use <think> tags. 2+2?") == ""


@pytest.fixture
def thinking(tiny_dir, monkeypatch):
    """A tokenizer that opens the reasoning, and a sampler that always says the same."""
    said = r"Maybe \boxed{4}? No"

    def sample(model, tokenizer, prompts, *, group_size, **options):
        B = len(prompts) * group_size
        tokens = np.ones((B, 1), np.int32)
        return Completions(tokens, tokens > 0, tokens / 1.0, tokens[:, 0] > 0), [said] * B

    for module in (train, evaluate):
        monkeypatch.setattr(module, "sample_completions", sample)
    return replace(load_tokenizer(tiny_dir), template=ChatTemplate(THINKING))


def by_box(problems, texts, ids, step=None):
    return score({"accuracy": accuracy}, None, problems, texts, ids)


def test_a_rollout_is_scored_by_what_its_prompts_opened(thinking):
    policy = SimpleNamespace(tokenizer=thinking, sampler=lambda params: None)
    loop = SimpleNamespace(config=load_config(None, ["rollout.group_size=2"]), policy=policy)
    state = SimpleNamespace(params=None)
    respond = inspect.unwrap(train.respond)  # a stand-in for a loop has no other type
    rollout = respond(loop, state, 1, [Problem("a", "2+2?", "4")], by_box)
    assert rollout.reward.tolist() == [0.0, 0.0]
    assert rollout.texts == [r"Maybe \boxed{4}? No"] * 2  # logged as sampled


def test_an_evaluation_reads_no_answer_out_of_unfinished_reasoning_and_its_record_says_why(
    thinking,
):
    problem = Problem("a", "2+2?", "4")
    options = {"max_new_tokens": 1, "key": None}
    ((record,),) = inspect.unwrap(evaluate.responses)(None, thinking, [problem], by_box, **options)
    assert (record["score"], record["answer"], record["opened"]) == (0.0, None, "<think>")
    assert record["text"] == r"Maybe \boxed{4}? No"


def test_the_cells_that_a_benchmark_counts_stand_after_the_reasoning():
    problem = load_task("zebra-synth", puzzles=["2*2"], sizes=ONE).problem("test", 0)
    assert isinstance(problem.columns.get("solution"), dict)
    row = {"text": f'{{"solution": {problem.answer}}}'}
    assert _annotated(problem, row)["right"] == 4
    assert _annotated(problem, row | {"opened": "<think>"})["right"] == 0
