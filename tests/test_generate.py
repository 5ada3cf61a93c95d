"""The sampler draws from the model's own distribution, whatever the batch looks like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspo_jax import generate as generate_module
from gspo_jax.batch import TrainBatch
from gspo_jax.generate import Sampling, bucket, generate, keep_likely, sample
from gspo_jax.losses import LOSSES
from gspo_jax.update import Objective, forward_logps

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9]]
NO_EOS = [999]  # an id beyond the vocabulary: rows run to the limit
KEY = jax.random.key(0)


def greedy_by_full_forward(model, prompt, steps):
    """Argmax of the whole, uncached forward pass over right-padded rows, one token at a time."""
    logits = jax.jit(lambda tokens: model.logits(tokens)[0])
    tokens = list(prompt)
    for _ in range(steps):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(jnp.asarray(row))[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_equals_the_uncached_forward_for_prompts_of_unequal_length(tiny):
    got = generate(tiny, PROMPTS, max_new_tokens=6, temperature=0.0, eos_ids=NO_EOS, key=KEY)
    for row, prompt in zip(got.tokens, PROMPTS, strict=True):
        assert row.tolist() == greedy_by_full_forward(tiny, prompt, 6)
    assert got.truncated.all() and got.mask.all()


def test_log_probabilities_equal_those_of_the_training_program(tiny_view):
    graphdef, params = tiny_view
    temperature = 0.7
    got = generate(
        tiny_view,
        PROMPTS,
        group_size=2,
        max_new_tokens=8,
        temperature=temperature,
        eos_ids=[1, 2, 3, 4],
        key=KEY,
    )
    lengths = np.repeat([len(p) for p in PROMPTS], 2).astype(np.int32)
    tokens = np.zeros((6, 16), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = PROMPTS[row // 2]
        tokens[row, length : length + 8] = got.tokens[row]
    batch = TrainBatch(tokens, lengths, got.mask, np.ones(6, np.float32))
    objective = Objective(loss=LOSSES["gspo"], temperature=temperature)
    score = jax.jit(forward_logps, static_argnums=(0, 3))
    logp, _ = score(graphdef, params, jax.tree.map(jnp.asarray, batch), objective)
    assert 6 < got.mask.sum() < 48  # some rows stopped, some went on
    np.testing.assert_allclose(got.logp[got.mask], np.asarray(logp)[got.mask], atol=1e-4)


def test_sampled_frequencies_match_the_distribution_of_first_and_second_token(tiny):
    """χ² against the exact probabilities, pooling tokens expected less than 10 times.

    Its 99.9 % quantile for d degrees of freedom is about d + 3.09 sqrt(2d) + 5.7; the key is
    fixed, so this cannot flake.
    """
    draws = 4000
    got = generate(
        tiny, [PROMPTS[0]], group_size=draws, max_new_tokens=2, eos_ids=NO_EOS, key=KEY
    ).tokens

    def check(tokens, logits):
        expected = np.asarray(jax.nn.softmax(logits)) * len(tokens)
        counts = np.bincount(tokens, minlength=len(expected))
        common = expected >= 10
        observed, wanted = counts[common], expected[common]
        if not common.all():
            observed = np.append(observed, counts[~common].sum())
            wanted = np.append(wanted, expected[~common].sum())
        freedom = len(wanted) - 1
        chi2 = ((observed - wanted) ** 2 / wanted).sum()
        assert freedom >= 4
        assert chi2 < freedom + 3.09 * np.sqrt(2 * freedom) + 5.7

    check(got[:, 0], tiny.logits(jnp.asarray([PROMPTS[0]]))[0, -1])
    first = np.bincount(got[:, 0]).argmax()  # the second token, given the commonest first
    after = tiny.logits(jnp.asarray([[*PROMPTS[0], int(first)]]))[0, -1]
    check(got[got[:, 0] == first, 1], after)


def test_rows_of_a_group_differ_from_the_first_token_on(tiny):
    """A shared prefill must not share its first draw."""
    first = generate(
        tiny, PROMPTS, group_size=16, max_new_tokens=1, eos_ids=NO_EOS, key=KEY
    ).tokens[:, 0]
    for group in first.reshape(3, 16):
        assert len(set(group.tolist())) > 3


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_samples_do_not_depend_on_chunk_length(tiny, chunk):
    def run(chunk):
        return generate(
            tiny, PROMPTS, group_size=2, max_new_tokens=9, eos_ids=[1, 2], key=KEY, chunk=chunk
        )

    want, got = run(16), run(chunk)
    np.testing.assert_array_equal(got.mask, want.mask)
    np.testing.assert_array_equal(got.tokens[got.mask], want.tokens[want.mask])


def test_samples_do_not_depend_on_the_other_prompts_of_the_batch(tiny):
    options = {"group_size": 3, "max_new_tokens": 7, "eos_ids": [1, 2], "key": KEY}
    whole = generate(tiny, PROMPTS, **options)
    alone = generate(tiny, PROMPTS[1:2], first_prompt=1, **options)
    np.testing.assert_array_equal(alone.tokens[alone.mask], whole.tokens[3:6][whole.mask[3:6]])


def test_eos_is_kept_and_closes_the_mask_whichever_of_several_it_is(tiny):
    free = generate(tiny, PROMPTS, group_size=4, max_new_tokens=12, eos_ids=NO_EOS, key=KEY)
    eos = sorted({int(free.tokens[0, 3]), int(free.tokens[5, 6])})
    got = generate(tiny, PROMPTS, group_size=4, max_new_tokens=12, eos_ids=eos, key=KEY)
    for row in range(12):
        ends = [t for t, token in enumerate(free.tokens[row].tolist()) if token in eos]
        length = ends[0] + 1 if ends else 12
        assert got.mask[row].tolist() == [True] * length + [False] * (12 - length)
        assert got.tokens[row, :length].tolist() == free.tokens[row, :length].tolist()
        assert got.truncated[row] == (not ends)
    assert got.truncated.any() and not got.truncated.all()


def test_decoding_stops_when_every_row_has(tiny, monkeypatch):
    calls = []
    decode = generate_module._decode
    monkeypatch.setattr(generate_module, "_decode", lambda *a: calls.append(a) or decode(*a))
    everything = list(range(64))  # any token ends a row: one token each, and no decoding at all
    got = generate(tiny, PROMPTS, max_new_tokens=33, eos_ids=everything, key=KEY, chunk=4)
    assert not calls and got.mask.sum(1).tolist() == [1, 1, 1]
    generate(tiny, PROMPTS, max_new_tokens=33, eos_ids=NO_EOS, key=KEY, chunk=4)
    assert len(calls) == 8  # 32 further tokens in chunks of 4


def test_each_prompt_is_run_once_for_its_whole_group(tiny, monkeypatch):
    shapes = []
    prefill = generate_module._prefill
    monkeypatch.setattr(
        generate_module,
        "_prefill",
        lambda g, p, t, m: shapes.append(t.shape) or prefill(g, p, t, m),
    )
    generate(tiny, PROMPTS, group_size=8, max_new_tokens=2, eos_ids=NO_EOS, key=KEY)
    assert shapes == [(3, 16)]


def test_the_cache_is_written_in_place(tiny_view):
    """XLA's own account: decoding reuses the donated state and copies no layer's cache."""
    graphdef, params = tiny_view
    keys = generate_module._row_keys(KEY, jnp.arange(16, dtype=jnp.int32), 4)
    eos = jnp.asarray([1], jnp.int32)
    mask = jnp.ones((16, 32), bool)
    last, cache = generate_module._prefill(graphdef, params, jnp.ones((16, 32), jnp.int32), mask)
    state = generate_module._share(last, cache, mask, keys, eos, 4, 17, Sampling())
    start = jnp.full((64,), 32, jnp.int32)
    lowered = generate_module._decode.lower(
        graphdef, params, state, start, keys, eos, 16, Sampling()
    )
    memory = lowered.compile().memory_analysis()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes


@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (0.9, 0), (1.0, 3), (0.7, 5), (1e-6, 0)])
def test_nucleus_and_top_k_keep_the_sets_that_a_sort_finds(top_p, top_k):
    z = np.asarray(jax.random.normal(jax.random.key(3), (6, 40))) * 2
    kept = np.isfinite(np.asarray(keep_likely(jnp.asarray(z), top_p, top_k)))
    for row in range(6):
        ranked = np.argsort(-z[row])
        if top_k:
            ranked = ranked[:top_k]
        p = np.exp(z[row, ranked] - z[row].max())
        mass = np.cumsum(p / p.sum())
        count = int((mass < top_p).sum()) + 1  # the smallest set that reaches top_p
        assert set(np.flatnonzero(kept[row])) == set(ranked[:count].tolist())


def test_top_k_restricts_draws_but_not_their_log_probability():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.2]]))
    keys = jax.random.split(KEY, 200)
    draw = jax.vmap(lambda k: sample(logits, k[None], Sampling(1.0, 1.0, 2)))
    token, logp = draw(keys)
    assert set(np.unique(token).tolist()) == {0, 1}
    wanted = np.log([0.5, 0.3])[np.asarray(token)[:, 0]]  # of the full vocabulary
    np.testing.assert_allclose(np.asarray(logp)[:, 0], wanted, rtol=1e-5)


def test_temperature_sharpens_the_draws():
    """At temperature 0.5 odds are squared: 0.6 : 0.4 becomes 0.692 : 0.308."""
    logits = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.4]])), (4000, 1))
    token, logp = sample(logits, jax.random.split(KEY, 4000), Sampling(0.5, 1.0, 0))
    share = float(jnp.mean(token == 0))
    assert abs(share - 0.36 / 0.52) < 3.3 * np.sqrt(0.692 * 0.308 / 4000)
    np.testing.assert_allclose(np.exp(float(logp[token == 0][0])), 0.36 / 0.52, rtol=1e-5)


def test_a_pure_view_and_its_module_sample_alike(tiny):
    options = {"max_new_tokens": 4, "eos_ids": NO_EOS, "key": KEY}
    np.testing.assert_array_equal(
        generate(tiny, PROMPTS, **options).tokens,
        generate(nnx.split(tiny), PROMPTS, **options).tokens,
    )


@pytest.mark.parametrize(
    ("length", "want"),
    [(1, 16), (16, 16), (17, 32), (46, 48), (128, 128), (129, 144), (250, 256), (1025, 1152)],
)
def test_lengths_are_rounded_to_few_shapes_with_little_padding(length, want):
    assert bucket(length) == want
