"""How near a step came to the machine: counted position by position, in plain loops."""

import numpy as np
import pytest

from gspo_jax.models.config import QwenConfig
from gspo_jax.plan.costs import (
    Peak,
    Rates,
    decode_floor,
    faster,
    layer_parameters,
    metered,
    operations,
    utilisation,
)

SHAPE = QwenConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)
PROMPT, LENGTH = np.array([5, 5, 7, 7]), np.array([1, 4, 9, 2])
# Per layer: q and o 16 x 16, k and v 16 x 8, gate, up and down 16 x 24.
LAYERS = 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
HEAD = 16 * 40


def attention(positions):
    """A query against so many keys, then their values: 4 heads of 4 numbers, 2 operations each."""
    return 3 * 4 * (2 * 4 + 2 * 4) * positions


def test_the_weights_that_multiply_a_token_are_counted():
    assert layer_parameters(SHAPE) == LAYERS


def test_a_forward_pass_counts_every_token_once_and_the_causal_half_of_attention():
    by_hand = 0
    for prompt, length in zip(PROMPT, LENGTH, strict=True):
        by_hand += (prompt + length) * 2 * LAYERS + length * 2 * HEAD
        # Position i looks at i + 1: the triangle, for which n * n / 2 stands.
        by_hand += attention((prompt + length) ** 2 / 2)
    assert operations(SHAPE, PROMPT, LENGTH) == by_hand


@pytest.mark.parametrize("rates", [Rates(1e9, 1e15), Rates(1e15, 1e9), Rates(1e9, 1e9)])
def test_the_floor_of_decoding_is_the_sum_over_steps_of_what_the_living_rows_need(rates):
    seconds = 0.0
    for t in range(1, LENGTH.max()):  # token 0 comes with the prompts
        alive = [p + t for p, n in zip(PROMPT, LENGTH, strict=True) if n > t]
        work = len(alive) * 2 * (LAYERS + HEAD) + sum(attention(n) for n in alive)
        cache = sum(3 * 2 * 2 * 4 * n for n in alive)  # layers, keys and values, heads, width
        seconds += max(work / rates.matmul, 4 * (LAYERS + HEAD + cache) / rates.copy)
    assert decode_floor(SHAPE, PROMPT, LENGTH, rates) == pytest.approx(seconds, rel=1e-12)


def test_shares_are_of_the_best_peak_of_the_run_and_never_above_one_without_a_word():
    """The first measurement was taken beside other work: a step at half the speed reads 200 %."""
    said, measured = [], [Peak(Rates(4e9, 1e9), 4e9, "")]

    def of(rate, *, peak):
        return {"speed/mfu": rate / peak.matmul}

    busy = Peak(Rates(1e9, 2e9), 1e9, "measured")
    meter = metered(of, measured.pop, busy, said.append)
    assert meter(2e9) == {"speed/mfu": 0.5} and not said  # measured again at once
    assert faster(busy, Peak(Rates(4e9, 1e9), 4e9, "")) == Peak(Rates(4e9, 2e9), 4e9, "measured")
    # After 2, 4 and 8 steps again, with no need: what is slower changes nothing.
    again = []
    meter = metered(
        of, lambda: again.append(busy) or busy, Peak(Rates(4e9, 1e9), 4e9, ""), said.append
    )
    assert [meter(1e9)["speed/mfu"] for _ in range(10)] == [0.25] * 10 and len(again) == 3
    # What stays above 1 is told once, with the figure.
    meter = metered(of, lambda: busy, busy, said.append)
    assert meter(3.8e9) == meter(3.8e9) == {"speed/mfu": 3.8}
    (line,) = said
    assert line.startswith("warning: speed/mfu is 380%")


def test_a_step_at_its_floor_has_utilisation_one_and_twice_the_time_or_devices_halves_it():
    rates = Rates(1e9, 1e9)
    peak = Peak(rates, 2e9, "a datasheet")
    floor = operations(SHAPE, PROMPT[::2], np.ones(2, int)) / 1e9
    floor += decode_floor(SHAPE, PROMPT, LENGTH, rates)
    update = 3 * 2 * operations(SHAPE, PROMPT, LENGTH) / 2e9

    def of(scale=1, **options):
        seconds = {"time/generate": scale * floor, "time/update": scale * update}
        options = {"peak": peak, "group_size": 2, "epochs": 2} | options
        return utilisation(SHAPE, PROMPT, LENGTH, seconds, **options)

    assert of() == pytest.approx({"speed/mfu": 1, "speed/generate_of_floor": 1})
    assert of(2) == pytest.approx({"speed/mfu": 0.5, "speed/generate_of_floor": 0.5})
    assert of(devices=2)["speed/mfu"] == pytest.approx(0.5)
    assert utilisation(SHAPE, PROMPT, LENGTH, {}, peak=peak, group_size=2) == {}
