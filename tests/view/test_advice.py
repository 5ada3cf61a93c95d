"""Advice is given when it is due, names a remedy, and stays away otherwise."""

import pytest

from gspo_jax.view.advice import advise, quiet_limit

# Healthy: the first update after a rollout clips nothing, the others do.
GOOD = {"reward": 0.5, "entropy": 0.5, "clip_frac": 0.1, "clip_frac_by_update": [0.0, 0.2, 0.1]}


def rows(count=30, **last):
    return [{"step": k, **GOOD} for k in range(1, count)] + [{"step": count, **GOOD, **last}]


def kinds(found, **how):
    return [advice.kind for advice in advise(found, **how)]


def test_a_healthy_run_is_left_alone():
    assert kinds(rows(), first={"step": 1, "entropy": 1.0}, age=30.0) == []
    assert kinds([]) == [] and kinds([{"step": 0, "eval/greedy": 0.5}]) == []


@pytest.mark.parametrize(
    ("last", "kind", "remedy"),
    [
        ({"frac_reward_zero_std": 1}, "equal", "rollout.group_size"),
        ({"completions/clipped_ratio": 0.25}, "truncated", "rollout.max_completion_length"),
        ({"clip_frac": 0.6}, "clipped", "optim.learning_rate"),
        ({"rewards/judge/errors": 3}, "errors", "task.reward_errors=stop"),
        ({"skipped_updates": 1}, "skipped", "not finite"),
    ],
)
def test_a_step_that_goes_wrong_gives_its_remedy(last, kind, remedy):
    (found,) = advise(rows(**last))
    assert found.kind == kind and remedy in found.text


def test_advice_of_steps_counts_them_and_ends_with_them():
    found = [
        {"step": k, **GOOD, "clip_frac": 0.75 if k in (5, 25, 30) else 0.1} for k in range(1, 41)
    ]
    (clipped,) = advise(found)  # of steps 21 to 40, two
    assert clipped.text.endswith("(2 of the last 20 steps)")
    assert kinds(found[:24]) == ["clipped"] and kinds(found[5:24]) == []


def test_a_running_total_is_told_when_it_rises():
    """One update was skipped in step 2; the total stays 1 ever after."""
    found = [{"step": k, **GOOD, "skipped_updates": int(k >= 2)} for k in range(1, 60)]
    assert kinds(found[:10]) == ["skipped"] and kinds(found) == []


@pytest.mark.parametrize(
    ("now", "start", "due"),
    [(0.019, 0.05, True), (0.021, 0.05, False), (0.09, 1.0, True), (0.11, 1.0, False)],
)
def test_the_entropy_collapses_below_a_tenth_of_its_start_or_002_nats(now, start, due):
    found = [{"step": k, **GOOD, "entropy": now} for k in range(1, 10)]
    assert (kinds(found, first={"step": 1, "entropy": start}) == ["entropy"]) == due


def test_one_odd_step_is_no_collapse():
    assert kinds(rows(entropy=0.001)) == []


def test_clipping_that_never_acts_in_50_updates_is_told_but_the_first_of_a_step_does_not_count():
    never = [{"step": k, **GOOD, "clip_frac_by_update": [0.0, 0.0, 0.0]} for k in range(1, 26)]
    assert kinds(never) == ["unclipped"]  # 25 steps, two updates each that could clip
    assert kinds(never[:24]) == []
    never[3]["clip_frac_by_update"] = [0.0, 0.001, 0.0]
    assert kinds(never) == []
    on_policy = [{"step": k, **GOOD, "clip_frac_by_update": [0.0]} for k in range(1, 200)]
    assert kinds(on_policy) == []


def test_nine_dead_groups_in_ten_are_told_but_not_to_a_critic():
    """A critic tells responses apart where their rewards do not."""
    dead = [
        {"step": k, **GOOD, "frac_reward_zero_std": 0.75 + 0.25 * (k > 5)} for k in range(1, 11)
    ]
    assert kinds(dead[:8]) == kinds(dead[5:9]) == ["equal"]  # 0.84 on average; only 4 steps
    assert kinds(dead[:5]) == []
    dead = [{**row, "frac_reward_zero_std": 0.875 + 0.0625 * (row["step"] > 1)} for row in dead]
    assert kinds(dead) == ["few"] and "93% of the groups" in advise(dead)[0].text
    assert kinds([row | {"critic/vf_loss": 0.1} for row in dead]) == []


@pytest.mark.parametrize(
    ("age", "state", "due"),
    [
        (599.0, "running", False),
        (601.0, "running", True),
        (9e9, "finished", False),
        (None, "running", False),
    ],
)
def test_a_run_that_is_quiet_for_ten_minutes_is_told_unless_it_has_ended(age, state, due):
    assert (kinds(rows(), state=state, age=age) == ["quiet"]) == due


def test_long_steps_may_be_quiet_for_longer():
    assert quiet_limit(rows(step_time=1000.0, compile_time=200.0)) == 6000
    assert kinds(rows(step_time=1000.0), age=4999.0) == []


def test_the_most_urgent_comes_first():
    last = {"clip_frac": 0.75, "rewards/judge/errors": 1}
    assert kinds(rows(**last), age=1e4) == ["quiet", "errors", "clipped"]
