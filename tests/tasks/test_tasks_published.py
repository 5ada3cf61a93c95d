"""Published sets are read as they are, and a machine without network is told what to put where."""

import json
from pathlib import Path
from random import Random

import pytest

from gspo_jax.answers.verify import check
from gspo_jax.config.load import load_config, model_dir
from gspo_jax.errors import DataError
from gspo_jax.policy import load_problems
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.tasks import SPLITS, TASKS, load_task
from gspo_jax.tasks.published import BOXED, PUBLISHED, READERS
from gspo_jax.tasks.zebra.puzzles import grid_row, make_puzzle, mc_rows, zebra_synth

GSM8K = (
    Path(__file__).parents[1] / "fixtures" / "gsm8k"
)  # rows of the set itself, see its README.md


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def every(task):
    return [task.problem(s, i) for s in SPLITS for i in range(task.size[s])]


def score(task, problem, text):
    columns = {key: [value] for key, value in problem.columns.items()} | {
        "answer": [problem.answer]
    }
    return task.reward(prompts=[problem.prompt], completions=[text], **columns)[0]


def test_gsm8k_is_read_with_its_own_splits():
    task = load_task("gsm8k", path=str(GSM8K))
    assert task.size == {"train": 28, "val": 0, "test": 12}
    first = task.problem("train", 0)
    assert first.prompt.startswith("Natalia sold clips to 48 of her friends in April,")
    assert first.prompt.endswith(f"in April and May?\n\n{BOXED}") and first.answer == "72"
    assert [p.answer for p in every(task)[:5]] == ["72", "10", "5", "42", "624"]


def test_gsm8ks_own_solutions_earn_the_reward_and_its_questions_do_not():
    """Golds with commas and a negative one among them; the calculator's marks are taken out."""
    task = load_task("gsm8k", path=str(GSM8K))
    golds = [p.answer for p in every(task)]
    raw = [p.columns["answer"].rpartition("####")[2].strip() for p in every(task)]
    assert sum("," in text for text in raw) == 6 and sum("-" in text for text in raw) >= 1
    assert not any("," in gold for gold in golds)
    for p in every(task):
        assert "<<" in p.columns["answer"] and "<<" not in p.columns["completion"]
        assert score(task, p, p.columns["completion"]) == 1
        for text in (p.prompt, p.columns["answer"], p.answer, ""):
            assert score(task, p, text) == 0


def test_a_single_file_is_the_split_that_it_is_called():
    assert load_task("gsm8k", path=str(GSM8K / "test.jsonl")).size == {
        "train": 0,
        "val": 0,
        "test": 12,
    }
    assert load_task("gsm8k", path=str(GSM8K / "train.jsonl")).size["train"] == 28


def test_the_instruction_is_an_option():
    task = load_task("gsm8k", path=str(GSM8K), instruction="Box it.")
    assert task.problem("test", 0).prompt.endswith("market?\n\nBox it.")
    assert task.fingerprint != load_task("gsm8k", path=str(GSM8K)).fingerprint
    assert load_task("gsm8k", path=str(GSM8K), instruction="").problem("test", 0).prompt[-1] == "?"


ROWS = {  # made up, in the sets' own columns
    "math500": [
        {
            "problem": "What is $1/2 + 1/4$?",
            "solution": r"It is $\boxed{\frac{3}{4}}$.",
            "answer": r"\frac{3}{4}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        },
    ],
    "aime24": [
        {"id": 60, "problem": "How many?", "solution": "So 33.", "answer": "033", "year": "2024"},
        {"ID": "2024-I-1", "Problem": "How many?", "Solution": "So 33.", "Answer": 33},
    ],
    "aime25": [
        {"problem_idx": 1, "problem": "How many?", "answer": 70},
        {"question": "How many?", "answer": "70"},
    ],
}


@pytest.mark.parametrize("name, row", [(n, row) for n, rows in ROWS.items() for row in rows])
def test_columns_in_either_case_are_found_and_all_rows_are_for_evaluation(write, name, row):
    task = load_task(name, path=write(row, name="train.jsonl"))  # AIME's rows are called "train"
    assert task.size == {"train": 0, "val": 0, "test": 1}
    p = task.problem("test", 0)
    assert p.answer == {"math500": r"\frac{3}{4}", "aime24": "33", "aime25": "70"}[name]
    assert p.prompt == f"{row.get('problem') or row.get('Problem') or row['question']}\n\n{BOXED}"
    assert score(task, p, rf"\boxed{{{p.answer}}}") == 1
    assert check(r"\boxed{0.75}", p.answer).score == (name == "math500")


def test_aime_answers_are_whole_numbers_from_0_to_999(write):
    for answer in ("1000", "-1", "1/2", "x"):
        with pytest.raises(DataError, match="wanted 0 to 999"):
            load_task("aime25", path=write({"problem": "How many?", "answer": answer}))


@pytest.mark.parametrize("answer", [r"336^\circ", r"$336^{\circ}$", "336.0", "336 degrees", "336"])
def test_an_aime_answer_may_be_written_with_its_degrees(write, answer):
    task = load_task("aime25", path=write({"problem": "Which angle?", "answer": answer}))
    p = task.problem("test", 0)
    assert p.answer == "336"
    assert score(task, p, r"\boxed{336}") == score(task, p, r"\boxed{336^\circ}") == 1
    assert score(task, p, r"\boxed{335^\circ}") == 0


PUZZLE = make_puzzle(Random(5), 3, 3)


def test_zebralogic_rows_are_asked_and_scored_like_our_own(write):
    task = load_task("zebralogic", path=write(grid_row(PUZZLE)))
    assert task.size == {"train": 0, "val": 0, "test": 1}
    p = task.problem("test", 0)
    assert p.prompt.startswith("# Example\n") and PUZZLE.columns["Name"][0] in p.prompt
    assert p.columns["difficulty"] == "small" and p.columns["size"] == "3*3"
    assert score(task, p, p.columns["completion"]) == 1
    assert score(task, p, p.columns["completion"].replace(PUZZLE.columns["Name"][0], "Zoe")) == 0
    plain = load_task("zebralogic", path=write(grid_row(PUZZLE)), example=False)
    assert plain.problem("test", 0).prompt.startswith("There are 3 houses")


def test_multiple_choice_answers_are_the_choices_text(write):
    rows = list(mc_rows(PUZZLE))
    task = load_task("zebralogic-mc", path=write(*rows))
    assert task.size["test"] == 9
    for i, row in enumerate(rows):
        p = task.problem("test", i)
        assert row["choices"]["ABC".index(p.answer)] == row["answer"] and p.id == row["id"]
        assert score(task, p, json.dumps({"answer": row["answer"]})) == 1


def test_masked_answers_are_refused_with_where_to_find_others(write):
    row = grid_row(PUZZLE)
    row["solution"]["rows"] = [["1", "___", "___", "___"]] * 3
    with pytest.raises(DataError, match=r"test\.jsonl:1:solution: .* masked .*WildEval/ZebraLogic"):
        load_task("zebralogic", path=write(row))
    row = next(mc_rows(PUZZLE)) | {"answer": "___"}
    with pytest.raises(DataError, match=r":1:answer: .* masked"):
        load_task("zebralogic-mc", path=write(row))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"solution": None}, r":1:solution: wanted a header and rows of one length"),
        (
            {"solution": {"header": ["House", "Name"], "rows": [["1"]]}},
            r":1:solution: wanted a head",
        ),
        ({"solution": {"header": ["House"], "rows": []}}, r":1:solution: the answers .* masked"),
    ],
)
def test_bad_puzzles_are_named_by_file_line_and_field(write, change, message):
    with pytest.raises(DataError, match=message):
        load_task("zebralogic", path=write(grid_row(PUZZLE) | change))
    task = load_task(
        "zebralogic", path=write(grid_row(PUZZLE) | change, grid_row(PUZZLE)), max_bad_rows=1
    )
    assert task.size["test"] == 1 and "left out 1 bad rows" in task.warnings[0]


def test_a_path_is_enough_for_what_can_only_be_a_published_set(write, monkeypatch):
    assert load_task(path=write(grid_row(PUZZLE))).name == "zebralogic"
    assert load_task(path=write(next(mc_rows(PUZZLE)))).name == "zebralogic-mc"
    asked = []

    def offline(repo, config=None):
        asked.append((repo, config))
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for path in ("openai/gsm8k", "openai/gsm8k:main", "HuggingFaceH4/MATH-500", "math-ai/aime25"):
        with pytest.raises(DataError):
            load_task(path=path)
    assert asked == [
        ("openai/gsm8k", "main"),
        ("openai/gsm8k", "main"),
        ("HuggingFaceH4/MATH-500", None),
        ("math-ai/aime25", None),
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_network_one_line_says_what_to_put_where(name, monkeypatch):
    def offline(*args):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    wanted = rf"no route to host.*put .*test\.jsonl with the columns .*task\.name={name} task\.opt"
    with pytest.raises(DataError, match=wanted) as caught:
        load_task(name)
    assert "\n" not in str(caught.value)


def test_what_the_message_says_to_do_works(tmp_path):
    """The row's own columns, in the file and under the name that the message gives."""
    for name, spec in PUBLISHED.items():
        if name.startswith("zebra"):
            row = next(mc_rows(PUZZLE)) if name.endswith("mc") else grid_row(PUZZLE)
        else:
            row = {"question": "Q", "problem": "Q", "answer": "#### 5"}
        columns = [column.strip() for column in spec.columns.split(",")]
        directory = tmp_path / name
        directory.mkdir()
        for split in ("test",) if spec.evaluation else ("train", "test"):
            line = json.dumps({column: row[column] for column in columns})
            (directory / f"{split}.jsonl").write_text(line + "\n")
        task = load_task(name, path=str(directory))
        assert task.size["test"] == 1 and every(task)[-1].prompt
        config = load_config(
            None,
            [f"task.name={name}", f"task.options.path={directory}", "task.max_prompt_length=9999"],
        )
        tokenizer = load_tokenizer(model_dir(config))
        assert load_problems(config, tokenizer, train=False).task.size == task.size


def test_our_own_puzzles_are_never_called_zebralogic():
    task = zebra_synth(puzzles=["2*2"], sizes={"train": 1, "val": 0, "test": 0})
    p = task.problem("train", 0)
    assert task.name == "zebra-synth" and p.id.startswith("zebra-synth-")
    assert "zebralogic" not in (p.prompt + p.id).lower()
    assert set(READERS) <= set(TASKS)


def test_a_benchmark_can_be_evaluated_and_not_trained_on(write):
    path = write({"problem": "1+1?", "answer": "2"})
    config = load_config(None, ["task.name=aime25", f"task.options.path={path}"])
    tokenizer = load_tokenizer(model_dir(config))
    assert load_problems(config, tokenizer, train=False).indices["test"] == [0]
    with pytest.raises(DataError, match="aime25 has no training problems, only"):
        load_problems(config, tokenizer)
