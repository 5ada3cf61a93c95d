"""Models on benchmarks: what is asked, what is kept, how it goes on, what stands in the table."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from gspo_jax.batch import Problem
from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError, DataError, StorageError
from gspo_jax.evaluation import benchmark
from gspo_jax.files.provenance import environment
from gspo_jax.files.whole import lock, unlock
from gspo_jax.tasks import load_task

ROOT = Path(__file__).parents[2]
FEW = ["eval.problems=5", "eval.samples=2", "eval.batch=2", "rollout.max_completion_length=6"]


ABOUT = cache(environment)  # asks git, every time


@pytest.fixture
def ask(tiny_dir, tmp_path, monkeypatch):
    """Runs benchmarks on the tiny model; returns the results and what was said."""
    monkeypatch.setattr(
        benchmark, "environment", lambda devices=(): {**ABOUT(), "devices": devices}
    )

    def run(names="custom", *overrides, models=None, out="out"):
        config = load_config(
            None,
            ["task.max_prompt_length=100000", "mesh.data=1", *FEW, *overrides],
        )
        said = []
        asked = benchmark.named(names) if names else None
        models = [str(tiny_dir)] if models is None else models
        results = benchmark.run(config, models, asked, tmp_path / out, said.append)
        assert results == json.loads((tmp_path / out / "results.json").read_text())
        return results, said

    return run


@pytest.fixture
def canned(monkeypatch):
    """In place of the sampler: what the model "answers", and which calls it took."""
    calls = []

    def responses(model, tokenizer, problems, scorer, *, samples, batch, start, answer_in, **_):
        calls.append((samples, start))
        numbers = range(1, samples + 1) if samples else [0]
        for begin in range(start, len(problems), batch):
            part = problems[begin : begin + batch]
            # The greedy response is right, and so is every sample with an even number.
            texts = [
                p.columns["completion"] if n % 2 == 0 else "no idea" for p in part for n in numbers
            ]
            scores = scorer(part, texts, [[]] * len(texts))[1].tolist()
            places = [(begin + i, n) for i in range(len(part)) for n in numbers]
            yield [
                {
                    "id": problems[i].id,
                    "index": i,
                    "sample": n,
                    "score": score,
                    "tokens": 3,
                    "truncated": False,
                    "answer": answer_in(problems[i], text),
                    "text": text,
                }
                for (i, n), score, text in zip(places, scores, texts, strict=True)
            ]

    monkeypatch.setattr(benchmark, "responses", responses)
    return calls


def value(results, name, metric, model=0):
    model = results["models"][model]["name"]
    return results["scores"][name][model]["metrics"][metric]


# -------------------------------------------------------------------------------- what is asked


def test_names_are_short_ones_tasks_and_files():
    assert benchmark.named("zebra, math,arithmetic,mine=a.jsonl,gsm8k=DIR,math=b.jsonl") == {
        "zebra": {"name": "zebra-synth", "options": {"puzzles": ["all"]}},
        "math": {"name": "math500", "options": {"path": "b.jsonl"}},
        "arithmetic": {"name": "arithmetic"},
        "mine": {"name": None, "path": "a.jsonl"},
        "gsm8k": {"name": "gsm8k", "options": {"path": "DIR"}},
    }


@pytest.mark.parametrize("names", ["zebar", "custom,mixture", "", ","])
def test_a_name_that_is_none_is_refused(names):
    with pytest.raises(ConfigError, match="--benchmarks"):
        benchmark.named(names)


def test_only_the_split_that_is_asked_is_made_up_and_as_large_as_asked():
    config = benchmark.for_benchmark(load_config(None, ["eval.problems=7"]), {"name": "knights"})
    assert config.task.options == {"sizes": {"train": 0, "val": 0, "test": 7}}
    everything = load_config(None, [f"eval.problems={benchmark.ALL}", "eval.split=val"])
    config = benchmark.for_benchmark(everything, benchmark.SHORT["zebra"])
    assert config.task.options == {"puzzles": ["all"], "sizes": {"train": 0, "test": 0}}
    assert benchmark.for_benchmark(everything, {"name": "gsm8k"}).task.options == {}


def test_all_rows_of_a_file_are_asked_unless_it_has_splits(tmp_path):
    rows = [{"prompt": f"Say {i}", "answer": str(i)} for i in range(4)]
    sizes = {}
    for name, more in (("plain", {}), ("marked", {"Split": "train"})):
        path = tmp_path / f"{name}.jsonl"
        marked = [row | more for row in rows[:3]] + [rows[3] | (more and {"Split": "test"})]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked))
        own = benchmark.for_benchmark(load_config(), {"name": None, "path": str(path)}).task
        sizes[name] = load_task(own.name, own.path, **own.options).size["test"]
    assert sizes == {"plain": 4, "marked": 1}


# ------------------------------------------------------------------------- kept, and gone on with


@pytest.mark.long
def test_an_interrupted_run_goes_on_to_the_same_bytes(ask, tmp_path, monkeypatch):
    """Stopped in the samples after one batch of three, with a torn line behind it."""
    whole, _ = ask(out="whole")
    (file,) = (tmp_path / "whole" / "custom").iterdir()
    assert whole["scores"]["custom"].popitem()[1]["file"] == f"custom/{file.name}"
    real, batches = benchmark.responses, []

    def stops(*args, samples, **options):
        for rows in real(*args, samples=samples, **options):
            batches.append(samples)
            if batches == [0, 0, 0, 2, 2]:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(benchmark, "responses", stops)
    with pytest.raises(KeyboardInterrupt):
        ask(out="parts")
    part = tmp_path / "parts" / "custom" / file.name
    assert file.read_bytes().startswith(part.read_bytes())
    assert part.read_bytes().count(b"\n") == 5 + 4
    with part.open("ab") as stream:
        stream.write(file.read_bytes().splitlines(True)[9] + b'{"id": "tor')  # half of a batch
    batches.clear()
    again, _ = ask(out="parts")
    assert batches == [2, 2] and part.read_bytes() == file.read_bytes()
    assert again["scores"]["custom"].popitem()[1]["file"] == f"custom/{file.name}"


def test_what_is_finished_is_not_computed_again_and_needs_no_weights(ask, canned, monkeypatch):
    first, _ = ask()
    assert canned == [(0, 0), (2, 0)]
    monkeypatch.setattr(benchmark, "load_policy", lambda config: pytest.fail("weights were read"))
    second, _ = ask()
    assert canned == [(0, 0), (2, 0)] and first["scores"] == second["scores"]


def test_what_differs_in_any_setting_that_matters_is_another_file(tiny_dir):
    def identity(*overrides, problems=5):
        config = load_config(None, [f"model.path={tiny_dir}", "task.name=knights", *overrides])
        config = benchmark.for_benchmark(config, {"name": config.task.name})
        task = load_task("knights", sizes={"train": 0, "val": 0, "test": 2})
        return json.dumps(
            benchmark._identity(config, benchmark._model(config, "demo"), task, problems)
        )

    ways = [
        "eval.temperature=0.7",
        "eval.samples=3",
        "eval.split=val",
        "eval.batch=3",
        "run.seed=1",
        "rollout.max_completion_length=5",
        "task.max_prompt_length=99",
        "model.dtype=bfloat16",
        "mesh.fsdp=2",
    ]
    found = {identity(), identity(problems=4), *map(identity, ways)}
    assert len(found) == 2 + len(ways)
    assert identity("run.name=x", "optim.learning_rate=1", "eval.every=9") == identity()


def test_another_model_is_another_file_and_the_same_files_elsewhere_are_not(
    ask, canned, tiny_dir, tmp_path
):
    def files():
        return len(list((tmp_path / "out" / "custom").iterdir()))

    ask()
    other = Path(shutil.copytree(tiny_dir, tmp_path / "other"))
    ask(models=[str(other)])
    assert files() == 1 and len(canned) == 2
    (other / "generation_config.json").write_text('{"eos_token_id": 295, "top_k": 3}')
    ask(models=[str(other)])
    assert files() == 2 and len(canned) == 4


def test_a_directory_in_use_is_refused(ask, canned, tmp_path):
    held = lock(tmp_path / "out")
    with pytest.raises(StorageError, match=r"in use by another run .*; choose another --out\.$"):
        ask()
    unlock(held)


# ------------------------------------------------------------------------------- what is said


def test_models_have_short_names_that_differ():
    assert benchmark._labels(["demo", "runs/a-seed0/export", "Qwen/Qwen3-0.6B"]) == [
        "demo",
        "a-seed0",
        "Qwen3-0.6B",
    ]
    assert benchmark._labels(["x/a", "y/a", "z/b/"]) == ["x/a", "y/a", "b"]


def test_results_hold_all_that_the_numbers_depend_on(ask, canned, tmp_path, tiny_dir):
    short = tmp_path / "short"
    shutil.copytree(tiny_dir, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 256}
    (short / "config.json").write_text(json.dumps(config))
    results, said = ask("custom,knights", models=[str(short)])
    assert results["missing"] == {}
    # The riddles are longer than what this model was made for, and that stands beside the score.
    (note,) = said
    assert note.startswith("knights, ") and note.endswith(" tokens; the model was made for 256")
    notes = {name: each.copy().popitem()[1]["notes"] for name, each in results["scores"].items()}
    assert notes["custom"] == [] and note.endswith(f": {notes['knights'][0]}")
    assert value(results, "custom", "greedy") == pytest.approx(
        {"value": 1.0, "low": 0.5655, "high": 1.0, "n": 5}, abs=1e-4
    )
    assert value(results, "knights", "avg@2")["value"] == 0.5
    assert value(results, "knights", "maj@2")["value"] == 1.0  # who has no answer has no vote
    assert value(results, "knights", "avg@2/no answer")["value"] == 0.5
    assert set(results["scores"]["custom"].popitem()[1]["by"]) == {"type", "difficulty"}
    assert results["benchmarks"]["knights"]["problems"] == 5
    assert results["settings"]["max_new_tokens"] == 6
    assert {"commit", "versions", "devices"} <= set(results["environment"])
    assert "host" not in results["environment"]
    page = (tmp_path / "out" / "results.md").read_text()
    assert "100% [56.6, 100]" in page


def test_saved_responses_can_be_read_on_their_own(ask, canned, tmp_path):
    ask()
    (file,) = (tmp_path / "out" / "custom").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    task = load_task("reasoning", sizes={"train": 0, "val": 0, "test": 5})
    assert len(rows) == 5 * (1 + 2)
    for row in rows:
        problem = task.problem("test", row["index"])
        assert (row["id"], row["gold"]) == (problem.id, problem.answer)
        assert row["by"] == {k: problem.columns[k] for k in ("type", "difficulty")}
        assert row["score"] == (row["sample"] % 2 == 0)
        assert row["text"] == (problem.columns["completion"] if row["score"] else "no idea")


def test_the_other_models_stand_beside_the_first(ask, canned, tiny_dir, tmp_path):
    other = Path(shutil.copytree(tiny_dir, tmp_path / "other"))
    (other / "generation_config.json").write_text('{"eos_token_id": 295, "top_k": 3}')
    results, _ = ask(models=[str(tiny_dir), str(other)])
    pairs = results["differences"]["custom"][str(other)]
    assert pairs["greedy"]["value"] == 0 and pairs["greedy"]["n"] == 5
    assert pairs["greedy"]["low"] < 0 < pairs["greedy"]["high"]


def test_a_grid_is_scored_cell_by_cell():
    sizes = {"train": 0, "val": 0, "test": 1}
    problem = load_task("zebra-synth", puzzles=["3*4"], sizes=sizes).problem("test", 0)
    given = json.loads(problem.answer)
    given["House 2"] = {}
    row = {"text": json.dumps({"solution": given}), "score": 0.0}
    found = benchmark._annotated(problem, row)
    assert (found["right"], found["cells"]) == (8, 12)
    assert found["by"] == {"difficulty": "medium", "size": "3*4"}
    nothing = benchmark._annotated(problem, {"text": "no idea"})
    assert (nothing["right"], nothing["cells"]) == (0, 12)
    assert "cells" not in benchmark._annotated(Problem("1", "?", "2", {"level": 3}), row)


def test_a_benchmark_that_cannot_be_had_is_named_and_the_others_run(ask, canned, monkeypatch):
    def offline(config, *args, **options):
        if config.task.name == "math500":
            raise DataError("HuggingFaceH4/MATH-500: no network.")
        return real(config, *args, **options)

    real = benchmark.load_problems
    monkeypatch.setattr(benchmark, "load_problems", offline)
    results, said = ask("math,custom,mine=nowhere.jsonl")
    assert results["missing"]["math"] == "HuggingFaceH4/MATH-500: no network."
    assert "nowhere.jsonl: no such file" in results["missing"]["mine"]
    assert len(said) == 2 and said[0].startswith("math is left out: ")
    assert list(results["scores"]) == ["custom"]


def test_a_split_without_problems_is_missing_too(ask, canned, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Say a", "answer": "a", "split": "train"}\n')
    results, _ = ask(f"mine={path}")
    assert "rows has no problems in its split test" in results["missing"]["mine"]
    assert results["scores"] == {}


def test_without_a_terminal_progress_is_ten_lines(ask, canned, capsys):
    ask("custom", "eval.problems=40")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("custom, ") and " of 120 responses, eta 0:0" in lines[0]


# --------------------------------------------------------------------------------- the command


def test_the_command_measures_and_fails_where_something_is_missing(
    canned, tiny_dir, tmp_path, capsys
):
    out = tmp_path / "out"
    line = ["eval", str(tiny_dir), "--benchmarks", "knights,mine=nowhere.jsonl", "--out", str(out)]
    assert main([*line, *FEW, "mesh.data=1"]) == 3
    told = capsys.readouterr()
    assert "gspo-jax: mine is left out: nowhere.jsonl" in told.err
    assert "knights" in told.out and str(out / "results.md") in told.out
    assert (out / "results.json").is_file()


def test_a_models_own_task_is_measured_where_no_benchmark_is_named(ask, canned):
    results, _ = ask(None, "task.name=knights", "task.options.sizes={train: 0, val: 0, test: 3}")
    assert results["benchmarks"]["knights"]["problems"] == 3
