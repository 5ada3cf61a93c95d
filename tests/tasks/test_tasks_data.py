"""User data: every usual schema is understood, and every bad row is pointed at."""

import json

import pytest

from gspo_jax.errors import DataError
from gspo_jax.tasks import SPLITS, load_task
from gspo_jax.tasks.data import user_data
from gspo_jax.tasks.sources import MAX_LINE


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        """Rows as objects, or lines as they are; returns the path."""
        lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
        raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in raw))
        return tmp_path / name

    return write


def every(task):
    return [task.problem(s, i) for s in SPLITS for i in range(task.size[s])]


def only(path, **options):
    task = user_data(path, **options)
    assert task.size == {"train": 1, "val": 0, "test": 0}
    return task.problem("train", 0)


CHAT = [{"role": "user", "content": "How many?"}]


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"prompt": "Q", "solution": "5"}, "Q", "5"),  # TRL
        ({"prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": "5"}}, CHAT, "5"),
        ({"messages": CHAT, "ground_truth": 5}, CHAT, "5"),
        ({"question": "Q", "answer": "2+3=<<2+3=5>>5\n#### 1,005"}, "Q", "1005"),  # GSM8K
        ({"question": "Q", "answer": "#### first 3\n#### -5"}, "Q", "-5"),
        ({"problem": "Q", "solution": r"So $x=\boxed{\frac{1}{2}}$."}, "Q", r"\frac{1}{2}"),
        ({"problem": "Q", "solution": "long", "answer": "5", "level": 2}, "Q", "5"),  # MATH-500
        ({"Problem": "Q", "Answer": 33}, "Q", "33"),  # AIME, Pascal case
        ({"puzzle": "Q", "answer": "red"}, "Q", "red"),
        ({"prompt": "Q"}, "Q", None),  # for a reward function that needs no gold answer
        ({"prompt": "Q\n", "answer": " 5 "}, "Q\n", "5"),  # a prompt is left as it is
        ({"prompt": "Q", "answer": 1e22}, "Q", "10000000000000000000000"),
        ({"prompt": "Q", "answer": -2.5}, "Q", "-2.5"),
    ],
)
def test_the_usual_columns_are_understood(write, row, prompt, answer):
    problem = only(write(row))
    assert (problem.prompt, problem.answer) == (prompt, answer)


def test_columns_keep_everything_for_reward_functions(write):
    row = {"question": "Q", "answer": "#### 5", "level": 3, "extra_info": {"index": 7}}
    assert only(write(row)).columns == {
        "answer": "#### 5",
        "level": 3,
        "extra_info": {"index": 7},
    }


def test_fields_override_the_usual_names_and_reach_into_objects(write):
    row = {"prompt": "no", "text": "yes", "meta": {"gold": "6"}, "answer": "5", "how": "so"}
    path = write(row)
    problem = only(path, fields={"prompt": "text", "answer": "meta.gold", "completion": "how"})
    assert (problem.prompt, problem.answer) == ("yes", "6")
    assert problem.columns["completion"] == "so"
    assert only(path, fields={"answer": ""}).answer is None


def test_a_final_assistant_turn_is_the_completion(write):
    messages = [*CHAT, {"role": "assistant", "content": "Five."}]
    problem = only(write({"messages": messages}))
    assert problem.prompt == CHAT
    assert problem.columns["completion"] == "Five."


def test_byte_order_mark_crlf_blank_lines_and_line_separators_are_harmless(write):
    rows = [
        b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r',
        "\r",
        '{"prompt": "b\u2028c", "answer": 2}\r',
    ]
    problems = every(user_data(write(*rows)))
    assert [(p.id, p.prompt) for p in problems] == [
        ("data.jsonl:1", "a"),
        ("data.jsonl:3", "b\u2028c"),
    ]


def test_a_json_array_and_jsonl_named_json_are_both_read(write):
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    array = every(user_data(write(json.dumps(rows, indent=1), name="array.json")))
    lines = every(user_data(write(*rows, name="lines.json")))
    assert [p.prompt for p in array] == [p.prompt for p in lines] == ["a", "b"]


GOOD = {"prompt": "a", "answer": "1"}

BAD = {
    "invalid JSON": ('{"prompt": "x",}', r":2: not valid JSON: .* \(column 16\)\.$"),
    "cut off": ('{"prompt": "x"', r":2: not valid JSON: "),
    "deep": ('{"a":' * 100_000, r":2: not valid JSON: "),
    "not an object": ('["x"]', r":2: got a list, wanted an object"),
    "NaN": ('{"prompt": "x", "answer": NaN}', r":2: not valid JSON: NaN"),
    "raw NUL": (b'{"prompt": "x\x00"}', r":2: not valid JSON: "),
    "not UTF-8": (b'{"prompt": "\xff"}', r":2: not UTF-8 text \(byte 13 of the row\)"),
    "huge line": ('{"prompt": "' + "x" * MAX_LINE + '"}', r":2: the row is longer than"),
    "missing prompt": ({"answer": "1"}, r":2:prompt: missing; the row has \['answer'\]"),
    "missing answer": ({"prompt": "x"}, r":2:answer: missing"),
    "empty prompt": ({"prompt": " \n", "answer": "1"}, r":2:prompt: got an empty text"),
    "number prompt": ({"prompt": 5, "answer": "1"}, r":2:prompt: got a number, wanted a text or"),
    "null prompt": ({"prompt": None, "answer": "1"}, r":2:prompt: got null"),
    "empty chat": ({"prompt": [], "answer": "1"}, r":2:prompt: got an empty list"),
    "chat of texts": ({"prompt": ["x"], "answer": "1"}, r":2:prompt\[0\]: got a text"),
    "no content": (
        {"prompt": [{"role": "user"}], "answer": "1"},
        r":2:prompt\[0\]\.content: got null, wanted a text",
    ),
    "answer only": (
        {"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"},
        r":2:prompt: got only an answer",
    ),
    "NUL": ({"prompt": "x\x00", "answer": "1"}, r":2:prompt: got a text with a NUL"),
    "surrogate": ({"prompt": "\ud800", "answer": "1"}, r":2:prompt: got half a surrogate"),
    "null answer": ({"prompt": "x", "answer": None}, r":2:answer: got null, wanted"),
    "bool answer": ({"prompt": "x", "answer": True}, r":2:answer: got true, wanted"),
    "object answer": ({"prompt": "x", "answer": {}}, r":2:answer: got an object, wanted"),
    "infinite": ('{"prompt": "x", "answer": 1e999}', r":2:answer: got inf"),
    "blank answer": ({"prompt": "x", "answer": "####  "}, r":2:answer: got an empty text"),
}


@pytest.mark.parametrize("row, message", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_file_line_and_field(write, row, message):
    with pytest.raises(DataError, match=r"data\.jsonl" + message) as caught:
        user_data(write(GOOD, row))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row, message", BAD.values(), ids=BAD)
def test_bad_rows_are_skipped_only_if_asked_and_are_counted(write, row, message):
    task = user_data(write(GOOD, row, GOOD), max_bad_rows=1)
    assert task.size["train"] == 2
    assert any("left out 1 bad rows, first" in warning for warning in task.warnings)
    with pytest.raises(DataError, match="after 1 bad rows that were allowed"):
        user_data(write(GOOD, row, row), max_bad_rows=1)


def test_bad_rows_of_a_json_array_are_named_by_index(write):
    path = write(json.dumps([GOOD, {"prompt": "", "answer": "1"}]), name="rows.json")
    with pytest.raises(DataError, match=r"rows\.json\[1\]:prompt: got an empty text"):
        user_data(path)
    with pytest.raises(DataError, match=r"rows\.json\[0\]: got a number, wanted an object"):
        user_data(write("[1]", name="rows.json"))


def test_duplicate_ids_are_refused_within_a_split(write):
    twice = [{"id": 7, "prompt": "a"}, {"id": 7, "prompt": "b"}]
    with pytest.raises(DataError, match=r":2:id: '7' is taken by .*data\.jsonl:1"):
        user_data(write(*twice))
    apart = [{**row, "split": s} for row, s in zip(twice, ("train", "test"), strict=True)]
    assert [p.id for p in every(user_data(write(*apart)))] == ["7", "7"]


def test_what_cannot_be_read_at_all_is_one_line(write, tmp_path):
    for path, message in [
        (tmp_path / "absent.jsonl", "absent.jsonl: no such file"),
        (write(name="empty.jsonl"), r"empty\.jsonl: no rows"),
        (write("x", name="table.xlsx"), r"got a \.xlsx file, wanted"),
        (
            write({"text": "x"}),
            r":1:prompt: none of the columns \['text'\] .* task\.fields\.prompt",
        ),
        (write("junk", name="junk.parquet"), r"junk\.parquet: `datasets` cannot read this"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            user_data(path)
        assert "\n" not in str(caught.value)


def test_a_split_column_decides_and_is_checked(write):
    names = ["train", "training", "dev", "validation", "Test", "eval"]
    task = user_data(write(*({"prompt": n, "split": n} for n in names)))
    assert task.size == {"train": 2, "val": 2, "test": 2}
    assert [p.prompt for p in every(task)] == names
    with pytest.raises(DataError, match=r":1:split: got 'tset', wanted one of"):
        user_data(write({"prompt": "a", "split": "tset"}))


def test_without_splits_a_tenth_of_the_prompts_is_held_out_by_hash(write):
    rows = [{"prompt": f"question {i // 2}", "answer": i} for i in range(1000)]  # each twice
    task = user_data(write(*rows))
    prompts = {s: {task.problem(s, i).prompt for i in range(task.size[s])} for s in SPLITS}
    assert not prompts["train"] & prompts["test"]
    assert sum(map(len, prompts.values())) == 500
    # Four standard errors of a tenth of 500: 4 * sqrt(500 * 0.1 * 0.9) = 27.
    assert abs(len(prompts["test"]) - 50) < 27
    # More rows, in another order, move no prompt to the other side.
    more = user_data(write(*reversed(rows), *({"prompt": f"more {i}", "answer": 0} for i in "abc")))
    again = {more.problem("test", i).prompt for i in range(more.size["test"])}
    assert prompts["test"] <= again
    assert not again & prompts["train"]


@pytest.mark.parametrize("n, held_out", [(4, 0), (5, 1), (9, 1)])
def test_at_least_one_prompt_is_held_out_unless_there_are_hardly_any(write, n, held_out):
    # None of these prompts has a hash below 0.1, so that only the "at least one" rule applies.
    task = user_data(write(*({"prompt": f"p{i}", "answer": i} for i in range(n))))
    assert task.size == {"train": n - held_out, "val": 0, "test": held_out}
    assert any("are training rows" in w for w in task.warnings) == (held_out == 0)


def test_overlap_between_named_splits_is_warned_of(write):
    rows = [("a", "train"), ("b", "train"), ("b", "test"), ("c", "test")]
    task = user_data(write(*({"prompt": p, "split": s} for p, s in rows)))
    assert [w.partition(": ")[2] for w in task.warnings] == [
        "1 of 2 test prompts are training prompts too."
    ]


def test_answers_that_cannot_be_matched_are_warned_of(write):
    task = user_data(write({"prompt": "a", "solution": "word " * 200}))
    assert any("1 answers are texts of more than" in w for w in task.warnings)


def test_the_fingerprint_sees_edits_and_order(write):
    a, b = {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 1}
    edited = {"prompt": "b", "answer": 2}
    prints = {user_data(write(*rows)).fingerprint for rows in ([a, b], [b, a], [a, edited], [a])}
    assert len(prints) == 4
    assert user_data(write(a, b)).fingerprint == user_data(write(a, b, name="c.jsonl")).fingerprint


def test_the_reward_is_the_boxed_answer(write):
    task = load_task(path=write({"question": "a", "answer": "#### 1,234"}))
    answer = [task.problem("train", 0).answer] * 2
    completions = [r"\boxed{1234.0}", "1234"]
    assert task.reward(prompts=["a", "a"], completions=completions, answer=answer) == [1.0, 0.0]


def test_saved_datasets_and_parquet_files_are_read(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"question": f"q{i}", "answer": str(i)} for i in range(6)])
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0]), "other": rows}).save_to_disk(
        tmp_path / "three"
    )
    for path in ("rows.parquet", "one"):
        task = user_data(tmp_path / path)
        assert task.size == {"train": 5, "val": 0, "test": 1}
        assert sorted(p.answer for p in every(task)) == list("012345")
    task = user_data(tmp_path / "three")
    assert task.size == {"train": 6, "val": 0, "test": 1}
    assert [w.partition(": ")[2] for w in task.warnings] == [
        "the splits ['other'] are not used.",
        "1 of 1 test prompts are training prompts too.",
    ]


def test_a_directory_of_files_named_by_split_is_read_with_file_and_line(write, tmp_path):
    write({"prompt": "a", "answer": 1}, name="train.jsonl")
    write({"prompt": "b", "answer": 2}, {"prompt": "c", "answer": 3}, name="test.jsonl")
    task = user_data(tmp_path)
    assert task.size == {"train": 1, "val": 0, "test": 2}
    assert [p.id for p in every(task)] == ["train.jsonl:1", "test.jsonl:1", "test.jsonl:2"]
    write({"prompt": "b", "answer": None}, name="validation.jsonl")
    with pytest.raises(DataError, match=r"validation\.jsonl:1:answer: got null"):
        user_data(tmp_path)


def test_all_rows_can_be_given_one_split(write):
    rows = [{"prompt": f"p{i}", "answer": i, "split": "train"} for i in range(9)]
    assert user_data(write(*rows), split="test").size == {"train": 0, "val": 0, "test": 9}
    with pytest.raises(DataError, match=r"split=tset: wanted one of"):
        user_data(write(*rows), split="tset")
