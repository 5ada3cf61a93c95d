"""Numbers that know how they are put together."""

import json
import math

import numpy as np
import pytest
from jax import numpy as jnp

from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import TrainBatch
from gspo_jax.numbers.tally import Average, Count, Least, Most, combined, merged, packed, unpacked
from gspo_jax.update.objective import Objective, tallied
from gspo_jax.update.steps import summarise


def test_counts_add_means_weigh_and_extremes_are_kept():
    """3 and 5; 2 over 1 and 6 over 3 (20 over 4); least and most of two. Nothing counts nothing."""
    assert combined([Count(3), Count(5)]) == Count(8)
    assert combined([Average(2.0, 1), Average(99.0, 0), Average(6.0, 3)]) == Average(5.0, 4)
    assert combined([Least(0.5, 2), Least(0.0, 0), Least(0.7, 1)]) == Least(0.5, 3)
    assert combined([Most(0.5, 2), Most(9.0, 0), Most(0.7, 1)]) == Most(0.7, 3)
    assert combined([Average(1.0, 0), Average(7.0, 0)]) == Average(1.0, 0)
    for kind in (Average, Least, Most):
        for order in ([math.nan, 1.0], [1.0, math.nan]):
            assert math.isnan(combined([kind(x, 1) for x in order]).value)
    with pytest.raises(TypeError, match="not of one kind"):
        combined([Count(1), Average(1.0, 1)])


def test_in_a_record_every_name_is_over_those_who_have_it():
    records = [{"a": Count(1)}, {"b": Least(2.0, 1), "a": Count(2)}]
    assert merged(records) == {"a": Count(3), "b": Least(2.0, 1)}


def test_json_gives_them_back_and_an_earlier_versions_numbers_are_means():
    record = {
        "a": Count(1.0),
        "b": Average(0.1, 3.0),
        "c": Least(math.inf, 0.0),
        "d": Most(2.0, 1.0),
    }
    assert unpacked(json.loads(json.dumps(packed(record)))) == record
    assert unpacked({"loss": 0.25}) == {"loss": Average(0.25, 1.0)}


def update(name, lengths, **metrics):
    """What an update on responses of these lengths has to say."""
    mask = np.arange(8)[None] < np.array(lengths)[:, None]
    zeros = np.zeros(len(lengths), np.int32)
    batch = TrainBatch(np.zeros((len(lengths), 9), np.int32), zeros + 1, zeros + 8, mask, zeros)
    found = {"ratio_min": 1.0, "ratio_max": 1.0, "ratio_mean": 1.0} | metrics
    return tallied(found, batch._replace(mask=jnp.asarray(mask)), Objective(LOSSES[name]))


@pytest.mark.parametrize(("loss", "mean"), [("gspo", (3 * 1.2 + 0.8) / 4), ("dapo", 1.0)])
def test_a_steps_numbers_are_over_what_was_trained_on(loss, mean):
    """Three responses of 2 tokens, one of 6, and an update of which nothing is trained on.

    So means over tokens weigh 6 and 6, over responses 3 and 1, over updates 1 and 1. Means over
    the three updates would be 0.4 for the entropy, and a ratio of 1 is one that no token had.
    """
    updates = [
        update(
            loss, [2, 2, 2], entropy=0.4, loss=1.0, ratio_mean=1.2, ratio_min=1.1, ratio_max=1.3
        ),
        update(loss, [0, 0, 0], entropy=0.0, loss=0.0),
        update(loss, [6], entropy=0.8, loss=3.0, ratio_mean=0.8, ratio_min=0.8, ratio_max=0.8),
    ]
    updates[2] |= {"router/changed": Average(0.25, 6)}  # the first update has nothing to compare
    told = summarise(updates)
    wanted = {"entropy": (6 * 0.4 + 6 * 0.8) / 12, "loss": 2.0, "ratio_max": 1.3, "ratio_min": 0.8}
    wanted |= {"ratio_mean": mean}
    assert {name: told[name] for name in wanted} == pytest.approx(wanted)
    assert told["loss_by_update"] == [1.0, 0.0, 3.0]
    assert told["router/changed_by_update"] == [0.25]
    assert summarise(updates[1:2])["ratio_mean"] == 1.0
