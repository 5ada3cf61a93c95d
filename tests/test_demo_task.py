"""What may be done to a rollout, on the demo's model and task: selection, punishment, masking."""

import json

import pytest

from gspo_jax.config.load import load_config, packaged_config
from gspo_jax.train import train


@pytest.fixture
def run(tmp_path):
    """Two steps of a small demo; the metrics of each."""

    def run(*overrides):
        settings = [
            "rollout.prompts=4",
            "rollout.group_size=4",
            "algo.minibatches=2",
            "eval.problems=4",
            "eval.samples=0",
            "mesh.data=1",
            "task.options.sizes={train: 300, val: 8, test: 8}",
            f"run.dir={tmp_path}",
            "run.steps=2",
            *overrides,
        ]
        result = train(load_config(packaged_config("demo.yaml"), settings))
        lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["step"] > 0]

    return run


@pytest.mark.long
def test_dynamic_sampling_fills_every_batch_with_groups_that_differ(run):
    plain, resampled = run("run.name=plain"), run("run.name=dynamic", "rollout.resample=5")
    assert any(row["groups_without_spread"] > 0 for row in plain)
    assert all(row["groups_without_spread"] == 0 for row in resampled)
    # Rewards are still reported over all that was sampled.
    assert any(row["frac_reward_zero_std"] > 0 for row in resampled)
    assert resampled[-1]["num_tokens"] > plain[-1]["num_tokens"]


@pytest.mark.long
def test_soft_overlong_punishment_lowers_the_reward_by_what_it_says(run):
    """Solutions of 22 to 28 tokens against a limit of 32: a buffer of 10 begins at 22."""
    for row in run("rollout.overlong_buffer=10"):
        assert -0.6 <= row["rewards/overlong/mean"] < 0
        total = row["rewards/arithmetic/mean"] + row["rewards/overlong/mean"]
        assert row["reward"] == pytest.approx(total, abs=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("masked", [False, True])
def test_truncated_responses_teach_unless_they_are_masked(run, masked):
    """Cut at 12 tokens, every response is truncated; the reward tells them apart all the same."""
    row, *_ = run(
        "rollout.max_completion_length=12",
        "task.rewards=[reward_functions:many_nines]",
        f"algo.mask_truncated={str(masked).lower()}",
        "run.steps=1",
    )
    assert row["completions/clipped_ratio"] == 1.0
    assert row["reward_std"] > 0
    assert (row["grad_norm"] == 0) == masked
