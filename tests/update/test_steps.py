"""The order of a rollout's updates, with a policy whose log-probabilities are its only weight."""

import numpy as np
import optax
import pytest

from gspo_jax.batch import TrainBatch
from gspo_jax.update.objective import Targets
from gspo_jax.update.programs import LogProbs, Programs
from gspo_jax.update.state import init_state
from gspo_jax.update.steps import Progress, continue_updates, old_logps

B, T, STEP = 6, 2, 100.0
ROW = np.arange(B, dtype=np.float32)[:, None] * np.ones((1, T), np.float32)


class Recorder(Programs):
    """log π = w + row; every update raises w by STEP. What it is given is kept, in order."""

    def logps(self, params, batch):
        self.place(("logps", batch.tokens[:, 0].tolist()))
        return LogProbs(batch.tokens + params["w"], batch.tokens[..., None, None].astype(np.int16))

    def update(self, state, batch, old_logp=None, ref_logp=None, targets=None, **_):
        self.place(("update", batch.tokens[:, 0].tolist(), old_logp, ref_logp, targets, batch))
        found = LogProbs(batch.tokens + state.params["w"])
        params = {"w": state.params["w"] + STEP}
        return state._replace(params=params, updates=state.updates + 1), {}, found


@pytest.fixture
def recorder():
    """The programs, and the list that they fill."""
    calls = []
    return Recorder(None, calls.append, *[None] * 5), calls


def rows(**more):
    lengths = np.full(B, T, np.int32)
    return TrainBatch(
        ROW.astype(np.int32), lengths, lengths, np.ones((B, T), bool), ROW[:, 0], **more
    )


def start():
    return init_state({"w": np.float32(0)}, optax.identity())


def test_every_update_compares_with_the_policy_before_the_first_of_them(recorder):
    """3 minibatches of 2 rows, 2 epochs: w is 0 when they are scored, and 500 in the last one.

    The first is not scored, since it is on-policy; its second epoch takes what its first found.
    """
    programs, calls = recorder
    everything = Progress(rows(), ROW - 7, Targets(ROW + 1, ROW + 2))
    state, done = continue_updates(programs, start(), everything, minibatches=3, epochs=2)
    assert [call[:2] for call in calls] == [
        ("logps", [2, 3]),
        ("logps", [4, 5]),
        *[("update", block) for block in ([0, 1], [2, 3], [4, 5])] * 2,
    ]
    assert calls[2][2] is None
    for _, block, known, ref, targets, batch in calls[2:]:
        own = ROW[block]
        if known is not None:
            np.testing.assert_array_equal(known, own)
        np.testing.assert_array_equal(ref, own - 7)
        np.testing.assert_array_equal(targets.value, own + 1)
        np.testing.assert_array_equal(targets.returns, own + 2)
        np.testing.assert_array_equal(batch.adv, own[:, 0])
    assert all(call[2] is not None for call in calls[3:])
    np.testing.assert_array_equal(old_logps(done), ROW)
    assert (int(state.step), float(state.params["w"])) == (1, 6 * STEP)


def test_the_experts_to_replay_are_those_of_the_sampler_or_else_of_the_score(recorder):
    """R3 gives them for every row; R2 has none for the first minibatch, where they are found."""
    programs, calls = recorder
    continue_updates(programs, start(), Progress(rows()), minibatches=3)
    scored = [call[-1].routing for call in calls if call[0] == "update"]
    assert scored[0] is None and scored[1].ravel().tolist() == [2, 2, 3, 3]
    calls.clear()
    given = np.full((B, T, 1, 1), 9, np.int16)
    continue_updates(programs, start(), Progress(rows(routing=given)), minibatches=3)
    assert all((call[-1].routing == 9).all() for call in calls if call[0] == "update")


def test_what_is_left_of_a_rollout_is_done_later_as_if_nobody_had_stopped(recorder):
    """Asked once before anything, then before each update; the step counts when all are done."""
    programs, calls = recorder
    answers = iter([False, False, False, True])
    state, part = continue_updates(
        programs, start(), Progress(rows()), minibatches=2, epochs=2, stop=lambda: next(answers)
    )
    assert (int(state.step), int(state.updates), len(part.stats)) == (0, 2, 2)
    scored = [call for call in calls if call[0] == "logps"]
    state, part = continue_updates(programs, state, part, minibatches=2, epochs=2)
    assert (int(state.step), int(state.updates), len(part.stats)) == (1, 4, 4)
    assert [call for call in calls if call[0] == "logps"] == scored
    np.testing.assert_array_equal(old_logps(part), ROW)
