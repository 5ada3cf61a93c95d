"""Other people's files: the splits they name, the columns they use, and what is refused by name."""

import gzip
import json
from dataclasses import replace

import pytest

from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.plan.report import plan, report
from gspo_jax.policy import load_problems
from gspo_jax.prompt.chat_template import ChatTemplate
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.reward.rewards import score
from gspo_jax.tasks import load_task, user_data

QA = {"question": "Q", "answer": "1"}
CHAT = [{"role": "user", "content": "Q"}]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def numbered(n):
    return [{"question": f"Q{i}", "answer": str(i)} for i in range(n)]


def only(path, **options):
    task = user_data(path, split="train", **options)
    assert task.size["train"] == 1
    return task.problem("train", 0)


# ---------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("task", ["gsm8k", None])
@pytest.mark.parametrize(
    "name, split",
    [
        ("gsm8k_test.jsonl", "test"),
        ("test-00000-of-00001.jsonl", "test"),
        ("test_socratic.jsonl", "test"),
        ("validation/rows.jsonl", "val"),
        ("aime.dev.jsonl", "val"),
    ],
)
def test_the_split_in_a_name_is_never_split_again(write, task, name, split):
    path = str(write(*numbered(40), name=name))
    made = load_task(task, path=path) if task else user_data(path)
    assert made.size == {"train": 0, "val": 0, "test": 0, split: 40}
    assert user_data(path, split="train").size["train"] == 40  # if that is asked for


def test_a_directory_of_published_parquet_files_keeps_their_splits(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(numbered(20))
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    assert user_data(tmp_path).size == {"train": 40, "val": 0, "test": 20}
    file = tmp_path / "test-00000-of-00001.parquet"
    for made in (user_data(file), load_task("gsm8k", path=str(file))):
        assert made.size == {"train": 0, "val": 0, "test": 20}


def test_train_alone_is_told_that_some_of_it_is_held_out_and_a_published_set_keeps_it(write):
    path = str(write(*numbered(40), name="train.jsonl"))
    task = user_data(path)
    assert sum(task.size.values()) == 40 and 0 < task.size["test"] < 40
    assert any("held out" in w and "task.options.split=train" in w for w in task.warnings)
    assert load_task("gsm8k", path=path).size["train"] == 40
    assert load_task("gsm8k", path=str(write().parent)).size["train"] == 40
    unnamed = load_task("gsm8k", path=str(write(*numbered(40), name="rows.jsonl")))
    assert any("its name says no split" in w for w in unnamed.warnings)


def test_exact_names_win_and_what_is_not_read_is_told(write):
    for name in ("train", "test", "train_socratic", "test_socratic", "example_model_solutions"):
        path = write(*numbered(6), name=f"gsm8k/{name}.jsonl")
    task = user_data(path.parent)
    assert task.size == {"train": 6, "val": 0, "test": 6}
    (line,) = [w for w in task.warnings if "not read" in w]
    assert all(name in line for name in ("test_socratic", "train_socratic", "example_model"))
    for name in ("a_train", "a_test", "notes"):
        path = write(*numbered(6), name=f"alike/{name}.jsonl")
    assert user_data(path.parent).size == {"train": 6, "val": 0, "test": 6}


def test_prompts_that_repeat_inside_a_split_are_counted(write):
    rows = [{"question": q, "answer": "1", "split": s} for q, s in [*["at"] * 3, "bt", *["cx"] * 2]]
    for row in rows:
        row["split"] = {"t": "train", "x": "test"}[row["split"]]
    told = [w for w in user_data(write(*rows)).warnings if "repeat" in w]
    assert len(told) == 1 and "2 of 4 train, 1 of 2 test rows repeat" in told[0]


# --------------------------------------------------------------------- rows of other trainers

SHAREGPT = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
PARTS = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]
FORMS = {
    "ShareGPT": (SHAREGPT, {}, CHAT, None),
    "ShareGPT by name": ({"x": SHAREGPT["conversations"]}, {"prompt": "x"}, CHAT, None),
    "Alpaca": (
        ALPACA,
        {"prompt": "{instruction}\n{input}", "answer": "output"},
        "Add.\n1 and 2",
        "3",
    ),
    "OpenRLHF": ({"input": "Q", "label": "1"}, {"prompt": "input", "answer": "label"}, "Q", "1"),
    "OpenRLHF chat": ({"context_messages": CHAT}, {"prompt": "context_messages"}, CHAT, None),
    "SVAMP": (
        {"Body": "Two.", "Question": "How many?", "Answer": 2.0},
        {"prompt": "{Body} {Question}"},
        "Two. How many?",
        "2.0",
    ),
    "choices": (
        {"question": "Which?", "choices": ["A) 1", "B) 2"], "answer": "B"},
        {"prompt": "{question}\n{choices} \\boxed{}"},
        "Which?\nA) 1\nB) 2 \\boxed{}",
        "B",
    ),
    "list of one": ({"prompt": "Q", "final_answer": ["2"]}, {}, "Q", "2"),
    "list in a text": ({"prompt": "Q", "answer": '["2"]'}, {}, "Q", "2"),
    "a gold list": ({"prompt": "Q", "answer": '["2", "3"]'}, {}, "Q", '["2", "3"]'),
    "short before long": (
        {"prompt": "Q", "solution": "long", "final_answer": "2", "ground_truth": "9"},
        {},
        "Q",
        "2",
    ),
    "nested": (
        {"prompt": "Q", "reward_model": {"ground_truth": {"target": 98, "numbers": [1, 2]}}},
        {"answer": "reward_model.ground_truth.target"},
        "Q",
        "98",
    ),
    "parts": (
        {"prompt": [{"role": "user", "content": PARTS}]},
        {},
        [{"role": "user", "content": "Say it."}],
        None,
    ),
}


@pytest.mark.parametrize("row, fields, prompt, answer", FORMS.values(), ids=FORMS)
def test_rows_of_other_trainers_are_understood(write, row, fields, prompt, answer):
    problem = only(write(row), fields=fields)
    assert (problem.prompt, problem.answer) == (prompt, answer)


def test_an_id_that_only_some_rows_have_is_else_their_place(write):
    task = user_data(write(QA | {"id": "a"}, QA, QA | {"id": None}), split="train")
    ids = [task.problem("train", i).id for i in range(3)]
    assert ids == ["a", "data.jsonl:2", "data.jsonl:3"]


def test_csv_and_compressed_files_are_read_with_their_lines(write, tmp_path):
    text = 'question,answer\r\n"two\nlines, ""quoted""",1\r\nQ,2\r\n'
    for name, data in {
        "rows.csv": text.encode("utf-8-sig"),
        "rows.csv.gz": gzip.compress(text.encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        task = user_data(tmp_path / name)
        problems = [task.problem("train", i) for i in range(2)]
        assert [(p.prompt, p.answer) for p in problems] == [
            ('two\nlines, "quoted"', "1"),
            ("Q", "2"),
        ]
        assert [p.id for p in problems] == [f"{name}:2", f"{name}:4"]  # the first takes two lines
    (tmp_path / "bad.csv").write_text("question,answer\nQ\n")
    with pytest.raises(DataError, match=r"bad\.csv:2: 1 cells under a header of 2"):
        user_data(tmp_path / "bad.csv")
    whole = gzip.compress(write(*numbered(6)).read_bytes())
    (tmp_path / "test.jsonl.gz").write_bytes(whole)
    assert user_data(tmp_path / "test.jsonl.gz").size["test"] == 6
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: not a whole gzip file"):
        user_data(tmp_path / "cut.jsonl.gz")


# ------------------------------------------------------------------------- nothing is cut silently

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_turns_keep_what_their_template_reads_and_the_rest_is_refused_by_name(write, tiny_dir):
    turns = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    prompt = only(write({"messages": turns})).prompt
    assert prompt == [
        *CHAT,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m['tool_calls'] }};{% endfor %}"
    tokenizer = replace(load_tokenizer(tiny_dir), template=ChatTemplate(source, name="t"))
    assert "'name': 'add'" in tokenizer.render(prompt[:2])
    with pytest.raises(DataError, match=r"messages\[2\] has \['tool_call_id'\].*template t reads"):
        tokenizer.render(prompt)
    plain = replace(tokenizer, template=ChatTemplate("{{ messages[0].content }}", name="t"))
    with pytest.raises(DataError, match=r"messages\[1\] has \['tool_calls'\]"):
        plain.render(prompt)


def test_a_last_turn_with_more_than_a_text_is_no_completion(write):
    turn = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert "completion" not in only(write({"messages": [*CHAT, turn]})).columns


@pytest.mark.parametrize(
    "row, message",
    [
        (QA | {"images": ["a.png"]}, r"images: got a medium.*task\.fields\.images to an empty"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            r"content\[0\]: got 'image",
        ),
        ({"prompt": [{"from": "narrator", "value": "Q"}]}, r"from: got 'narrator', wanted"),
    ],
)
def test_what_is_not_text_is_refused_by_name(write, row, message):
    with pytest.raises(DataError, match=message):
        user_data(write(row))
    assert only(write(QA | {"images": ["a.png"]}), fields={"images": ""}).prompt == "Q"


def test_columns_that_look_like_a_part_of_the_question_are_told(write):
    def told(row, **options):
        return [w for w in user_data(write(row), **options).warnings if "parts of" in w]

    svamp = {"Body": "Two.", "Question": "How many?", "Answer": 2}
    (line,) = told(svamp)
    assert 'task.fields.prompt="{Body} {Question}"' in line
    assert not told(svamp, fields={"prompt": "{Body} {Question}"})
    assert not told(svamp, fields={"prompt": "Question"})
    assert not told(svamp, fields={"Body": ""})
    assert not told(QA | {"options": []})


# ----------------------------------------------------------- a default that applies to nothing

UNANSWERED = {
    "OpenRLHF": {"prompt": "Q", "label": "1"},
    "AQuA": {"question": "Q", "correct": "A"},
    "TRL chat": {"messages": [*CHAT, {"role": "assistant", "content": "A"}]},
    "TRL": {"prompt": "Q", "completion": "A"},
    "an object": {"prompt": "Q", "reward_model": {"ground_truth": {"target": 1}}},
    "several": {"prompt": "Q", "ground_truth": ["1", "2"]},
}


@pytest.mark.parametrize("row", UNANSWERED.values(), ids=UNANSWERED)
def test_data_without_an_answer_is_refused_while_the_built_in_checker_is_used(
    write, row, tiny_dir, tmp_path
):
    path = write(row)
    config = load_config(
        None, [f"model.path={tiny_dir}", f"task.path={path}", f"run.dir={tmp_path}"]
    )
    tokenizer = load_tokenizer(tiny_dir)
    ways = [lambda: plan(config), lambda: report(config, compile=False)]
    for way in [*ways, lambda: load_problems(config, tokenizer)]:
        with pytest.raises(ConfigError, match=r"task\.fields\.answer=NAME.*task\.rewards=\["):
            way()
    assert load_problems(config, tokenizer, scored=False).task.size["train"] == 1  # to learn from


def test_verls_functions_are_given_an_answer_that_is_an_object(write):
    def compute_score(solution_str, ground_truth):
        return float(ground_truth == {"target": 1})

    problem = only(write(UNANSWERED["an object"]))
    assert score({"f": compute_score}, None, [problem], ["x"], [[]])[1] == [1]


def test_prompts_that_never_mention_the_box_are_told_of_unless_something_asks_for_it(
    write, tiny_dir
):
    def told(row, *settings, template=None):
        lines = [f"model.path={tiny_dir}", f"task.path={write(row)}", *settings]
        tokenizer = load_tokenizer(tiny_dir)
        if template:
            tokenizer = replace(tokenizer, template=ChatTemplate(template))
        problems = load_problems(load_config(None, lines), tokenizer)
        return any(r"no prompt asks for \boxed{}" in w for w in problems.task.warnings)

    row = {"question": "Give the answer after ####.", "answer": "1"}
    assert told(row)
    assert not told(QA | {"question": r"Q \boxed{}"})
    assert not told(row, "task.options.instruction='Use \\boxed{}.'")
    assert not told(row, template=r"{{ messages[0].content }} Use \boxed{}.")
    assert told(row, "task.rewards=[gspo_jax.answers.verify:accuracy]")
    own = write(name="own.py")
    own.write_text("def own(completions, **_):\n    return [1.0] * len(completions)\n")
    assert not told(row, f"task.rewards=[{own}:own]")


def test_an_instruction_follows_the_question_and_moves_no_prompt_between_splits(write):
    path = write(*numbered(40))
    plain, told = user_data(path), user_data(path, instruction="Box it.")
    assert told.size == plain.size and told.fingerprint != plain.fingerprint
    for split in ("train", "test"):
        for i in range(plain.size[split]):
            assert told.problem(split, i).prompt == f"{plain.problem(split, i).prompt}\n\nBox it."
    chat = [{"role": "system", "content": "S"}, *CHAT]
    assert only(write({"messages": chat}), instruction="Box it.").prompt == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q\n\nBox it."},
    ]


def test_a_mixture_is_refused_for_the_part_that_nothing_scores(write):
    parts = {"arithmetic": 1, "mine": {"path": str(write(UNANSWERED["TRL"]))}}
    assert load_task("mixture", tasks=parts).unscored.startswith("mine: ")
