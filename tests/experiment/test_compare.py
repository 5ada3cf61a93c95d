"""Variants compared over seeds: the intervals, the pairs, and what is said of runs that failed."""

import numpy as np
import pytest

from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.experiment.compare import found, of_losses
from gspo_jax.experiment.sweep import best, ranked
from gspo_jax.experiment.trials import Experiment, Outcome, Trial

METRIC = "eval/avg@8"
ENV = {"python": "3.11.7", "versions": {"jax": "0.10.2"}, "commit": "abc", "cpus": 2}


def ran(variant, seed, value, *, chosen=None, trouble=""):
    trial = Trial(
        variant, chosen or {}, seed, f"{variant}-seed{seed}", ["run.steps=3", f"run.seed={seed}"]
    )
    after = {} if trouble else {METRIC: value, f"{METRIC}_low": value - 0.1, "eval/n": 64}
    return Outcome(trial, trouble, {METRIC: 0.25}, after, 1000, 12, 60.0, ENV)


def of(outcomes, against="grpo"):
    return Experiment("a title", None, [o.trial for o in outcomes], METRIC, against, ["a note"])


def test_variants_are_paired_by_seed():
    runs = [ran("grpo", s, v) for s, v in ((1, 0.50), (2, 0.60), (3, 0.70))]
    runs += [ran("gspo", s, v) for s, v in ((3, 0.80), (1, 0.62), (2, 0.66))]
    result = found(of(runs), runs, ["gspo-jax", "compare", "a file.yaml"])
    pair = result["paired"]["gspo"]
    np.testing.assert_allclose(pair["difference"], np.mean([0.12, 0.06, 0.10]))
    assert (pair["n"], pair["p"]) == (3, 0.25)
    np.testing.assert_allclose(result["summary"]["grpo"]["gain"], 0.35)
    assert result["seeds"] == [1, 2, 3] and result["problems"] == 64
    assert result["command"] == "gspo-jax compare 'a file.yaml'"
    assert result["variants"]["gspo"]["settings"] == ["run.steps=3"]
    assert result["environment"]["versions"] == "python 3.11.7, jax 0.10.2"
    assert result["environment"]["commit"] == "abc"
    assert list(result["paired"]) == ["gspo"] and result["notes"] == ["a note"]


def test_a_run_that_failed_is_left_out_of_its_pair_and_named():
    runs = [ran("grpo", s, v) for s, v in ((1, 0.5), (2, 0.6), (3, 0.7))]
    runs += [ran("gspo", 1, 0.6), ran("gspo", 2, 0, trouble="out of memory"), ran("gspo", 3, 0.9)]
    result = found(of(runs), runs)
    assert result["paired"]["gspo"]["n"] == result["summary"]["gspo"]["n"] == 2
    np.testing.assert_allclose(result["paired"]["gspo"]["difference"], 0.15)
    assert "gspo-seed2 did not finish: out of memory" in result["notes"]
    with pytest.raises(DataError, match="gspo: no run of it has eval/avg@8: out of memory"):
        found(of(runs), [run for run in runs if run.trial.variant == "grpo" or run.trouble])


def test_each_loss_gets_what_it_is_meant_for_and_not_anothers_clip_range():
    made = of_losses(
        None, ["gspo", "grpo", "dr_grpo", "ppo"], seeds=2, overrides=["algo.loss.clip_low=3e-3"]
    )
    assert len(made.trials) == 8 and made.against == "grpo"
    by_name = {trial.variant: load_config(None, trial.overrides).algo for trial in made.trials}
    assert by_name["gspo"].loss == {"name": "gspo", "clip_low": 3e-3}
    assert by_name["grpo"].loss == {"name": "grpo"}
    assert by_name["dr_grpo"].advantage["name"] == "group_centred"
    assert (by_name["ppo"].advantage["name"], by_name["ppo"].critic.kind) == ("gae", "separate")
    with pytest.raises(ConfigError, match=r"--losses gsppo: no such loss\. Did you mean gspo"):
        of_losses(None, ["gsppo"], seeds=1)


def test_a_sweep_ranks_means_and_puts_what_failed_last():
    runs = [ran("a", 1, 0.5, chosen={"x": 1}), ran("a", 2, 0.7, chosen={"x": 1})]
    runs += [ran("a", 1, 0.65, chosen={"x": 2}), ran("a", 2, 0.65, chosen={"x": 2})]
    runs += [ran("b", 1, 0, chosen={"x": 1}, trouble="it broke"), ran("b", 1, 0.1, chosen={"x": 3})]
    rows = ranked(of(runs), runs)
    assert [(row["variant"], row["chosen"]["x"]) for row in rows] == [
        ("a", 2),
        ("a", 1),
        ("b", 3),
        ("b", 1),
    ]
    assert [row["n"] for row in rows] == [2, 2, 1, 0]
    assert (rows[2]["low"], rows[2]["problems"]) == (0.1 - 0.1, 64)  # the run's own interval
    assert rows[3]["trouble"] == "it broke"
    assert best(rows) == {"a": {"x": 2}, "b": {"x": 3}}
