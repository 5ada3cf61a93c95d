"""Records to metrics and tables: by hand, from files as from memory."""

import json

import numpy as np
import pytest

from gspo_jax.errors import DataError
from gspo_jax.numbers.statistics import difference, estimate, wilson
from gspo_jax.numbers.summary import differences, markdown, rows, rows_by, summarise, summarise_by


def record(index, sample, score, answer="?", tokens=4, truncated=False, **rest):
    return {
        "id": f"p{index}",
        "index": index,
        "sample": sample,
        "score": score,
        "answer": answer,
        "tokens": tokens,
        "truncated": truncated,
        "text": "",
        **rest,
    }


# Three problems; greedy and four samples each. The answers of the last are all different.
RECORDS = [
    *[record(0, s, x, a) for s, x, a in zip(range(5), (1, 1, 0, 0, 1.0), "aacda", strict=True)],
    *[record(1, s, x, a) for s, x, a in zip(range(5), (0, 0, 0, 1, 1.0), "zxyww", strict=True)],
    record(2, 0, 0.0, None, truncated=True),
    *[record(2, s, None, None, tokens=10, truncated=True) for s in (1, 2)],
    *[record(2, s, 0.0, "n", tokens=6) for s in (3, 4)],
]


def test_every_metric_by_hand():
    found = summarise(RECORDS)
    values = {name: each.value for name, each in found.items()}
    assert all(each.n == 3 for each in found.values())
    assert values["greedy"] == pytest.approx(1 / 3)
    assert values["avg@4"] == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)
    # 2 right of 4: 1 - C(2, 2) / C(4, 2) = 5/6
    assert values["pass@2"] == pytest.approx((5 / 6 + 5 / 6 + 0) / 3)
    assert values["pass@4"] == pytest.approx(2 / 3)
    # votes: a c d a -> a, right; x y w w -> w, right; n -> wrong, two did not vote
    assert values["maj@4"] == pytest.approx(2 / 3)
    assert values["greedy/no answer"] == pytest.approx(1 / 3)
    assert values["avg@4/no answer"] == pytest.approx(2 / 12)
    assert values["avg@4/not scored"] == pytest.approx(2 / 12)
    assert values["avg@4/truncated"] == pytest.approx(2 / 12)
    assert values["avg@4/tokens"] == pytest.approx((4 * 8 + 10 * 2 + 6 * 2) / 12)
    assert found["greedy"][1:3] == wilson(1, 3)
    assert found["avg@4"][1:3] == estimate(np.array([0.5, 0.5, 0.0]))[1:3]


def test_what_a_file_holds_gives_the_same_in_any_order():
    lines = [json.dumps(r) for r in reversed(RECORDS)]
    assert summarise(map(json.loads, lines)) == summarise(RECORDS)


def test_without_samples_or_with_one_there_is_no_vote():
    greedy = summarise([r for r in RECORDS if r["sample"] == 0])
    assert not any("@" in name for name in greedy)
    one = summarise([r for r in RECORDS if r["sample"] < 2])
    assert {n for n in one if "@" in n and "/" not in n} == {"avg@1"}


@pytest.mark.parametrize("kept", [RECORDS[:-1], []])
def test_problems_with_missing_responses_are_refused(kept):
    with pytest.raises(DataError, match="sets of samples; wanted one"):
        summarise(kept)


def grid(index, size, right, cells):
    score = float(right == cells)
    return record(index, 0, score, right=right, cells=cells, by={"size": size})


GRIDS = [grid(0, "2*2", 4, 4), grid(1, "2*2", 1, 4), grid(2, "3*4", 9, 12), grid(3, "10*2", 0, 20)]


def test_cells_are_averaged_over_all_cells_and_groups_over_their_own():
    found = summarise(GRIDS)["greedy/cells"]
    assert found.value == pytest.approx(14 / 40) and found.n == 4
    by = summarise_by(GRIDS)["size"]
    assert by["2*2"]["greedy/cells"].value == pytest.approx(5 / 8)
    assert by["2*2"]["greedy"][:1] + by["2*2"]["greedy"][3:] == (0.5, 2)
    assert by["3*4"]["greedy"].n == 1


def test_groups_come_in_an_order_that_people_expect():
    for given, wanted in (
        (["hard", "easy", "medium"], ["easy", "medium", "hard"]),
        (["xl", "large", "medium", "small"], ["small", "medium", "large", "xl"]),
        ([10, 9, 2], ["2", "9", "10"]),
        (["b", "a"], ["a", "b"]),
    ):
        made = [record(i, 0, 1.0, by={"level": level}) for i, level in enumerate(given)]
        assert list(summarise_by(made)["level"]) == wanted
    assert summarise_by([record(0, 0, 1.0, by={"level": 1})]) == {}  # one group is all of them
    everyone = [record(i, 0, 1.0, by={"level": i}) for i in range(61)]
    assert summarise_by(everyone) == {}  # nor is every problem a group


def test_models_are_compared_on_the_problems_that_both_were_asked():
    """The other model was not asked p0; its problems have other places."""
    other = [r | {"index": 7 - r["index"], "score": 1.0} for r in RECORDS if r["id"] != "p0"]
    found = differences(RECORDS, other)
    assert found["avg@4"] == difference(np.array([0.5, 0.0]), np.array([1.0, 1.0]))
    assert found["avg@4"].n == 2 and found["avg@4"].value == pytest.approx(0.75)
    assert differences(RECORDS, [r | {"id": "elsewhere"} for r in RECORDS]) == {}


# ------------------------------------------------------------------------------------- tables


def told(metrics):
    return {name: each._asdict() for name, each in metrics.items()}


@pytest.fixture(scope="module")
def results():
    better = [r | {"score": 1.0} for r in GRIDS]
    scores = {
        name: {
            "notes": [] if name == "base" else ["2 problems left out", "odd"],
            "metrics": told(summarise(made)),
            "by": {c: {v: told(m) for v, m in g.items()} for c, g in summarise_by(made).items()},
        }
        for name, made in (("base", GRIDS), ("new|er", better))
    }
    return {
        "command": "gspo-jax eval base new",
        "models": [{"label": n[:3], "name": n, "fingerprint": "0123"} for n in ("base", "new|er")],
        "settings": {"samples": 0},
        "environment": {"commit": None, "versions": {"jax": "1"}, "devices": ["1 x cpu"]},
        "definitions": {"n": "problems"},
        "benchmarks": {
            "zebra": {
                "task": "zebra-synth",
                "split": "test",
                "fingerprint": "abc",
                "problems": 4,
            }
        },
        "missing": {"math": "no network."},
        "scores": {"zebra": scores},
        "differences": {"zebra": {"new|er": told(differences(GRIDS, better))}},
    }


def test_every_score_in_the_table_has_n_and_an_interval(results):
    head, *body = rows(results)
    assert head == ["benchmark", "metric", "n", "bas", "new", "new - bas"]
    assert [row[1] for row in body[:2]] == ["greedy", "cells, greedy"]
    # 1 of 4: Wilson's interval is 4.6 to 69.9; 4 of 4: 51.0 to 100
    assert body[0] == [
        "zebra",
        "greedy",
        "4",
        "25.0% [4.6, 69.9]",
        "100% [51.0, 100]",
        body[0][-1],
    ]
    assert body[0][-1].startswith("+75.0 [")
    assert all(row[2] == "4" and "[" in cell for row in body for cell in row[3:])
    assert not any("not scored" in row[1] for row in body)  # everything was


def test_the_page_names_what_is_missing_and_what_was_left_out(results):
    page = markdown(results)
    assert "- math is missing: no network.\n- zebra, new|er: 2 problems left out\n" in page
    assert "| zebra | 4 problems of zebra-synth, test (abc) |" in page
    assert (
        "| 2\\*2 | 2 | 50.0% [" in page
        and "new: cells, greedy" in page
        and "new\\|er (0123)" in page
    )
    assert list(rows_by(results)) == ["zebra by size"]
    for block in page.split("\n\n"):
        if block.startswith("|"):
            bars = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(bars) == 1, block
