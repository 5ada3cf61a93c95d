"""Stretched positions: the frequencies, and what a config.json may say about them."""

import math

import numpy as np
import pytest

from gspo_jax.errors import DataError
from gspo_jax.models import QwenConfig
from gspo_jax.models.rope import RopeScaling, inverse_frequencies, read_rope

# As Qwen2.5's documentation tells users to write it.
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
# Dimensions 0, 20, ... of 64, of heads of 128 with base 1e6, as transformers 5.23 has them.
PICKED = [0, 20, 23, 26, 30, 40, 63]
RECORDED_YARN = [
    1.0,
    0.01333521492779255,
    0.006978305988013744,
    0.0031684227287769318,
    0.0010643609566614032,
    4.4456985051510856e-05,
    3.102344408034696e-07,
]
RECORDED_LINEAR = [
    0.3333333432674408,
    0.0044450717978179455,
    0.0023261019960045815,
    0.0012172471033409238,
    0.0005133088561706245,
    5.927597885602154e-05,
    4.1364592107129283e-07,
]


def yarn(**changes):
    values = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000} | changes
    return RopeScaling(**values)


def turns(dimension):
    """How often a dimension of heads of 8 with base 1e4 turns in 1000 positions: f_i / 2π each."""
    return 1000 * 10**-dimension / (2 * math.pi)


# The frequencies


def test_plain_frequencies_are_powers_of_the_base():
    frequencies, factor = inverse_frequencies(8, 1e4, None)
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-7)
    assert frequencies.dtype == np.float32
    assert factor == 1


def test_linear_divides_every_frequency():
    frequencies, factor = inverse_frequencies(8, 1e4, RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(frequencies, [1 / 4, 0.1 / 4, 0.01 / 4, 0.001 / 4], rtol=1e-7)
    assert factor == 1


def test_yarn_blends_between_two_dimensions():
    """Kept up to dimension 1.3, divided by 4 from 2.6 on, rounded outwards to 1 and 3."""
    scaling = yarn(beta_fast=turns(1.3), beta_slow=turns(2.6))
    # Stretched shares: 0, (1 - 1) / 2, (2 - 1) / 2, 1.
    expected = [1, 0.1, 0.01 * (0.5 + 0.5 / 4), 0.001 / 4]
    np.testing.assert_allclose(inverse_frequencies(8, 1e4, scaling)[0], expected, rtol=1e-6)


def test_yarn_without_truncation_blends_between_the_exact_dimensions():
    scaling = yarn(beta_fast=turns(1.3), beta_slow=turns(2.6), truncate=False)
    share = (2 - 1.3) / (2.6 - 1.3)
    expected = [1, 0.1, 0.01 * (1 - share + share / 4), 0.001 / 4]
    np.testing.assert_allclose(inverse_frequencies(8, 1e4, scaling)[0], expected, rtol=1e-6)


def test_yarn_with_one_boundary_steps_there():
    scaling = yarn(beta_fast=turns(1.5), beta_slow=turns(1.5), truncate=False)
    expected = [1, 0.1, 0.01 / 4, 0.001 / 4]
    np.testing.assert_allclose(inverse_frequencies(8, 1e4, scaling)[0], expected, rtol=1e-6)


def test_yarn_boundaries_end_with_the_dimensions():
    """From before the first one to after the last: 0 to H - 1 = 7, of which 4 dimensions exist."""
    scaling = yarn(beta_fast=turns(-2.5), beta_slow=turns(8.5))
    share = np.arange(4) / 7
    expected = np.array([1, 0.1, 0.01, 0.001]) * (1 - share + share / 4)
    np.testing.assert_allclose(inverse_frequencies(8, 1e4, scaling)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1),
        ({"attention_factor": 0.5, "mscale": 2.0, "mscale_all_dim": 1.0}, 0.5),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),  # one of the two alone says nothing
        ({"mscale_all_dim": 2.0}, 0.1 * math.log(4) + 1),
        (
            {"mscale": 2.0, "mscale_all_dim": 0.5},
            (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1),
        ),
    ],
)
def test_yarn_scales_cos_and_sin(changes, expected):
    _, factor = inverse_frequencies(8, 1e4, yarn(**changes))
    assert factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rope", "expected", "factor"),
    [
        (YARN, RECORDED_YARN, 1.138629436111989),
        ({"type": "linear", "factor": 3.0}, RECORDED_LINEAR, 1),
    ],
)
def test_frequencies_of_a_published_shape_equal_transformers_bit_for_bit(rope, expected, factor):
    theta, scaling = read_rope({"rope_theta": 1000000, "rope_scaling": rope})
    got, scale = inverse_frequencies(128, theta, scaling)
    np.testing.assert_array_equal(got[PICKED], np.array(expected, np.float32))
    assert scale == factor


# Reading


@pytest.mark.parametrize(
    "hf",
    [
        {"rope_theta": 5e5, "rope_scaling": YARN},
        {"rope_theta": 500000, "rope_scaling": {**YARN, "factor": 4, "rope_type": "yarn"}},
        {"rope_parameters": {**YARN, "rope_theta": 5e5, "beta_fast": 32, "beta_slow": None}},
        {"rope_parameters": {**YARN, "rope_theta": 5e5, "mscale": 0, "mscale_all_dim": 0.0}},
        {"rope_parameters": {**YARN, "partial_rotary_factor": 1.0}, "rope_theta": 5e5},
        {
            "rope_theta": 5e5,
            "rope_scaling": YARN,
            "rope_parameters": {**YARN, "rope_theta": 5e5, "attention_factor": None},
            "original_max_position_embeddings": 32768,
        },
    ],
)
def test_one_scaling_in_all_its_forms(hf):
    scaling = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32768)
    assert read_rope(hf) == (5e5, scaling)


def test_the_original_length_of_yarn_is_the_whole_length_where_it_is_missing():
    rope = {"type": "yarn", "factor": 4.0}
    _, scaling = read_rope({"max_position_embeddings": 1000, "rope_scaling": rope})
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 1000
    assert read_rope({"rope_scaling": rope})[1] == RopeScaling(
        kind="yarn", factor=4.0, original_max_position_embeddings=32768
    )


def test_a_null_factor_of_yarn_is_the_ratio_of_the_lengths():
    _, scaling = read_rope(
        {"max_position_embeddings": 81920, "rope_scaling": {**YARN, "factor": None}}
    )
    assert scaling is not None
    assert scaling.factor == 2.5


@pytest.mark.parametrize("rope", [None, {}, {"type": "default"}, {"rope_type": None}])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_no_scaling_in_all_its_forms(key, rope):
    assert read_rope({key: rope, "rope_theta": 100}) == (100.0, None)
    assert read_rope({key: rope}) == (10000.0, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 2.5},
        YARN,
        {**YARN, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    ],
)
def test_what_is_written_reads_back_as_the_same_from_either_key(rope):
    config = QwenConfig.from_hf(SHAPE | {"rope_theta": 5e5, "rope_scaling": rope})
    hf = config.to_hf()
    assert QwenConfig.from_hf(hf) == config
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 prefers rope_scaling too,
    # and other readers know rope_parameters alone.
    assert hf["rope_scaling"] == {"rope_type": rope["type"], **without_type(rope)}
    assert hf["rope_parameters"] == {"rope_theta": 5e5, **hf["rope_scaling"]}
    for key in ("rope_scaling", "rope_parameters"):
        assert QwenConfig.from_hf({k: v for k, v in hf.items() if k != key}) == config


def without_type(rope):
    return {k: v for k, v in rope.items() if k != "type"}


# Refusals


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ("yarn", "rope_scaling='yarn': wanted an object"),
        ({"type": "dynamic", "factor": 2.0}, "rope_scaling.rope_type='dynamic' is not implemented"),
        ({"rope_type": "longrope"}, "rope_type='longrope' is not impl.* default, linear, yarn"),
        ({"rope_type": "llama3"}, "rope_scaling.rope_type='llama3' is not implemented"),
        ({"type": "mrope", "mrope_section": [16]}, "rope_scaling.rope_type='mrope' is not impl"),
        ({"rope_type": ["yarn"]}, r"rope_scaling.rope_type=\[...\] is not implemented"),
        ({"rope_type": "yarn", "type": "linear"}, "rope_type='yarn', but .*.type='linear'"),
        ({"factor": 2.0}, "rope_scaling: 'factor' is not implemented for rope_type 'default'"),
        ({**YARN, "finetuned": True}, "rope_scaling: 'finetuned' is not implemented for .* 'yarn'"),
        (
            {"type": "linear", "factor": 2.0, "beta_fast": 32},
            "rope_scaling: 'beta_fast' is not implemented for rope_type 'linear'",
        ),
        ({"full_attention": YARN}, "rope_scaling: 'full_attention' is not implemented"),
        ({**YARN, "\n" * 1000: 1}, r"rope_scaling: '(\\n)+...* is not implemented"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
        ({"type": "linear"}, "rope_scaling.factor is missing"),
        ({"type": "yarn"}, "rope_scaling.factor is missing"),
        ({"type": "linear", "factor": None}, "rope_scaling.factor=None: wanted a number"),
        ({"type": "linear", "factor": "2"}, "rope_scaling.factor='2': wanted a number"),
        ({"type": "linear", "factor": True}, "rope_scaling.factor=True: wanted a number"),
        ({"type": "linear", "factor": 0}, "rope_scaling.factor=0.0: wanted a number between 0"),
        ({"type": "linear", "factor": 0.5}, "rope_scaling.factor=0.5: wanted at least 1"),
        ({**YARN, "factor": -4.0}, "rope_scaling.factor=-4.0: wanted a number"),
        ({**YARN, "factor": float("nan")}, "rope_scaling.factor=nan: wanted a number"),
        ({**YARN, "factor": 10**400}, "rope_scaling.factor=10+...: wanted a number"),
        (
            {**YARN, "original_max_position_embeddings": 0},
            "rope_scaling.original_max_position_embeddings=0: wanted 1 to",
        ),
        (
            {**YARN, "original_max_position_embeddings": 32768.0},
            "rope_scaling.original_max_position_embeddings=32768.0: wanted an integer",
        ),
        # As DeepSeek-R1-0528-Qwen3-8B has it.
        ({**YARN, "attn_factor": 0.8782488562869419}, "attn_factor=0.878.* remove it .* write att"),
        ({**YARN, "attention_factor": 0}, "rope_scaling.attention_factor=0.0: wanted a number"),
        ({**YARN, "attention_factor": "1"}, "rope_scaling.attention_factor='1': wanted a number"),
        ({**YARN, "beta_fast": -1}, "rope_scaling.beta_fast=-1.0: wanted a number"),
        ({**YARN, "beta_slow": [1]}, r"rope_scaling.beta_slow=\[...\]: wanted a number"),
        ({**YARN, "beta_fast": 0.5}, "rope_scaling.beta_fast=0.5 is below beta_slow=1.0"),
        ({**YARN, "mscale": -0.1}, "rope_scaling.mscale=-0.1: wanted a number"),
        ({**YARN, "mscale_all_dim": "x"}, "rope_scaling.mscale_all_dim='x': wanted a number"),
        ({**YARN, "truncate": None}, "rope_scaling.truncate=None: wanted one of False, True"),
    ],
)
def test_impossible_scalings_are_refused_by_key(rope, message):
    with pytest.raises(DataError, match=message) as refusal:
        read_rope({"rope_theta": 10000, "rope_scaling": rope})
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"rope_parameters": {**YARN, "beta_slow": "1"}}, "rope_parameters.beta_slow='1': wanted"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ; remove one",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            "rope_scaling and rope_parameters differ; remove one",
        ),
        (  # transformers would take the base from nowhere: 10000
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e6}},
            "rope_scaling and rope_parameters differ; .*rope_theta included",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {**YARN, "rope_theta": 1e6}},
            "rope_theta=10000.0, but rope_parameters.rope_theta=1000000.0",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings=4096, but rope_scaling.orig.*=32768",
        ),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0},
                "original_max_position_embeddings": 1,
            },
            "original_max_position_embeddings=1, but rope_scaling.orig.*=None",
        ),
        (
            {"rope_scaling": YARN, "max_position_embeddings": "long"},
            "^max_position_embeddings='long': wanted an integer",
        ),
        ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta=1.0: wanted a number between 1 and"),
    ],
)
def test_files_that_contradict_themselves_are_refused(hf, message):
    with pytest.raises(DataError, match=message) as refusal:
        read_rope(hf)
    assert "\n" not in str(refusal.value)


def test_a_scaling_that_is_neither_linear_nor_yarn_cannot_be_made():
    with pytest.raises(DataError, match="rope_type='dynamic': wanted one of 'linear', 'yarn'"):
        RopeScaling(kind="dynamic", factor=2.0)
