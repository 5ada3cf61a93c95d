"""Rows 42 to 44: data files as people have them."""

import json

import pytest
from tasks.test_tasks_data import BAD, GOOD

from faults.tools import metrics, one_line, tiny_run, write_rows
from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.tasks import load_task
from gspo_jax.train import train


@pytest.fixture
def dry_run(tiny_dir, tmp_path, capsys):
    """What `gspo-jax train --dry-run` on a file of these raw lines says: code, output, errors."""

    def run(lines, *overrides):
        raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (tmp_path / "data.jsonl").write_bytes(b"".join(line + b"\n" for line in raw))
        settings = tiny_run(tiny_dir, tmp_path, f"task.path={tmp_path / 'data.jsonl'}")
        code = main(["train", *settings, *overrides, "--dry-run"])
        return code, *capsys.readouterr()

    return run


def raw(row):
    return row if isinstance(row, str | bytes) else json.dumps(row)


@pytest.mark.faults
@pytest.mark.parametrize("name", BAD)
def test_row_42_a_bad_row_is_refused_by_its_place_or_skipped_and_counted(dry_run, name):
    """The corpus of tests/tasks/test_tasks_data.py, at the command line."""
    lines = [raw(GOOD), raw(BAD[name][0]), raw(GOOD)]
    code, out, err = dry_run(lines)
    assert code == 3 and out == "" and "data.jsonl:2" in one_line(err)
    code, out, _ = dry_run(lines, "task.options={max_bad_rows: 1}")
    assert code == 0 and "left out 1 bad rows, first" in " ".join(out.split())
    code, out, err = dry_run([*lines, lines[1]], "task.options={max_bad_rows: 1}")
    assert code == 3 and "after 1 bad rows that were allowed" in one_line(err)


def test_row_42_duplicate_ids_are_refused_and_marks_and_line_ends_are_harmless(dry_run):
    twice = [json.dumps({"id": 7, "prompt": prompt}) for prompt in "ab"]
    code, _, err = dry_run(twice)
    assert code == 3 and "data.jsonl:2:id: '7' is taken by" in one_line(err)
    lines = [b"\xef\xbb\xbf" + raw(GOOD).encode() + b"\r", b"\r", raw(GOOD) + "\r"]
    code, out, _ = dry_run(lines)
    assert code == 0 and "2 train" in out


def long_and_short(tmp_path):
    prompts = ["a", "b", "c", "d", "far too long " * 20]
    rows = [{"prompt": p, "answer": "a", "split": "train"} for p in prompts]
    return write_rows(tmp_path / "long.jsonl", rows)


@pytest.mark.faults
def test_row_43_prompts_that_are_too_long_are_left_out_and_counted(tiny_dir, tmp_path, capsys):
    path = long_and_short(tmp_path)
    options = [f"task.path={path}", "run.steps=1", "task.max_prompt_length=24"]
    result = train(load_config(None, tiny_run(tiny_dir, tmp_path, *options)))
    assert result.state == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert "1 problems have prompts of more than 24 tokens and are left out." in said


def test_row_43_or_refused_by_name_where_that_is_asked_for(tiny_dir, tmp_path, capsys):
    path = long_and_short(tmp_path)
    options = ["task.long_prompts=refuse", "task.max_prompt_length=24"]
    settings = tiny_run(tiny_dir, tmp_path, f"task.path={path}", *options)
    for extra in ([], ["--dry-run"]):
        assert main(["train", *settings, *extra]) == 3
        line = one_line(capsys.readouterr().err)
        assert "train problem 4 ('long.jsonl:5') has a prompt of" in line
        assert "task.max_prompt_length=24; 1 of 5 are like that" in line


def test_row_43_where_no_prompt_fits_the_run_is_refused(tiny_dir, tmp_path, capsys):
    settings = tiny_run(tiny_dir, tmp_path, "task.max_prompt_length=3")
    assert main(["train", *settings]) == 3
    assert "has a prompt of at most 3 tokens; raise" in one_line(capsys.readouterr().err)


@pytest.mark.faults
@pytest.mark.parametrize("prompt", ["<|im_end|>", "<|im_end|>" * 4, "<|im_start|><|im_end|>\n"])
def test_row_43_prompts_of_special_tokens_alone_train_without_a_nan(tiny_dir, tmp_path, prompt):
    rows = [{"prompt": prompt, "answer": str(n), "split": "train"} for n in range(4)]
    path = write_rows(tmp_path / "special.jsonl", rows)
    settings = tiny_run(tiny_dir, tmp_path, f"task.path={path}", "run.steps=1")
    result = train(load_config(None, settings))
    (row,) = metrics(result.run_dir)
    assert row["skipped_updates"] == 0 and None not in row.values()


@pytest.mark.faults
def test_row_44_prompts_on_both_sides_are_warned_of(tiny_dir, tmp_path, capsys):
    """By their hash, when the task is loaded: in a dry run, and again in the run."""
    places = [("a", "train"), ("b", "train"), ("b", "test"), ("c", "test"), ("a", "val")]
    rows = [{"prompt": p, "answer": p, "split": s} for p, s in places]
    path = write_rows(tmp_path / "both.jsonl", rows)
    options = [f"task.path={path}", "run.steps=1", "eval.samples=0"]
    settings = tiny_run(tiny_dir, tmp_path, *options)
    for extra in (["--dry-run"], []):
        assert main(["train", *settings, *extra]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "1 of 2 test prompts are training prompts too." in said
        assert "1 of 1 val prompts are training prompts too." in said


def test_row_44_problems_made_with_one_seed_are_held_out_from_training_with_any_other():
    """A problem's split is a function of its hash alone."""

    def keys(task, split):
        return {task.problem(split, i).prompt for i in range(task.size[split])}

    sizes = {"train": 3000, "val": 500, "test": 1000}
    tasks = [load_task("arithmetic", seed=seed, sizes=sizes) for seed in range(3)]
    trained = set().union(*(keys(task, "train") for task in tasks))
    held_out = set().union(*(keys(task, split) for task in tasks for split in ("val", "test")))
    assert len(trained) > 6000 and len(held_out) == 1500 and not trained & held_out
