"""The network against transformers (recorded in tests/fixtures), and its own identities."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspo_jax.models import Qwen, QwenConfig, load_model
from gspo_jax.models.cache import fit
from gspo_jax.models.qwen import head_logits, joined

WIDTH = 24  # of the longest text: 12 tokens of prompt and 12 of answer
RECORDED = Path(__file__).parents[1] / "fixtures"
FIXTURES = sorted(path.parent for path in RECORDED.glob("*/config.json"))


class Case(NamedTuple):
    """A model and what transformers says of it; `mask` and `left_mask` are true on real tokens."""

    model: Qwen
    tokens: np.ndarray
    mask: np.ndarray
    left_tokens: np.ndarray
    left_mask: np.ndarray
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=FIXTURES, ids=lambda path: path.name)
def case(request):
    expected = dict(np.load(request.param / "expected.npz"))
    tokens, length = expected["tokens"], expected["length"]
    mask = np.arange(tokens.shape[1]) < length[:, None]
    rolled = [np.roll(row, len(row) - n) for row, n in zip(tokens, length, strict=True)]
    return Case(
        load_model(request.param), tokens, mask, np.stack(rolled), np.flip(mask, 1), expected
    )


@nnx.jit
def forward(model, tokens, mask):
    return model.logits(tokens, mask=mask)


def logits(model, tokens, mask=None):
    """Of [3, S] tokens, padded on the right to one width, so that a model compiles once."""
    S = tokens.shape[1]
    pad = ((0, 0), (0, WIDTH - S))
    mask = np.ones_like(tokens, bool) if mask is None else mask
    return np.asarray(forward(model, np.pad(tokens, pad), np.pad(mask, pad)))[:, :S]


def test_fixtures_cover_both_families_and_every_option():
    names = [path.name for path in FIXTURES]
    assert names == [
        "qwen2_tied",
        "qwen2_untied",
        "qwen2_windows",
        "qwen2_yarn",
        "qwen3_linear_rope",
        "qwen3_moe",
        "qwen3_moe_fused",
        "qwen3_tied",
        "qwen3_untied",
        "qwen3_wide_heads",
    ]


def test_logits_equal_transformers_on_a_right_padded_batch(case):
    ours = logits(case.model, case.tokens, case.mask)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(
        ours[case.mask], case.expected["logits"][case.mask], atol=1e-4, rtol=0
    )


def test_logits_equal_transformers_on_a_left_padded_batch(case):
    ours = logits(case.model, case.left_tokens, case.left_mask)
    theirs = case.expected["left_logits"]
    np.testing.assert_allclose(ours[case.left_mask], theirs[case.left_mask], atol=1e-4, rtol=0)


def test_right_padded_rows_need_no_mask(case):
    plain = nnx.jit(lambda model, tokens: model.logits(tokens))(case.model, case.tokens)
    masked = logits(case.model, case.tokens, case.mask)
    np.testing.assert_allclose(np.asarray(plain)[case.mask], masked[case.mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_on_padding_has_no_effect(case, side):
    tokens, mask = (
        (case.tokens, case.mask) if side == "right" else (case.left_tokens, case.left_mask)
    )
    poisoned = np.where(mask, tokens, 95)  # the padding of the fixtures is 0
    assert not np.array_equal(poisoned, tokens)
    np.testing.assert_array_equal(
        logits(case.model, poisoned, mask)[mask], logits(case.model, tokens, mask)[mask]
    )


def test_a_token_changes_its_own_and_later_logits_and_no_earlier_ones(case):
    changed = case.tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % 96
    before, after = (logits(case.model, tokens)[0] for tokens in (case.tokens, changed))
    np.testing.assert_array_equal(after[:5], before[:5])
    assert (np.abs(after[5:] - before[5:]).max(axis=-1) > 1e-3).all()


def test_greedy_tokens_equal_transformers_by_full_forwards(case):
    """Token by token, each from a forward pass over the whole text so far."""
    rows, new = case.expected["greedy"].shape
    length = case.expected["length"].copy()
    text = np.pad(case.tokens, ((0, 0), (0, new)))
    for _ in range(new):
        out = logits(case.model, text)
        text[np.arange(rows), length] = out[np.arange(rows), length - 1].argmax(-1)
        length += 1
    ours = [row[n - new : n] for row, n in zip(text, length, strict=True)]
    np.testing.assert_array_equal(ours, case.expected["greedy"])


def decoded(model, case):
    """The logits of the answers, token by token, and by a forward pass over each whole text."""
    greedy, length = case.expected["greedy"], case.expected["length"]
    S, T, G = case.tokens.shape[1], greedy.shape[1], 2
    tokens, mask = jnp.array(case.left_tokens), jnp.array(case.left_mask)
    _, cache = nnx.jit(lambda model, *args: model.prefill(*args)[:2])(model, tokens, mask)
    rows = jnp.repeat(jnp.arange(len(length), dtype=jnp.int32), G)
    cache = jax.tree.map(lambda x: fit(x, rows, S + T), cache)
    answers = np.repeat(greedy, G, axis=0)
    answers[1::G] = answers[1::G, ::-1]  # the group's second member says something else
    live = np.repeat(np.pad(case.left_mask, ((0, 0), (0, T))), G, axis=0)
    decode = nnx.jit(
        lambda model, token, cache, slot, position, live: model.decode(
            token, cache, slot=slot, position=position, live=live
        )[:2]
    )
    steps = []
    for t in range(T):
        live[:, S + t] = True
        position = jnp.array(np.repeat(length, G) + t)
        token = jnp.array(answers[:, t])
        hidden, cache = decode(model, token, cache, jnp.int32(S + t), position, jnp.array(live))
        steps.append(np.asarray(head_logits(hidden, model.unembed())))
    found = []
    for member in range(G):
        rows = slice(member, None, G)
        text = np.concatenate([case.left_tokens, answers[rows]], axis=1)
        found.append((np.stack(steps, axis=1)[rows], logits(case.model, text, live[rows])[:, S:]))
    return found


def test_cached_decoding_equals_the_full_forward(case):
    """Prefill of left-padded prompts, shared by groups of 2, then token by token: by the network
    as it is, and with what multiplies the same rows joined, as for a sampler."""
    plain, together = decoded(case.model, case), decoded(joined(nnx.clone(case.model)), case)
    for (answer, full), (other, _) in zip(plain, together, strict=True):
        np.testing.assert_allclose(answer, full, atol=1e-4, rtol=0)
        # Wider matrices are multiplied in other blocks: the last bits may differ, no token does.
        np.testing.assert_allclose(other, answer, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(other.argmax(-1), answer.argmax(-1))


def with_windows(model, window, layers):
    """The same weights under another config."""
    config = dataclasses.replace(model.config, sliding_window=window, window_layers=layers)
    other = nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(other)[0], nnx.state(model, nnx.Param))


def test_windows_bound_how_far_a_token_reaches():
    """Two layers that look back on 2 tokens each: 4 positions further, and no more."""
    model = with_windows(load_model(FIXTURES[0]), 3, (0, 1))
    tokens = np.arange(20, 38)[None].astype(np.int32)
    changed = tokens.copy()
    changed[0, 5] += 1
    before, after = (logits(model, t)[0] for t in (tokens, changed))
    difference = np.abs(after - before).max(axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(difference), [5, 6, 7, 8, 9])
    assert difference[5:10].min() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_window_as_long_as_the_text_changes_nothing_and_a_shorter_one_does(side):
    model = load_model(FIXTURES[0])
    tokens, real = np.arange(20, 44)[None].astype(np.int32), np.zeros((1, 24), bool)
    real[:, slice(0, 12) if side == "right" else slice(12, 24)] = True
    plain = logits(model, tokens, real)
    enough, short = (logits(with_windows(model, w, (1,)), tokens, real) for w in (12, 11))
    np.testing.assert_array_equal(enough[real], plain[real])
    differs = np.abs(short - plain)[real].max(axis=-1) > 1e-4
    np.testing.assert_array_equal(differs, [False] * 11 + [True])


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_untied",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("qwen2_untied", "qwen2_windows")),
    ],
)
def test_every_parameter_has_a_gradient_and_rematerialised_layers_give_the_same(name):
    """A gradient that is zero for a whole parameter would mean that it is not used."""
    graphdef, params = nnx.split(load_model(FIXTURES[0].parent / name))
    tokens = np.arange(20, 32)[None]
    direction = jnp.sin(jnp.arange(12 * 96, dtype=jnp.float32)).reshape(1, 12, 96)

    @jax.jit
    def gradients(params):
        def loss(params, remat):
            model = nnx.merge(graphdef, params)
            hidden = model(jnp.array(tokens), remat=remat)
            return jnp.sum(direction * head_logits(hidden, model.unembed()))

        return [jax.grad(loss)(params, remat) for remat in ("none", "dots", "full")]

    plain, *recomputed = gradients(params)
    for path, gradient in nnx.to_flat_state(plain):
        assert np.abs(gradient[...]).max() > 1e-3, path
    for other in recomputed:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_tied_models_unembed_with_the_embedding_itself():
    """No copy: a change of the embedding is a change of the head."""
    model = load_model(FIXTURES[0])
    assert model.config.tie_word_embeddings and not hasattr(model, "head")
    model.embed[...] = model.embed[...] + 1
    np.testing.assert_array_equal(model.unembed(), model.embed[...].T)


def test_half_precision_parameters_compute_in_half_precision_and_end_in_float32():
    model = load_model(FIXTURES[0], dtype="bfloat16")
    tokens = jnp.arange(6)[None]
    assert nnx.eval_shape(lambda model: model(tokens), model).dtype == jnp.bfloat16
    assert nnx.eval_shape(lambda model: model.logits(tokens), model).dtype == jnp.float32


def test_a_new_model_is_random_by_its_seed():
    config = QwenConfig(
        family="qwen3",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        qkv_bias=False,
        qk_norm=True,
    )
    new = nnx.jit(lambda key: Qwen(config, rngs=nnx.Rngs(key)))
    first, same, other = (nnx.state(new(jax.random.key(seed)), nnx.Param) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.array_equal(first["head"][...], other["head"][...])
    assert not np.array_equal(first["layers"][0]["q"][...], first["layers"][1]["q"][...])
