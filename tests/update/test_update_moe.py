"""Updates of a mixture of experts: what is replayed, what is measured, what is added."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from update_cases import IDENTITY, optimizer_of, programs_of

from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import Problem, Rollout, TrainBatch
from gspo_jax.models import Qwen, QwenConfig
from gspo_jax.models.moe import balance
from gspo_jax.rollout.dynamic_sampling import join_groups
from gspo_jax.rollout.engine import generate
from gspo_jax.rollout.train_rows import to_train_batch
from gspo_jax.update.objective import Gradients, Objective, real_tokens
from gspo_jax.update.optim import global_norm
from gspo_jax.update.state import init_state
from gspo_jax.update.steps import Progress, continue_updates, old_logps, summarise

B, S, T, E, X = 4, 12, 6, 6, 2
GSPO = partial(LOSSES["gspo"], clip_low=0.1, clip_high=0.1)
CONFIG = QwenConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_experts": E,
        "num_experts_per_tok": X,
        "norm_topk_prob": True,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
)


@pytest.fixture(scope="module")
def view():
    model = Qwen(CONFIG, rngs=nnx.Rngs(0))
    for x in (model.embed, *(layer.moe.router for layer in model.layers)):
        x[...] = x[...] * 10
    for layer in model.layers:
        for x in (layer.moe.gate, layer.moe.up, layer.moe.down):
            x[...] = x[...] * 20
    return nnx.split(model)


def make_batch(poison=0):
    rng = np.random.default_rng(0)
    prompt, response = np.array([3, 5, 2, 6], np.int32), np.array([6, 1, 4, 5], np.int32)
    tokens = np.full((B, S), poison, np.int32)
    for row in range(B):
        used = prompt[row] + response[row]
        tokens[row, :used] = rng.integers(1, 64, used)
    mask = np.arange(T)[None] < response[:, None]
    return TrainBatch(tokens, prompt, response, mask, np.array([1.0, -2.0, 0.5, -0.3], np.float32))


def fresh(view, learning_rate=1e-2):
    graphdef, params = view
    optimizer = optimizer_of(learning_rate, "float32")
    return graphdef, optimizer, init_state(jax.tree.map(jnp.copy, params), optimizer)


def accumulate(graphdef, params, batch, old, objective):
    programs = programs_of(graphdef, IDENTITY, objective)
    return programs.accumulate(Gradients(params), batch, old)[0]


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def run(view, replay, *, minibatches=2, epochs=1, learning_rate=1e-2, routing=None):
    graphdef, optimizer, state = fresh(view, learning_rate)
    programs = programs_of(graphdef, optimizer, Objective(GSPO, routing_replay=replay))
    batch = make_batch()._replace(routing=routing)
    progress = Progress(batch)
    state, done = continue_updates(
        programs, state, progress, minibatches=minibatches, epochs=epochs
    )
    return state, done.stats, old_logps(done)


def recorded(view):
    """What the routers choose for the whole batch under the weights that sampled it."""
    graphdef, optimizer, state = fresh(view)
    programs = programs_of(graphdef, optimizer, Objective(GSPO))
    return np.asarray(programs.logps(state.params, on_device(make_batch())).experts)


@pytest.mark.long
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_at_unchanged_weights_replay_is_the_identity_bit_for_bit(view, replay):
    """A learning rate of 0: two minibatches of two epochs on the very same weights."""
    routing = recorded(view) if replay == "R3" else None
    plain = run(view, "off", epochs=2, learning_rate=0.0)
    ours = run(view, replay, epochs=2, learning_rate=0.0, routing=routing)
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(ours[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(plain[2], ours[2])
    for one, other in zip(plain[1], ours[1], strict=True):
        assert all(one[name] == other[name] for name in one)
    assert all(float(m["ratio_max"].value) == 1.0 for m in ours[1])
    assert summarise(ours[1])["router/changed"] == 0


@pytest.mark.long
def test_after_an_update_routers_choose_other_experts_and_replay_keeps_the_old(view):
    plain, replayed = run(view, "off"), run(view, "R2")
    moved = [summarise(stats)["router/changed"] for _, stats, _ in (plain, replayed)]
    assert min(moved) > 0.02  # of the expert choices of the second minibatch
    assert "router/changed" not in plain[1][0]  # the first minibatch is where they are recorded
    # The first update is the same; the second runs on other experts.
    assert float(plain[1][0]["loss"].value) == float(replayed[1][0]["loss"].value)
    assert float(plain[1][1]["ratio_mean"].value) != float(replayed[1][1]["ratio_mean"].value)


@pytest.mark.long
def test_with_replay_the_second_update_is_that_of_the_recorded_experts(view):
    """By hand: the second minibatch's gradient with the ids that its old policy chose."""
    graphdef, _, start = fresh(view)
    ids = recorded(view)[2:]
    _, stats, old_logp = run(view, "R2")
    after_one, *_ = programs_of(*fresh(view)[:2], Objective(GSPO)).update(
        start, on_device(jax.tree.map(lambda x: x[:2], make_batch()))
    )
    second = on_device(jax.tree.map(lambda x: x[2:], make_batch()))._replace(routing=ids)
    grads, _ = accumulate(
        graphdef,
        after_one.params,
        second,
        jnp.asarray(old_logp[2:]),
        Objective(GSPO, routing_replay="R2"),
    )
    np.testing.assert_allclose(global_norm(grads.policy), stats[1]["grad_norm"].value, rtol=1e-5)


@pytest.mark.long
def test_r3_replays_what_the_sampler_chose_from_the_first_minibatch_on(view):
    ids = recorded(view)
    other = ((ids + 1) % E).astype(np.int16)
    other[0] = -1  # a row that the sampler did not record
    _, stats, _ = run(view, "R3", learning_rate=0.0, routing=other)
    # Row 0 is not known; in the others both ids moved up by one: {a, b} -> {a + 1, b + 1}.
    real = np.asarray(real_tokens(on_device(make_batch())))
    kept = (ids[..., None] == other[..., None, :]).any(-1).mean(-1)
    for part, found in ((slice(0, 2), stats[0]), (slice(2, 4), stats[1])):
        known = real[part] & (other[part][:, :, 0, 0] >= 0)
        np.testing.assert_allclose(
            found["router/changed"].value, 1 - kept[part][known].mean(), rtol=0.2
        )  # deeper layers see other inputs, and may choose otherwise
        assert float(found["router/changed"].value) > 0.3


def test_the_routers_losses_are_added_with_their_weights(view):
    """Gradient of the total against that of policy loss, aux and z alone; microbatches of all."""
    graphdef, params = view
    batch = on_device(make_batch())

    def gradient(**coefs):
        grads, at = accumulate(graphdef, params, batch, None, Objective(GSPO, **coefs))
        return grads.policy, at

    both, at = gradient(router_aux_coef=0.7, router_z_coef=0.3)
    policy, _ = gradient()

    def router_loss(params):
        _, routing = nnx.merge(graphdef, params).routed(batch.tokens, counted=real_tokens(batch))
        aux, z, _ = balance(routing, real_tokens(batch))
        return 0.7 * aux + 0.3 * z

    expected = jax.tree.map(jnp.add, policy, jax.jit(jax.grad(router_loss))(params))
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert at.routing.experts.shape == (B, S, 2, X)


@pytest.mark.long
def test_microbatches_weigh_their_own_balance_by_their_tokens(view):
    graphdef, params = view
    batch = on_device(make_batch())

    def loss(params, rows):
        part = jax.tree.map(lambda x: x[rows], batch)
        counted = real_tokens(part)
        _, routing = nnx.merge(graphdef, params).routed(part.tokens, counted=counted)
        share = jnp.mean(counted, dtype=jnp.float32) / jnp.mean(
            real_tokens(batch), dtype=jnp.float32
        )
        return balance(routing, counted)[0] * share / 2  # of two microbatches of equal shape

    def objective(coef):
        return Objective(GSPO, microbatch_tokens=2 * S, router_aux_coef=coef)

    with_aux, without = (
        accumulate(graphdef, params, batch, None, objective(coef))[0].policy for coef in (1.0, 0.0)
    )
    # Rows have 9, 6, 6 and 11 tokens, and the longest run together.
    grads = [jax.grad(loss)(params, jnp.array(rows)) for rows in ([3, 0], [1, 2])]
    expected = jax.tree.map(lambda a, b, c: a + b + c, without, *grads)
    for a, b in zip(jax.tree.leaves(with_aux), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_padding_does_not_reach_loss_balance_or_gradient(view):
    graphdef, params = view
    objective = Objective(GSPO, router_aux_coef=1.0, router_z_coef=1.0)
    runs = [
        accumulate(graphdef, params, on_device(make_batch(poison)), None, objective)
        for poison in (0, 33)
    ]
    for a, b in zip(jax.tree.leaves(runs[0][0]), jax.tree.leaves(runs[1][0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def sampled(view):
    """Two prompts, sixteen responses each of very unequal length, with their routing."""
    return generate(
        view,
        [[5, 6, 7], [8, 9, 10, 11, 12]],
        group_size=16,
        max_new_tokens=40,
        eos_ids=range(8),  # an eighth of the vocabulary: rows end early, and leave the batch
        key=jax.random.key(0),
        record_routing=True,
    )


def rollout_of(sampled):
    """Its rows, ready for an update."""
    problems = [Problem("a", "A"), Problem("b", "B")]
    zeros = np.zeros(32, np.float32)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    return Rollout(problems, prompts, sampled, [""] * 32, {"f": zeros}, zeros)


@pytest.mark.long
def test_the_sampler_records_what_the_full_forward_would_choose(view, sampled):
    """At every token but the last of each row, in the row's own positions; -1 from there on."""
    batch = to_train_batch(rollout_of(sampled), np.ones(32, np.float32))
    lengths = sampled.mask.sum(1)
    assert lengths.min() == 1 and lengths.max() > 16  # several chunks, and rows left out
    _, routing = nnx.jit(lambda m, t: m.routed(t))(nnx.merge(*view), jnp.asarray(batch.tokens))
    known = batch.routing[:, :, 0, 0] >= 0
    np.testing.assert_array_equal(known.sum(1), batch.prompt_length + lengths - 1)
    np.testing.assert_array_equal(known, np.sort(known, axis=1)[:, ::-1])  # from the left
    np.testing.assert_array_equal(batch.routing[known], np.asarray(routing.experts)[known])


@pytest.mark.long
def test_recording_changes_no_sample(view, sampled):
    again = generate(
        view,
        [[5, 6, 7], [8, 9, 10, 11, 12]],
        group_size=16,
        max_new_tokens=40,
        eos_ids=range(8),
        key=jax.random.key(0),
    )
    assert again.routing is None
    np.testing.assert_array_equal(again.tokens[again.mask], sampled.tokens[again.mask])


@pytest.mark.long
def test_a_step_of_r3_at_the_weights_that_sampled_is_the_plain_step_bit_for_bit(view, sampled):
    batch = to_train_batch(rollout_of(sampled), np.linspace(-1, 1, 32).astype(np.float32))

    def step(replay, batch):
        graphdef, optimizer, state = fresh(view)
        programs = programs_of(graphdef, optimizer, Objective(GSPO, routing_replay=replay))
        return continue_updates(programs, state, Progress(batch), minibatches=1)

    plain, replayed = step("off", batch._replace(routing=None)), step("R3", batch)
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(replayed[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(replayed[1].stats[0]["router/changed"].value) == 0


@pytest.mark.long
def test_rounds_of_different_width_are_joined_with_their_routing(sampled):
    narrow = sampled._replace(routing=sampled.routing[:, :20])
    joined = join_groups([(rollout_of(narrow), [1]), (rollout_of(sampled), [0])])
    routing = joined.completions.routing
    assert routing.shape == (32, *sampled.routing.shape[1:])
    np.testing.assert_array_equal(routing[:16, :20], sampled.routing[16:, :20])
    assert (routing[:16, 20:] == -1).all()
    np.testing.assert_array_equal(routing[16:], sampled.routing[:16])
