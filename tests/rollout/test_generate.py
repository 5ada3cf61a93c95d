"""The sampler draws from the model's own distribution, whatever the batch looks like."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import Completions, TrainBatch
from gspo_jax.files import stopping
from gspo_jax.files.stopping import Abandoned, Stop
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.cache import fit
from gspo_jax.rollout import engine as generate_module
from gspo_jax.rollout import schedule as schedule_module
from gspo_jax.rollout.engine import generate
from gspo_jax.rollout.sampling import Sampling, at_position, keep_likely, row_keys, sample
from gspo_jax.rollout.schedule import Program as P
from gspo_jax.rollout.schedule import bucket, programs_for, schedule
from gspo_jax.update.objective import Objective, forward

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
    batch = TrainBatch(
        tokens, lengths, got.mask.sum(1, dtype=np.int32), got.mask, np.ones(6, np.float32)
    )
    objective = Objective(loss=LOSSES["gspo"], temperature=temperature)
    found = jax.jit(forward, static_argnums=(0, 3))(
        graphdef, params, jax.tree.map(jnp.asarray, batch), objective
    )[1]
    assert 6 < got.mask.sum() < 48  # some rows stopped, some went on
    np.testing.assert_allclose(got.logp[got.mask], np.asarray(found.logp)[got.mask], atol=1e-4)


def test_a_token_is_the_draw_of_its_rows_key_at_its_position(tiny):
    """From the logits of the whole, uncached text: `sample` with fold_in(row's key, t)."""
    how = {"max_new_tokens": 5, "temperature": 0.7, "eos_ids": NO_EOS, "key": KEY}
    got = generate(tiny, PROMPTS, group_size=2, first_prompt=4, **how).tokens
    texts = np.zeros((6, 16), np.int32)
    start = np.repeat([len(p) for p in PROMPTS], 2)
    for row in range(6):
        text = [*PROMPTS[row // 2], *got[row]]
        texts[row, : len(text)] = text
    logits = np.asarray(jax.jit(lambda t: tiny.logits(t))(texts))
    keys = row_keys(KEY, np.arange(6, dtype=np.int32) // 2 + 4, np.arange(6, dtype=np.int32) % 2)
    for t in range(5):
        z = jnp.asarray(logits[np.arange(6), start - 1 + t])
        token, _ = sample(z, at_position(keys, jnp.int32(t)), Sampling(0.7))
        np.testing.assert_array_equal(token, got[:, t])


def test_experts_of_a_row_are_its_prompts_and_then_those_that_drew_its_tokens():
    """Prompts of 2 and 3 tokens with 2 responses each, of 1, 3, 2 and 0 tokens; -1 from then on.

    What draws the first token is run at the prompt's last one: 20 takes the place of 2.
    """
    asked = np.array([[0, 1, 2], [3, 4, 5]], np.int16)[..., None, None]
    drawn = np.array([[20, 21, 22], [30, 31, 32], [40, 41, 42], [50, 51, 52]], np.int16)
    mask = np.arange(3)[None] < np.array([1, 3, 2, 0])[:, None]
    seen = np.array([[0, 1, 1], [1, 1, 1]], bool)
    routing = generate_module._routing(asked, seen, drawn[..., None, None], mask)
    assert routing[..., 0, 0].tolist() == [
        [1, 20, -1, -1, -1, -1],
        [1, 30, 31, 32, -1, -1],
        [3, 4, 40, 41, -1, -1],
        [3, 4, 5, -1, -1, -1],
    ]


@pytest.mark.long
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


@pytest.fixture
def decoded(monkeypatch):
    """The caches that `_decode` is called with, as (batch, slots, steps) and shard shape."""
    calls, decode = [], generate_module._decode

    def watched(graphdef, params, cache, *rest, **options):
        k = cache[-1].k
        program = P(k.shape[0], k.shape[2], options["steps"])
        calls.append((program, k.addressable_shards[0].data.shape))
        return decode(graphdef, params, cache, *rest, **options)

    monkeypatch.setattr(generate_module, "_decode", watched)
    return calls


LONG = {"group_size": 16, "max_new_tokens": 61, "key": KEY}
SOME_EOS = [1, 2, 3]  # of 64 tokens: rows end after 22 on average, some at 2, some never


@pytest.fixture(scope="module")
def undivided(tiny):
    """48 rows in one batch, one cache and one chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "BATCHES", 1)
        return generate(tiny, PROMPTS, eos_ids=SOME_EOS, chunk=64, **LONG)


def assert_same_samples(got, want):
    np.testing.assert_array_equal(got.mask, want.mask)
    np.testing.assert_array_equal(got.truncated, want.truncated)
    np.testing.assert_array_equal(got.tokens[got.mask], want.tokens[want.mask])
    np.testing.assert_allclose(got.logp[got.mask], want.logp[want.mask], atol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "shortest_growth"),
    [(1, 128), *(pytest.param(chunk, 8, marks=pytest.mark.long) for chunk in (3, 8))],
)
def test_samples_do_not_depend_on_chunks_halving_or_the_length_of_the_cache(
    tiny, undivided, decoded, monkeypatch, chunk, shortest_growth
):
    monkeypatch.setattr(schedule_module, "SHORTEST_GROWTH", shortest_growth)
    got = generate(tiny, PROMPTS, eos_ids=SOME_EOS, chunk=chunk, **LONG)
    assert_same_samples(got, undivided)
    lengths = undivided.mask.sum(1)
    assert lengths.min() == 2 and undivided.truncated.any()
    programs = [program for program, _ in decoded]
    assert {p.batch for p in programs} == {48, 24, 12}
    assert len({p.slots for p in programs}) == (1 if shortest_growth == 128 else 8)
    assert set(programs) <= set(programs_for(48, 16, 61, chunk=chunk))


def batches_for(lengths, sizes, chunks):
    """Chunks of 4 steps, each in the smallest size for those alive one whole chunk before it."""
    found = [sizes[0]]
    for n in range(1, chunks):
        alive = int((lengths > 1 + 4 * (n - 1)).sum())
        fits = min(size for size in sizes if size >= alive)
        # The last 16 steps never begin a new size.
        found.append(fits if (chunks - n) * 4 >= 16 else found[-1])
    return found


def test_rows_are_left_out_one_chunk_after_half_of_them_have_ended(tiny, undivided, decoded):
    generate(tiny, PROMPTS, eos_ids=SOME_EOS, chunk=4, **LONG)
    wanted = batches_for(undivided.mask.sum(1), (48, 24, 12), 15)
    assert [program.batch for program, _ in decoded] == wanted
    assert set(wanted) == {48, 24, 12}


@pytest.mark.long
def test_a_mesh_splits_every_batch_evenly_and_samples_the_same(tiny, undivided, decoded, caplog):
    """33 rows on 8 devices: 40 with fillers, then 24, 16 and 8, each compiled once."""
    options = LONG | {"group_size": 11}
    with jax.set_mesh(make_mesh(data=2, fsdp=4)), jax.log_compiles():
        got = generate(tiny, PROMPTS, eos_ids=SOME_EOS, chunk=4, **options)
    rows = [row for row in range(48) if row % 16 < 11]
    assert_same_samples(got, Completions(*(field[rows] for field in undivided[:4])))
    wanted = batches_for(got.mask.sum(1), (40, 24, 16, 8), 15)
    assert [program.batch for program, _ in decoded] == wanted
    assert all(shard[0] == p.batch // 8 for p, shard in decoded)
    assert len(re.findall(r"Compiling .*_decode", caplog.text)) == len(set(wanted)) >= 3


@pytest.mark.long
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


def test_decoding_stops_one_chunk_after_the_last_row_has(tiny, decoded):
    """The next chunk is on its way before the host looks: the device never waits."""

    def chunks(eos):
        decoded.clear()
        got = generate(tiny, PROMPTS, max_new_tokens=33, eos_ids=eos, key=KEY, chunk=4)
        return got, len(decoded)

    got, count = chunks(list(range(64)))  # any token ends a row
    assert count == 1 and got.mask.sum(1).tolist() == [1, 1, 1]
    free, count = chunks(NO_EOS)
    assert count == 8  # 32 further tokens in chunks of 4
    eos = free.tokens[:, 2].tolist()  # all rows end at token 2 or before: in the first chunk
    got, count = chunks(eos)
    assert count == 2 and got.mask.sum(1).max() <= 3 and not got.truncated.any()


def test_a_wish_to_stop_is_heard_between_two_chunks(tiny, decoded, monkeypatch):
    stop = Stop()
    monkeypatch.setattr(stopping, "_listening", [stop])
    counted = generate_module._decode

    def asked_for_in_the_second(*arguments, **options):
        if len(decoded) == 1:
            stop.ask("preempted")
        return counted(*arguments, **options)

    monkeypatch.setattr(generate_module, "_decode", asked_for_in_the_second)
    with pytest.raises(Abandoned):
        generate(tiny, PROMPTS, max_new_tokens=40, eos_ids=NO_EOS, key=KEY, chunk=4)
    assert len(decoded) == 2


def test_each_prompt_is_run_once_for_its_whole_group(tiny, monkeypatch):
    shapes = []
    prefill = generate_module._prefill
    monkeypatch.setattr(
        generate_module,
        "_prefill",
        lambda g, p, t, *rest: shapes.append(t.shape) or prefill(g, p, t, *rest),
    )
    generate(tiny, PROMPTS, group_size=8, max_new_tokens=2, eos_ids=NO_EOS, key=KEY)
    assert shapes == [(3, 16)]


def test_the_cache_is_written_in_place(tiny_view):
    """XLA's own account: decoding reuses the donated cache and copies no layer of it."""
    graphdef, params = tiny_view
    keys = jax.random.split(KEY, 64)
    tokens, mask = jnp.ones((64, 64), jnp.int32), jnp.ones((64, 64), bool)
    _, cache, _ = generate_module._prefill(graphdef, params, tokens, mask, False)
    rows = generate_module.Rows(tokens[:, 0], tokens[:, 0], keys)
    lowered = generate_module._decode.lower(
        graphdef,
        params,
        cache,
        rows,
        jnp.int32(40),
        jnp.int32(1),
        sampling=Sampling(),
        steps=16,
        record_routing=False,
    )
    memory = lowered.compile().memory_analysis()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


def test_fit_takes_rows_and_adds_empty_slots():
    x = jnp.arange(24.0).reshape(3, 2, 2, 2)
    got = fit(x, jnp.asarray([2, 0]), 5)
    np.testing.assert_array_equal(got[:, :, :2], np.asarray(x)[[2, 0]])
    np.testing.assert_array_equal(got[:, :, 2:], np.zeros((2, 2, 3, 2)))
    np.testing.assert_array_equal(fit(x, None, 2), x)


def test_a_cache_is_moved_buffer_by_buffer(tiny_view):
    ones = jnp.ones((3, 16), jnp.int32)
    _, cache, _ = generate_module._prefill(*tiny_view, ones, ones.astype(bool), False)
    moved = generate_module._refit(cache, np.asarray([0, 0, 1, 1]), 20)
    assert moved[1].v.shape == (4, 2, 20, 8)
    assert all(x.is_deleted() for x in jax.tree.leaves(cache))


def test_programs_follow_from_shapes_alone():
    # 63 tokens after the first in chunks of 4; one length of cache, since less than 128.
    assert programs_for(64, 32, 64) == [P(b, 96, 4) for b in (64, 32, 16, 8)]
    # 1023 in chunks of 32 = 256 + 1024 slots, in portions of 1024 / 8; the first chunk is whole.
    lengths = range(256 + 128, 256 + 1024 + 1, 128)
    listed = programs_for(512, 256, 1024)
    assert listed == [P(b, w, 32) for b in (512, 256, 128, 64, 32) for w in lengths]
    assert programs_for(5, 16, 300) == [P(5, w, 18) for w in (16 + 128, 16 + 256, 16 + 306)]
    assert programs_for(64, 16, 1) == []
    assert programs_for(64, 16, 2) == [P(64, 17, 1)]


@pytest.mark.parametrize("rows", [1, 9, 43, 100, 1000])
@pytest.mark.parametrize("ways", [1, 2, 8])
@pytest.mark.parametrize("limit", [2, 17, 100, 1000, 5000])
def test_a_schedule_holds_all_rows_and_all_tokens_in_few_sizes(rows, ways, limit):
    s = schedule(rows, 48, limit, ways=ways)
    assert s.batches[0] >= rows and all(b % ways == 0 for b in s.batches)
    assert all(small < large for large, small in zip(s.batches, s.batches[1:], strict=False))
    assert len(s.batches) <= 5 and len(set(s.slots)) <= 9
    assert 1 + len(s.slots) * s.steps >= limit  # all tokens, the first included ...
    assert (len(s.slots) - 1) * s.steps < limit - 1  # ... without a chunk too many
    for n, slots in enumerate(s.slots):
        assert slots >= 48 + (n + 1) * s.steps  # the last write of chunk n lies inside
        assert slots >= s.slots[n - 1] or n == 0


def test_a_batch_is_the_smallest_that_holds_the_living_while_it_is_worth_a_compilation():
    """60 steps in chunks of 4: from chunk 11 on there are fewer than 16, and sizes stay."""
    s = schedule(48, 16, 61, chunk=4)
    assert s.batches == (48, 24, 12)
    assert [s.batch(0, 48, alive) for alive in (48, 25, 24, 13, 12, 0)] == [48, 48, 24, 24, 12, 12]
    assert (s.batch(11, 48, 5), s.batch(12, 48, 5)) == (12, 48)


def test_every_token_of_every_row_has_a_key_of_its_own():
    """fold_in(fold_in(fold_in(key, prompt), sample), position), as `sampling` says."""
    prompt, number = np.repeat([3, 4], 2).astype(np.int32), np.array([0, 1, 0, 1], np.int32)
    rows = row_keys(KEY, prompt, number)
    drawn = np.stack([jax.random.key_data(at_position(rows, jnp.int32(t))) for t in range(3)])
    for t, row in np.ndindex(3, 4):
        want = jax.random.fold_in(jax.random.fold_in(KEY, prompt[row]), number[row])
        want = jax.random.key_data(jax.random.fold_in(want, t))
        np.testing.assert_array_equal(drawn[t, row], want)
    assert len(np.unique(drawn.reshape(12, -1), axis=0)) == 12


def test_a_nucleus_that_one_token_reaches_exactly_is_that_token():
    z = jnp.zeros((1, 4)).at[0, 2].set(1.0)
    p = float(jax.nn.softmax(z)[0, 2])
    kept = np.isfinite(np.asarray(keep_likely(z, p, 0)))
    assert kept.tolist() == [[False, False, True, False]]


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


def test_a_draw_is_the_gumbel_argmax_with_its_log_probability():
    """argmax(p / -log u) = argmax(z - log(-log u)), where u are the keys' own uniforms."""
    z = 3 * jax.random.normal(jax.random.key(5), (50, 30))
    keys = jax.random.split(KEY, 50)
    token, logp = sample(z, keys, Sampling(temperature=0.5))
    tiny = np.finfo(np.float32).tiny
    u = np.stack([jax.random.uniform(k, (30,), minval=tiny) for k in keys]).astype(np.float64)
    np.testing.assert_array_equal(token, np.argmax(z / 0.5 - np.log(-np.log(u)), axis=1))
    want = jax.nn.log_softmax(z / 0.5)[jnp.arange(50), token]
    np.testing.assert_allclose(logp, want, atol=1e-5)


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
