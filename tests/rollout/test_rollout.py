"""From a rollout to training rows: ids untouched, padding on the right, masks from the sampler."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gspo_jax.batch import Completions, Problem, Rollout
from gspo_jax.numbers.tally import Average, Count
from gspo_jax.rollout.dynamic_sampling import fill_with_spread, groups_with_spread
from gspo_jax.rollout.reporting import rollout_metrics
from gspo_jax.rollout.stages import score_completions
from gspo_jax.rollout.train_rows import to_train_batch


@pytest.fixture
def rollout():
    """Two prompts of 2 and 3 tokens, two responses each: lengths 2, 3 (cut), 1, 3."""
    tokens = np.array([[11, 1, 99], [12, 13, 14], [1, 98, 97], [15, 16, 1]], np.int32)
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
    truncated = np.array([False, True, False, False])
    completions = Completions(tokens, mask, np.zeros((4, 3), np.float32), truncated)
    reward = np.array([1.0, 0.0, np.nan, 0.5], np.float32)
    problems = [Problem("a", "A"), Problem("b", "B")]
    prompts = [[5, 6], [7, 8, 9]]
    return Rollout(problems, prompts, completions, ["w", "x", "y", "z"], {"f": reward}, reward)


def test_rows_are_prompt_then_response_then_padding(rollout):
    batch = to_train_batch(rollout, np.arange(4, dtype=np.float32), pad_id=0)
    assert batch.tokens.shape == (4, 16)  # the longest row has 6 tokens; rounded up to 16
    assert batch.prompt_length.tolist() == [2, 2, 3, 3]
    # 99, 98, 97 lie after an EOS: they are not the model's, and must not be seen.
    assert batch.tokens[:, :7].tolist() == [
        [5, 6, 11, 1, 0, 0, 0],
        [5, 6, 12, 13, 14, 0, 0],
        [7, 8, 9, 1, 0, 0, 0],
        [7, 8, 9, 15, 16, 1, 0],
    ]
    assert not batch.tokens[:, 7:].any()
    np.testing.assert_array_equal(batch.mask, rollout.completions.mask)
    assert batch.adv.tolist() == [0, 1, 2, 3]


def test_an_eos_is_trained_on_even_where_padding_has_the_same_id(rollout):
    batch = to_train_batch(rollout, np.zeros(4, np.float32), pad_id=1)
    assert batch.mask.sum(1).tolist() == [2, 3, 1, 3]


def test_mask_truncated_leaves_out_exactly_the_responses_that_were_cut(rollout):
    batch = to_train_batch(rollout, np.zeros(4, np.float32), mask_truncated=True)
    assert batch.mask.sum(1).tolist() == [2, 0, 1, 3]


def test_metrics_by_hand_leave_out_what_was_not_scored(rollout):
    metrics = rollout_metrics(rollout)
    assert metrics["reward"] == 0.5  # (1 + 0 + 0.5) / 3
    # groups [1, 0] and [0.5] alone: sample deviations sqrt(0.5) and 0
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["completions/mean_length"] == 9 / 4
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (1, 3)
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/mean_terminated_length"] == 2  # of 2, 1 and 3
    assert metrics["rewards/f/mean"] == 0.5


def drawn(number, rewards):
    """A rollout of two-response groups with these rewards, whose contents tell where they were."""
    P = len(rewards)
    tokens = (100 * number + np.arange(2 * P, dtype=np.int32))[:, None] * np.ones((1, 3), np.int32)
    reward = np.array(rewards, np.float32).reshape(-1)
    return Rollout(
        [Problem(f"{number}.{p}", "?") for p in range(P)],
        [[number, p] for p in range(P)],
        Completions(tokens, tokens >= 0, tokens / 7, np.zeros(2 * P, bool)),
        [f"{number}.{row}" for row in range(2 * P)],
        {"f": reward},
        reward,
    )


def test_only_groups_with_two_different_scores_have_spread():
    rewards = [[1, 0], [0.7, 0.7], [np.nan, 1], [np.nan, np.nan], [0, 0.1]]
    assert groups_with_spread(drawn(0, rewards)) == [0, 4]


def test_where_the_truncated_are_masked_spread_is_that_of_the_rest():
    """All of group 0 was cut, and one of group 1, whose other has no one to differ from."""
    rollout = drawn(0, [[1, 0], [1, 0], [1, 0]])
    cut = np.array([True, True, False, True, False, False])
    rollout = replace(rollout, completions=rollout.completions._replace(truncated=cut))
    assert groups_with_spread(rollout) == [0, 1, 2]
    assert groups_with_spread(rollout, mask_truncated=True) == [2]
    kept, _ = fill_with_spread(lambda n: rollout, prompts=1, rounds=1, mask_truncated=True)
    assert [p.id for p in kept.problems] == ["0.2"]


def test_what_is_logged_is_told_of_all_rounds():
    """2 and 3 errors are 5; 0.5 over 4 responses and 1 over 12 are 0.875 over 16."""
    logs = [
        {"errors": Count(2), "share": Average(0.5, 4)},
        {"errors": Count(3), "share": Average(1.0, 12), "late": Average(7.0, 1)},
    ]
    rounds = [[[1, 1], [1, 0]], [[0, 0], [0, 1]]]
    _, everything = fill_with_spread(
        lambda n: replace(drawn(n, rounds[n]), log=logs[n]), prompts=2, rounds=2
    )
    told = rollout_metrics(everything)
    assert {name: told[name] for name in logs[1]} == {"errors": 5, "share": 0.875, "late": 7}


def test_dynamic_sampling_draws_until_every_group_has_spread_and_no_longer():
    rounds = [[[1, 1], [1, 0], [0, 0]], [[0, 0], [0, 1], [1, 1]], [[0, 1], [1, 0], [0, 1]], None]
    kept, everything = fill_with_spread(lambda n: drawn(n, rounds[n]), prompts=3, rounds=4)
    # One of the first round, one of the second, one of the third; a fourth would fail.
    assert [p.id for p in kept.problems] == ["0.1", "1.1", "2.0"]
    assert kept.prompts == [[0, 1], [1, 1], [2, 0]]
    assert kept.texts == ["0.2", "0.3", "1.2", "1.3", "2.0", "2.1"]
    assert kept.completions.tokens[:, 0].tolist() == [2, 3, 102, 103, 200, 201]
    assert kept.reward.tolist() == [1, 0, 0, 1, 0, 1]
    assert len(groups_with_spread(kept)) == 3
    # What is reported is everything that was sampled: 9 of 18 responses right.
    assert rollout_metrics(everything)["reward"] == pytest.approx(9 / 18)


def test_dynamic_sampling_is_bounded_and_fills_the_batch_with_groups_without_spread():
    rounds = [[[1, 1], [0, 0]], [[0, 0], [0, 1]]]
    kept, _ = fill_with_spread(lambda n: drawn(n, rounds[n]), prompts=2, rounds=2)
    assert [p.id for p in kept.problems] == ["0.0", "1.1"]
    assert kept.reward.tolist() == [1, 1, 0, 1]


def test_soft_overlong_punishment_by_hand_in_tokens():
    """Limit 6, buffer 4: free up to 2 tokens, then a quarter per token, down to -1 at 6."""
    lengths = [1, 2, 3, 5, 6]
    mask = np.arange(6)[None] < np.array(lengths)[:, None]
    tokens = np.ones((5, 6), np.int32)
    completions = Completions(tokens, mask, np.zeros((5, 6), np.float32), np.zeros(5, bool))

    def right(problems, texts, ids):
        assert [len(i) for i in ids] == lengths
        one = np.ones(5, np.float32)
        return {"right": one}, one, {}

    rollout = score_completions(
        right, [Problem("p", "?")], [[1]], completions, ["x"] * 5, overlong_buffer=4
    )
    assert rollout.rewards["overlong"].tolist() == [0, 0, -0.25, -0.75, -1]
    assert rollout.reward.tolist() == [1, 1, 0.75, 0.25, 0]


def test_a_single_round_is_taken_as_it_is():
    rewards = [[1, 1], [1, 0], [0, 0], [0, 1]]
    kept, everything = fill_with_spread(lambda n: drawn(n, rewards), prompts=4, rounds=1)
    assert [p.id for p in kept.problems] == ["0.0", "0.1", "0.2", "0.3"]
    np.testing.assert_array_equal(kept.completions.tokens, drawn(0, rewards).completions.tokens)
    assert everything.texts == kept.texts
