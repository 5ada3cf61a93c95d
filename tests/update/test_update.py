"""The update: one big batch however it is split, on-policy first, and never a NaN in the state."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from flax import nnx
from update_cases import IDENTITY, optimizer_of, programs_of

from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import TrainBatch
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.qwen import Qwen
from gspo_jax.update import objective as objective_module
from gspo_jax.update.objective import Gradients, Objective
from gspo_jax.update.optim import let_pass, make_optimizer, make_schedule, schedule_count
from gspo_jax.update.programs import Programs, apply_guarded, make_programs, microbatches
from gspo_jax.update.state import init_state
from gspo_jax.update.steps import Progress, continue_updates, old_logps, summarise

B, S, T = 8, 20, 10
# Compiled whole: op by op, each would be hundreds of tiny compilations.
forward = jax.jit(objective_module.forward, static_argnums=(0, 3))
GSPO = partial(LOSSES["gspo"], clip_low=3e-3, clip_high=4e-3)


@pytest.fixture(scope="module")
def tiny():
    """One layer of the usual tiny network: these tests compile many programs."""
    model = Qwen(QwenConfig.from_hf(TINY | {"num_hidden_layers": 1}), rngs=nnx.Rngs(0))
    model.embed[...] = model.embed[...] * 4
    return model


@pytest.fixture(scope="module")
def tiny_view(tiny):
    return nnx.split(tiny)


def make_batch(seed=0, poison=0):
    """Rows of very unequal length; padding holds the token `poison`."""
    rng = np.random.default_rng(seed)
    prompt, response = rng.integers(2, 9, B), np.array([1, 10, 3, 7, 2, 9, 5, 10], np.int32)
    tokens = np.full((B, S), poison, np.int32)
    mask = np.arange(T)[None] < response[:, None]
    for row in range(B):
        used = prompt[row] + response[row]
        tokens[row, :used] = rng.integers(1, 64, used)
    adv = rng.normal(size=B).astype(np.float32)
    return TrainBatch(tokens, prompt.astype(np.int32), response, mask, adv)


def fresh(tiny_view, learning_rate=1e-3, state="8bit"):
    graphdef, params = tiny_view
    optimizer = optimizer_of(learning_rate, state)
    return graphdef, optimizer, init_state(jax.tree.map(jnp.copy, params), optimizer)


def accumulate(graphdef, params, batch, old, ref, objective):
    """The gradients of a minibatch and what its forward passes found."""
    programs = programs_of(graphdef, IDENTITY, objective)
    return programs.accumulate(Gradients(params), batch, old, ref)[0]


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def leaves_equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_response_token_t_is_predicted_from_the_position_before_it(tiny, tiny_view):
    """Against log-softmax of the whole logits, indexed by hand."""
    graphdef, params = tiny_view
    batch = make_batch()
    logp, entropy, *_ = forward(graphdef, params, on_device(batch), Objective(GSPO))[1]
    full = np.asarray(jax.nn.log_softmax(tiny.logits(jnp.asarray(batch.tokens)), axis=-1))
    for row in range(B):
        for t in range(int(batch.mask[row].sum())):
            place = batch.prompt_length[row] + t
            want = full[row, place - 1]
            assert logp[row, t] == pytest.approx(want[batch.tokens[row, place]], abs=1e-5)
            assert entropy[row, t] == pytest.approx(-(np.exp(want) * want).sum(), abs=1e-5)


@pytest.mark.parametrize(
    "loss",
    ["gspo", *(pytest.param(name, marks=pytest.mark.long) for name in ("grpo", "reinforce"))],
)
@pytest.mark.parametrize(
    "microbatch", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 4))]
)
def test_microbatches_of_uneven_rows_add_up_to_the_big_batch(tiny_view, loss, microbatch):
    graphdef, params = tiny_view
    batch = on_device(make_batch())
    old = forward(graphdef, params, batch, Objective(GSPO))[1].logp + 0.001
    ref = old - 0.1

    def gradient(rows):
        objective = Objective(LOSSES[loss], kl_coef=0.1, microbatch_tokens=rows * S)
        return accumulate(graphdef, params, batch, old, ref, objective)

    whole, split = gradient(0), gradient(microbatch)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(a).max()) + 1e-9)


def test_what_padding_holds_changes_nothing(tiny_view):
    graphdef, params = tiny_view
    clean, poisoned = on_device(make_batch(poison=0)), on_device(make_batch(poison=63))
    assert not np.array_equal(clean.tokens, poisoned.tokens)
    a = accumulate(graphdef, params, clean, None, None, Objective(GSPO))[0]
    b = accumulate(graphdef, params, poisoned, None, None, Objective(GSPO))[0]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_does_not_change_the_gradient(tiny_view, remat):
    graphdef, params = tiny_view
    batch = on_device(make_batch())
    a = accumulate(graphdef, params, batch, None, None, Objective(GSPO))[0]
    b = accumulate(graphdef, params, batch, None, None, Objective(GSPO, remat=remat))[0]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_first_minibatch_has_ratio_exactly_1_and_a_later_one_moves(tiny_view):
    graphdef, optimizer, state = fresh(tiny_view)
    programs = programs_of(graphdef, optimizer, Objective(GSPO))
    before = programs.logps(state.params, on_device(make_batch())).logp
    state, done = continue_updates(programs, state, Progress(make_batch()), minibatches=4)
    stats, old, metrics = done.stats, old_logps(done), summarise(done.stats)
    assert float(stats[0]["ratio_min"].value) == float(stats[0]["ratio_max"].value) == 1.0
    assert metrics["clip_frac_by_update"][0] == 0.0
    assert max(metrics["clip_frac_by_update"][1:]) > 0
    assert all(float(s["ratio_std"].value) > 0 for s in stats[1:])
    assert (int(state.step), int(state.updates), int(state.skipped)) == (1, 4, 0)
    # log π_old of every row is that of the parameters before the step, the first rows' too.
    mask = make_batch().mask
    np.testing.assert_allclose(old[mask], np.asarray(before)[mask], atol=1e-6)


@pytest.mark.long
def test_a_second_epoch_compares_with_the_policy_that_sampled(tiny_view):
    graphdef, optimizer, state = fresh(tiny_view)
    programs = programs_of(graphdef, optimizer, Objective(GSPO))
    progress = Progress(make_batch())
    _, done = continue_updates(programs, state, progress, minibatches=2, epochs=2)
    ratio_std = [float(s["ratio_std"].value) for s in done.stats]
    assert ratio_std[0] == 0 and len(ratio_std) == 4
    assert ratio_std[2] > 1e-5  # the first minibatch again, now off-policy


@pytest.mark.long
def test_gspo_and_grpo_take_the_same_step_where_the_rollout_is_one_batch(tiny_view):
    """At π_θ = π_old the ratio of every token and sequence is 1 and the gradients coincide."""

    def step(loss):
        graphdef, optimizer, state = fresh(tiny_view, state="float32")
        programs = programs_of(graphdef, optimizer, Objective(LOSSES[loss]))
        return continue_updates(programs, state, Progress(make_batch()), minibatches=1)[0]

    gspo, grpo = step("gspo"), step("grpo")
    for a, b in zip(jax.tree.leaves(gspo.opt_state), jax.tree.leaves(grpo.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_gradient_that_is_not_finite_leaves_the_state_bit_unchanged_and_is_counted(tiny_view):
    graphdef, optimizer, state = fresh(tiny_view)
    programs = programs_of(graphdef, optimizer, Objective(LOSSES["reinforce"]))
    state, *_ = programs.update(state, on_device(make_batch()))  # moments that are not zero
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state))
    batch = make_batch()
    batch.adv[3] = np.inf
    state, metrics, _ = programs.update(state, on_device(batch))
    assert not np.isfinite(metrics["grad_norm"].value)
    assert leaves_equal((kept[0], let_pass(kept[1])), (state.params, state.opt_state))
    assert (int(state.updates), int(state.skipped)) == (1, 1)
    state, *_ = programs.update(state, on_device(make_batch(seed=1)))
    assert not leaves_equal(kept[0], state.params)


@pytest.mark.parametrize("left_out", ["zero", "not finite", "spike"])
@pytest.mark.parametrize("leaf_by_leaf", [True, False])
def test_a_schedule_goes_on_through_updates_that_are_left_out(left_out, leaf_by_leaf):
    """Linear from 1e-3 to 0 over 20 updates: the last one is at 1e-3 (1 - 19/20) = 5e-5, whichever
    ten before it were left out. Under a gradient of 1 throughout, Adam moves by the rate itself.
    """
    schedule = make_schedule(1e-3, kind="linear", updates=20)
    if leaf_by_leaf:
        optimizer = make_optimizer(schedule, state="float32")
    else:
        optimizer = optax.adam(schedule, b1=0.9, b2=0.99)
    params = {"w": jnp.zeros(3)}
    state, step = init_state(params, optimizer), jax.jit(apply_guarded, static_argnums=(2, 3))
    for number in range(20):
        out = 5 <= number < 15
        grad = jnp.full(3, 0.0 if out and left_out == "zero" else 0.5)
        norm = jnp.sqrt(jnp.sum(grad**2))
        finite, spike = jnp.bool_(not (out and left_out == "not finite")), jnp.bool_(out)
        spike &= left_out == "spike"
        before = state.params["w"]
        state = step(state, Gradients({"w": grad}), optimizer, Objective(GSPO), norm, finite, spike)
        moved = np.asarray(before - state.params["w"])
        np.testing.assert_allclose(moved, 0 if out else 1e-3 * (1 - number / 20), rtol=1e-3)
    assert int(schedule_count(state.opt_state)) == 20 and int(state.updates) == 10


def test_an_rl_learning_rate_of_1e_6_moves_every_matrix_of_float32_masters(tiny_view):
    graphdef, optimizer, state = fresh(tiny_view, learning_rate=1e-6)
    before = jax.tree.map(np.asarray, state.params)
    programs = programs_of(graphdef, optimizer, Objective(GSPO))
    state, *_ = programs.update(state, on_device(make_batch()))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        if old.ndim == 2:
            moved = np.abs(np.asarray(new) - old)
            assert 0.5e-6 < np.median(moved) < 1.5e-6  # Adam's first step is lr * sign


@pytest.mark.long
def test_the_kl_term_pulls_towards_the_reference(tiny_view):
    """With advantage 0 everywhere, only the penalty is left; descending it lowers the KL."""
    graphdef, optimizer, state = fresh(tiny_view, learning_rate=1e-2)
    objective = Objective(GSPO, kl_coef=1.0)
    programs = programs_of(graphdef, optimizer, objective)
    batch = on_device(make_batch()._replace(adv=np.zeros(B, np.float32)))
    ref = programs.logps(state.params, batch).logp + 0.3
    values = []
    for _ in range(5):
        state, metrics, _ = programs.update(state, batch, None, ref)
        values.append(float(metrics["kl"].value))
    # k3 = exp(d) - 1 - d with d = 0.3 at first
    assert values[0] == pytest.approx(np.exp(0.3) - 1.3, rel=1e-3)
    assert values[-1] < values[0]


@pytest.mark.long
def test_the_entropy_bonus_raises_the_entropy(tiny_view):
    """With advantage 0 everywhere, only the bonus is left; ascending it flattens the policy."""
    graphdef, optimizer, state = fresh(tiny_view, learning_rate=1e-2)
    programs = programs_of(
        graphdef, optimizer, Objective(GSPO, entropy_coef=0.5, microbatch_tokens=2 * S)
    )
    batch = on_device(make_batch()._replace(adv=np.zeros(B, np.float32)))
    values = []
    for _ in range(4):
        state, metrics, _ = programs.update(state, batch)
        values.append(float(metrics["entropy"].value))
        assert float(metrics["loss"].value) == pytest.approx(-0.5 * values[-1], rel=1e-5)
    assert values == sorted(values) and values[-1] > values[0] + 1e-3


def compiled(caplog):
    """How often each of the update's large programs was compiled, as jax logs it.

    They are told from jax's own small ones (jnp.add) by the length of their lists of arguments.
    """
    found = Counter(re.findall(r"Compiling jit\((\w+)\) with .{300}", caplog.text))
    return {name: found[name] for name in Programs._fields if name in found}


def test_compiled_once_for_all_steps(tiny_view, caplog):
    graphdef, optimizer, state = fresh(tiny_view)
    programs = make_programs(graphdef, optimizer, Objective(GSPO))
    with jax.log_compiles():
        for seed in range(3):
            progress = Progress(make_batch(seed))
            state, _ = continue_updates(programs, state, progress, minibatches=4)
    assert compiled(caplog) == {"add_logps": 1, "add_grads": 1, "apply": 1}


@pytest.mark.long
def test_rows_of_any_length_compile_one_program_per_width_at_most(tiny_view, caplog):
    """Of at most 200 tokens, so in widths of 200, 150, 100 and 50; 400 tokens run together."""
    graphdef, optimizer, state = fresh(tiny_view)
    programs = make_programs(
        graphdef, optimizer, Objective(GSPO, longest=200, microbatch_tokens=400)
    )
    rng = np.random.default_rng(0)
    caplog.clear()
    for longest in (40, 200, 120, 160, 90):
        prompt = rng.integers(2, 20, B).astype(np.int32)
        response = rng.integers(1, longest - 19, B)
        batch = TrainBatch(
            rng.integers(1, 64, (B, 200)).astype(np.int32),
            prompt,
            response.astype(np.int32),
            np.arange(180)[None] < response[:, None],
            rng.normal(size=B).astype(np.float32),
        )
        with jax.log_compiles():
            state, metrics, _ = programs.update(state, batch)
        assert np.isfinite(metrics["loss"].value)
    counts = compiled(caplog)
    assert 2 <= counts.pop("add_grads") <= 4
    assert counts == {"apply": 1}


@pytest.mark.long
def test_a_text_that_is_cut_gives_the_same_gradient_as_one_that_is_not(tiny_view):
    """The widths 40 and 8, against one microbatch of full width; padding holds other tokens."""
    graphdef, params = tiny_view
    short = make_batch(poison=5)
    wide = short._replace(tokens=np.pad(short.tokens, ((0, 0), (0, 20)), constant_values=9))
    whole = accumulate(graphdef, params, short, None, None, Objective(GSPO))
    cut = Objective(GSPO, longest=40, microbatch_tokens=80, shortest_prompt=2)
    parts = microbatches(wide, cut)
    assert {p.width for p in parts} == {40, 8}
    split = accumulate(graphdef, params, wide, None, None, cut)
    for a, b in zip(jax.tree.leaves(whole.grads), jax.tree.leaves(split.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(a).max()) + 1e-9)
    mask = short.mask
    np.testing.assert_allclose(split.found.logp[mask], whole.found.logp[mask], atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("after", [0, 1, 2, 5])  # times that `stop` says no
def test_updates_stopped_and_continued_are_those_that_nobody_stopped(tiny_view, after):
    """Two epochs of two updates, continued on the host's copies, as a checkpoint holds them."""
    graphdef, optimizer, state = fresh(tiny_view)
    programs = programs_of(graphdef, optimizer, Objective(GSPO))
    progress = Progress(make_batch())
    wanted, whole = continue_updates(programs, state, progress, minibatches=2, epochs=2)
    answers = iter([False] * after + [True])
    state, part = continue_updates(
        programs,
        fresh(tiny_view)[2],
        progress,
        minibatches=2,
        epochs=2,
        stop=lambda: next(answers, True),
    )
    # Asked once before anything, then before each update.
    assert len(part.stats) == max(after - 1, 0) and int(state.step) == (after == 5)
    state, part = jax.tree.map(np.asarray, (state, part))
    if after < 5:
        state, part = continue_updates(programs, on_device(state), part, minibatches=2, epochs=2)
    assert leaves_equal(state, wanted)
    assert jax.device_get(part.stats) == jax.device_get(whole.stats)
    np.testing.assert_array_equal(old_logps(part), old_logps(whole))
