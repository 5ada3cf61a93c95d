"""The page of a comparison: the verdict follows the intervals, every number has its n."""

import copy
import json
import math
import re

import pytest
from page_cases import HOSTILE, Tables, check_inert

from gspo_jax.view.comparison import (
    accuracy_curve,
    band,
    by_seed,
    clipped_by_update,
    comparison_page,
    result,
    verdict,
)
from gspo_jax.view.page import NONE, html

METRIC = "eval/avg@8"


def evaluation(value):
    return {
        "eval/n": 64,
        METRIC: value,
        f"{METRIC}_low": value - 0.04,
        f"{METRIC}_high": value + 0.03,
    }


FINAL = {"gspo": (0.80, 0.84), "grpo": (0.75, 0.77), "ppo": (0.60, 0.66), HOSTILE: (0.76, 0.75)}
PAIRED = {  # made up, but for the means
    "gspo": {"difference": 0.06, "low": 0.02, "high": 0.10, "p": 0.0004, "n": 2},
    "grpo": {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "n": 2},
    "ppo": {"difference": -0.13, "low": -0.2, "high": -0.05, "p": 0.021, "n": 2},
    HOSTILE: {"difference": -0.005, "low": -0.03, "high": 0.02, "p": 0.7, "n": 2},
}


def found_dict():
    variants = {}
    for label, values in FINAL.items():
        name = label if label.isalpha() else "other"
        runs = [
            {
                "seed": seed,
                "dir": f"{name}-seed{seed}",
                "tokens": 1000 + 2 * seed,
                "updates": 12,
                "before": evaluation(0.4),
                "after": evaluation(value),
                "seconds": 65.0,
            }
            for seed, value in enumerate(values)
        ]
        variants[label] = {"settings": [f"algo.loss.name={label}"], "runs": runs}
    return {
        "title": "Losses compared",
        "command": "gspo-jax compare x.yaml",
        "against": "grpo",
        "metric": METRIC,
        "seeds": [0, 1],
        "problems": 64,
        "environment": {"machine": HOSTILE, "jax": "0.10.2", "commit": "608e4aa2"},
        "seconds": 3700.0,
        "variants": variants,
        "summary": {
            label: {
                "mean": sum(v) / 2, "low": sum(v) / 2 - 0.1, "high": sum(v) / 2 + 0.2, "n": 2,
                "gain": sum(v) / 2 - 0.4, "gain_low": 0.01, "gain_high": 0.5,
            }
            for label, v in FINAL.items()
        },
        "paired": PAIRED,
        "notes": ["one note", HOSTILE],
    }  # fmt: skip


FOUND = found_dict()


def write_runs(home):
    for label, variant in FOUND["variants"].items():
        for run in variant["runs"]:
            if run["dir"] == "ppo-seed1":
                continue  # lost
            rows = [{"step": 0, **evaluation(0.4)}]
            for k in range(1, 13):
                shift = 0.01 * run["seed"]
                rows.append(
                    {
                        "step": k,
                        "reward": 0.4 + 0.02 * k + shift,
                        "clip_frac": 0.1 if label == "gspo" else 0.001,
                        "clip_frac_by_update": [0.0, 0.1 + shift, 0.3],
                        "entropy": 0.5 - 0.01 * k,
                        "grad_norm": 1.0,
                        "completions/mean_length": 20.0 + k,
                        "num_tokens": k * run["tokens"] // 12,
                    }
                )
            rows[-1] |= run["after"]
            (home / run["dir"]).mkdir()
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (home / run["dir"] / "metrics.jsonl").write_text(text + '{"step": 13, "re')


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("comparison")
    write_runs(home)
    assert comparison_page(FOUND, home) == home / "index.html"
    return home


@pytest.fixture(scope="module")
def page(home):
    return (home / "index.html").read_text()


@pytest.mark.long
def test_pages_and_figures_lie_beside_each_other(home):
    names = {path.name for path in home.iterdir() if path.is_file()}
    assert names == {
        "index.html",
        "comparison.md",
        *(f"{stem}.{ending}" for stem in ("curves", "differences") for ending in ("svg", "png")),
    }


def test_both_pages_are_inert(home, page):
    check_inert(page)
    text = (home / "comparison.md").read_text()
    assert sorted(re.findall(r"(?<!\\)\]\(([^)]*)\)", text)) == ["curves.svg", "differences.svg"]


def answer(found):
    return verdict(found)[0].text


def test_the_answer_follows_from_the_paired_intervals():
    assert answer(FOUND) == (
        "Better than grpo: gspo (+6.0 [+2.0, +10.0] points). "
        f"No difference from grpo shown: {HOSTILE} (-0.5 [-3.0, +2.0] points). "
        "Worse than grpo: ppo (-13.0 [-20.0, -5.0] points)."
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.1, "Better than grpo: gspo"),
        (-0.1, -0.01, "Worse than grpo: gspo"),
        (-0.01, 0.01, "No difference from grpo shown: gspo"),
        (0.0, 0.1, "No difference from grpo shown: gspo"),
        (None, None, "No paired difference could be computed"),
        (math.nan, math.nan, "No paired difference could be computed"),
    ],
)
def test_only_an_interval_beyond_zero_is_a_verdict(low, high, said):
    paired = {"gspo": {"difference": 0.0, "low": low, "high": high, "p": None, "n": 1}}
    assert answer({**FOUND, "paired": paired}).startswith(said)


def test_the_table_has_n_intervals_and_the_numbers_of_the_dictionary(page):
    table = next(t for t in Tables(page).tables if t[0][:2] == ["loss", "seeds"])
    assert table[0] == [
        "loss",
        "seeds",
        "avg@8 accuracy, n = 64",
        "gain, points",
        "minus grpo, points",
        "p",
        "tokens per run",
    ]
    rows = {cells[0]: cells[1:] for cells in table[1:]}
    assert rows["gspo"] == [
        "2",
        "82.0 % [72.0, 102.0]",
        "+42.0 [+1.0, +50.0]",
        "+6.0 [+2.0, +10.0]",
        "<0.001",
        "1,001",
    ]
    assert rows["grpo"][3] == "(itself)" and rows["ppo"][4] == "0.021"
    assert len(rows) == 4


def test_every_run_stands_there_with_its_own_n_and_interval(page):
    table = next(t for t in Tables(page).tables if t[0][:2] == ["loss", "directory"])
    assert len(table) == 9
    assert table[1] == [
        "gspo",
        "gspo-seed0",
        "0",
        "64",
        "40.0 % [36.0, 43.0]",
        "80.0 % [76.0, 83.0]",
        "1,000",
        "12",
        "1:05",
    ]


def test_the_circumstances_are_told(page):
    text = check_inert(page).text
    for part in ("gspo-jax compare x.yaml", "608e4aa2", "one note", "1:01:40"):
        assert part in text
    assert "ppo, seed 1: without curves (" in text


def test_the_curves_are_a_panel_per_metric_and_every_loss_is_in_each(page):
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 7  # six curves, one of differences
    assert sum(">gspo</text>" in svg and ">ppo</text>" in svg for svg in svgs) == 7


def run_of(tokens, values, metric="reward"):
    pairs = zip(tokens, values, strict=True)
    return [{"step": k, metric: v, "num_tokens": t} for k, (t, v) in enumerate(pairs, 1)]


def test_a_band_reaches_over_the_runs_at_the_same_tokens():
    # One run's reward is tokens / 100, the other's that plus 2; they are logged at other tokens.
    one = run_of([100, 200, 300, 400], [1, 2, 3, 4])
    two = run_of([150, 350, 450], [3.5, 5.5, 6.5])
    curve = band([one, two], "reward")
    assert (curve.x[0], curve.x[-1]) == (150, 400)  # where both are
    middle = min(range(len(curve.x)), key=lambda k: abs(curve.x[k] - 275))
    x = curve.x[middle] / 100
    assert curve.low[middle] == pytest.approx(x) and curve.high[middle] == pytest.approx(x + 2)
    assert curve.y[middle] == pytest.approx(x + 1)
    assert band([one, []], "reward").low == []  # one run alone has no band
    assert band([], "reward").x == []


def test_evaluations_of_all_seeds_are_points_with_students_interval():
    runs = [
        run_of([100, 200], [0.4, y], METRIC) for y in (0.5, 0.6, 0.7)
    ]  # sd 0.1: 0.6 ± 4.303 * 0.1 / √3 = ± 0.248
    curve = accuracy_curve(runs, METRIC)
    assert list(curve.x) == [100, 200] and curve.marked
    assert curve.y == pytest.approx([0.4, 0.6])
    assert (curve.low[1], curve.high[1]) == pytest.approx((0.3516, 0.8484), abs=1e-3)
    # Two seeds: 0.9 ± 12.7 * 0.05; an accuracy is at most 1.
    two = accuracy_curve([run_of([1], [0.85], METRIC), run_of([1], [0.95], METRIC)], METRIC)
    assert two.high == [1.0] and two.low[0] == pytest.approx(0.9 - 0.635, abs=1e-3)


def test_the_clipped_share_is_told_update_by_update():
    runs = [
        [{"clip_frac_by_update": [0, 0.1]}, {"clip_frac_by_update": [0, 0.3]}, {"step": 1}],
        [{"clip_frac_by_update": [0, 0.4]}, {"clip_frac_by_update": [None, 0.9]}],
    ]
    first, second = clipped_by_update(runs)
    assert first.value == 0
    # 0.2 and 0.4: 0.3 ± 12.70620 * 0.1414214 / √2
    assert second == pytest.approx((0.3, 0.3 - 1.270620, 0.3 + 1.270620))


def test_differences_are_between_the_same_seeds():
    found = copy.deepcopy(FOUND)
    found["variants"]["gspo"]["runs"].reverse()
    assert by_seed(found, "gspo") == pytest.approx([0.07, 0.05])
    found["variants"]["gspo"]["runs"].pop()  # seed 0
    assert by_seed(found, "gspo") == pytest.approx([0.07])


def test_one_seed_has_no_interval_and_says_so():
    summary = {"gspo": {"mean": 0.8, "low": None, "high": None, "n": 1, "gain": 0.4}}
    table = Tables(html("t", result({**FOUND, "summary": summary, "paired": {}}))).tables[0]
    assert table[1][2:5] == [
        "80.0 % [no interval: 1 seed]",
        "+40.0 [no interval: 1 seed]",
        NONE,
    ]


def test_a_comparison_without_any_run_directory_has_a_page(tmp_path):
    comparison_page({**FOUND, "paired": {}, "environment": None}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.md", "index.html"]
    assert "No paired difference could be computed" in (tmp_path / "index.html").read_text()
