"""Log-likelihoods of given texts against whole logits, and texts that stop where they are told."""

import jax
import numpy as np
import pytest
from flax import nnx

from gspo_jax.config.load import load_config, model_dir
from gspo_jax.errors import DataError
from gspo_jax.evaluation.continuations import complete, continuation_logps, stop_ids, until
from gspo_jax.models import load_model
from gspo_jax.prompt.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def logps(tiny):
    """All log-probabilities after each token of a text, in one compiled shape."""
    run = jax.jit(lambda tokens: jax.nn.log_softmax(tiny.logits(tokens)[0], axis=-1))

    def of(ids):
        padded = np.zeros((1, 48), np.int32)  # no token looks to its right
        padded[0, : len(ids)] = ids
        return np.asarray(run(padded))[: len(ids)]

    return of


def direct(logps, context, continuation):
    """log π(continuation | context), and whether each token of it is the likeliest."""
    logp = logps(context + continuation)[len(context) - 1 : -1]
    picked = logp[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logp.argmax(-1) == continuation).all())


def random_pairs(sizes):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 64, n).tolist()  # noqa: E731
    return [(draw(a), draw(b)) for a, b in sizes]


PAIRS = random_pairs([(5, 3), (1, 1), (30, 9), (2, 20), (17, 1), (1, 5), (12, 12)])


@pytest.fixture(scope="module")
def expected(logps):
    return [direct(logps, *pair) for pair in PAIRS]


@pytest.mark.parametrize("tokens", [pytest.param(64, marks=pytest.mark.long), 4096])
def test_log_likelihoods_are_those_of_the_logits_however_they_are_batched(
    tiny_view, expected, tokens
):
    found = continuation_logps(tiny_view, PAIRS, longest=64, tokens=tokens)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_what_greedy_decoding_says_is_marked_and_one_token_off_is_not(logps, tiny_view):
    context, greedy = PAIRS[0][0], []
    for _ in range(4):
        greedy.append(int(logps(context + greedy)[-1].argmax()))
    other = [*greedy[:3], (greedy[3] + 1) % 64]
    found = continuation_logps(tiny_view, [(context, greedy), (context, other)], longest=64)
    assert [is_greedy for _, is_greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_a_context_that_does_not_fit_loses_its_beginning(logps, tiny_view):
    context, continuation = PAIRS[2]  # 30 and 9 tokens; of 20 that are read, 12 are context
    (found,) = continuation_logps(tiny_view, [(context, continuation)], longest=20)
    assert found[0] == pytest.approx(direct(logps, context[-12:], continuation)[0], rel=1e-4)
    with pytest.raises(DataError, match="a continuation has 9 tokens; the model reads 8"):
        continuation_logps(tiny_view, [(context, continuation)], longest=8)


def test_text_ends_before_the_first_stop_string():
    assert until("one\ntwo. three", [".", "\n"]) == "one"
    assert until("one", ["x"]) == until("one", []) == "one"
    assert until("stop", ["stop"]) == ""


@pytest.fixture(scope="module")
def demo():
    directory = model_dir(load_config())
    return nnx.split(load_model(directory)), load_tokenizer(directory)


def test_tokens_that_hold_a_stop_string_end_a_text(demo):
    tokenizer = demo[1]
    ids = stop_ids(tokenizer, ["\n", "7"])
    assert [tokenizer.decode([i]) for i in ids] == [
        w for i in range(tokenizer.vocab_size) if set(w := tokenizer.decode([i])) & {"\n", "7"}
    ]
    assert ids and stop_ids(tokenizer, []) == []


def test_completions_are_cut_and_keep_their_order(demo):
    model, tokenizer = demo
    prompts = tokenizer.encode_prompts([f"What is {q}?" for q in ("40+85-79", "57+7-7", "9+8-7")])
    given = {"max_new_tokens": 32, "key": jax.random.key(0), "temperature": 0.0}
    whole = complete(model, tokenizer, prompts, stops=[], **given)
    # The demo model writes two steps and a box, each on a line.
    assert [text.count("\n") for text in whole] == [2, 2, 2] and "40+85" in whole[0]
    for stops in (["\n"], ["=", "never"], ["\\boxed"]):
        cut = complete(model, tokenizer, prompts, stops=stops, **given)
        assert cut == [text.split(stops[0])[0] for text in whole]
