"""Every large program of a run, in shapes alone: what is compiled, and what is alive around it.

A run is a function of its configuration, the model's shape and the lengths of the texts. So all
that `train` will compile is known before a weight is read: this lists it, with abstract arguments
(`jax.ShapeDtypeStruct`) that carry the shardings of the real ones.

Left out are the programs on numbers per row (keys, advantages, counters), which are nothing beside
these. A list may hold more than a run compiles: which batches decoding shrinks to depends on when
rows end.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from gspo_jax.batch import TrainBatch
from gspo_jax.config.load import Config
from gspo_jax.mesh.sharding import platform_of, sharding_for, state_shardings
from gspo_jax.models.cache import AXES
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.qwen import Qwen
from gspo_jax.plan.account import Planned
from gspo_jax.plan.memory import (
    Sketch,
    held_by,
    microbatch_shapes,
    passes,
    per_device,
    row_ways,
)
from gspo_jax.policy import (
    Passes,
    Policy,
    Problems,
    compiled_to_sample,
    resolve_dtype,
    text_sizes,
)
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.rollout import engine as generate
from gspo_jax.rollout.sampling import Sampling, row_keys
from gspo_jax.rollout.schedule import bucket, programs_for, schedule
from gspo_jax.start import critic_term, objective, optimizer_at, starter, update_programs
from gspo_jax.update.critic import make_add_values, make_critic
from gspo_jax.update.objective import CriticTerm, Given, Gradients, Targets
from gspo_jax.update.state import CriticState


def sketch(
    config: Config,
    shape: QwenConfig,
    problems: Problems,
    mesh: Mesh,
    *,
    tokenizer: Tokenizer | None = None,
    directory: Path = Path(),
    limit: int | None = None,
) -> Sketch:
    """The run that `config` describes, without an array: only the sizes in `problems` are used.

    `limit` is the bytes of a device by which "auto" decides; None asks the device.
    """
    model = nnx.eval_shape(lambda: Qwen(shape, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    params = _placed(params, state_shardings(params, params, mesh))
    dtype = resolve_dtype(config, platform_of(mesh))
    policy = Policy(graphdef, params, tokenizer, mesh, dtype, directory)  # pyright: ignore
    updates = config.run.steps * config.algo.minibatches * config.algo.epochs
    optimizer, _ = optimizer_at(config, config.optim.learning_rate, updates)
    state = jax.eval_shape(starter(config, optimizer), params)
    state = _placed(state, state_shardings(state, params, mesh))
    reference = config.algo.kl.coef > 0
    held = held_by(state, dtype=dtype, reference=reference)
    how = passes(config, policy, shape, held, text_sizes(config, problems, mesh), limit=limit)
    critic, term = _critic(config, policy, updates, problems.shortest, how)
    state = state._replace(critic=critic)
    goal = objective(config, policy, problems, how, term)
    held = held_by(state, dtype=dtype, reference=reference)
    return Sketch(config, shape, policy, problems, state, goal, optimizer, held)


def programs(run: Sketch, *, every_length: bool = False) -> list[Planned]:
    """All of them, in the order of a step.

    Args:
        every_length: those for all padded lengths that the longest prompt of a batch can have,
            not only for the largest, which need most.
    """
    lengths = prompt_slots(run) if every_length else prompt_slots(run)[:1]
    with jax.set_mesh(run.policy.mesh):
        planned = [*_rollout(run, lengths), *_evaluate(run, lengths), *_update(run)]
    return list({(p.stage, p.name, p.shape): p for p in reversed(planned)}.values())[::-1]


# ------------------------------------------------------------------------------------ sampling


def prompt_slots(run: Sketch) -> list[int]:
    """Padded prompt lengths that a batch can have, longest first."""
    found = {bucket(n) for n in range(run.problems.shortest, run.problems.longest + 1)}
    return sorted(found, reverse=True)


def _rollout(run: Sketch, lengths: list[int]) -> Iterator[Planned]:
    c, r = run.config, run.config.rollout
    if run.held.weights:
        yield _plan(run, "rollout", compiled_to_sample, _network(run.policy), (), "")
    sampling = Sampling(float(r.temperature), float(r.top_p), int(r.top_k))
    record = c.algo.routing_replay == "R3" and _routed(run)
    for slots in lengths:
        yield from _sample(run, "rollout", r.prompts, r.group_size, slots, sampling, record)


def _evaluate(run: Sketch, lengths: list[int]) -> Iterator[Planned]:
    e = run.config.eval
    count = min(e.problems, len(run.problems.indices.get(e.split, ())))
    batches = {min(e.batch, count), count % e.batch} - {0}
    kinds = [(1, 0.0), (e.samples, float(e.temperature))] if e.samples else [(1, 0.0)]
    for slots in lengths:
        for prompts in sorted(batches, reverse=True):
            for group, temperature in kinds:
                sampling = Sampling(temperature)
                yield from _sample(run, "evaluate", prompts, group, slots, sampling, False)


def _sample(
    run: Sketch, stage: str, prompts: int, group: int, S: int, sampling: Sampling, record: bool
) -> Iterator[Planned]:
    """The programs of one call of `generate`, in its order."""
    graphdef, weights = _sampler(run.policy)
    base = run.held.always + run.held.weights
    wanted = prompts * group
    sizes = schedule(wanted, S, run.config.rollout.max_completion_length, ways=row_ways(run))
    prompts += -prompts % row_ways(run)  # filled up
    tokens, mask = _host((prompts, S), "int32"), _host((prompts, S), "bool")
    logits = _batched(run, (prompts, run.shape.vocab_size), "float32", "vocab")
    experts = _batched(run, (prompts, S, *_expert_ids(run)), "int16") if record else None
    B = sizes.batches[0]
    greedy = ", greedy" if sampling.temperature == 0 else ""
    text = f"{prompts} prompts of {S}"
    arguments = (graphdef, weights, tokens, mask, record)
    alive = base + per_device((tokens, mask))
    yield _plan(run, stage, generate._prefill, arguments, (), text, alive)

    number = _host((B,), "int32")
    keys = jax.eval_shape(row_keys, jax.eval_shape(lambda: jax.random.key(0)), *[number] * 2)
    rows = lambda b: generate.Rows(  # noqa: E731
        *(_batched(run, (b,), kind) for kind in ("int32", "int32", keys.dtype))
    )
    arguments = (logits, experts, number, number, keys, sampling)
    own = base + per_device(_cached(run, prompts, S, run.policy.dtype)) * _layers(run)
    text = f"{B} rows of {text}{greedy}"
    yield _plan(run, stage, generate._begin, arguments, (), text, own + per_device(logits))
    if not sizes.slots:
        return

    def fits(b: int, s: int, to: int, slots: int, kept) -> Planned:
        one, other = (_cached(run, *size, run.policy.dtype) for size in ((b, s), (to, slots)))
        beside = (_layers(run) - 1) * max(per_device(one), per_device(other)) + per_device(one)
        text = f"{b} x {s} slots to {to} x {slots}"
        return _plan(run, stage, generate._fit, (one, kept, slots), (), text, base + beside)

    yield fits(prompts, S, B, sizes.slots[0], number)
    for n, (before, now) in enumerate(pairwise(sizes.slots), 1):
        may_shrink = sizes.may_shrink(n)
        for b in sizes.batches:
            if now > before:
                yield fits(b, before, b, now, None)
            for to in [x for x in sizes.batches if x < b and may_shrink]:
                yield fits(b, before, to, now, _host((to,), "int32"))
                alive = base + per_device(_cached(run, b, before, run.policy.dtype)) * _layers(run)
                arguments = (rows(b), _host((to,), "int32"))
                yield _plan(run, stage, generate._pick, arguments, (), f"{b} to {to}", alive)
    scalar = _host((), "int32")
    listed = programs_for(wanted, S, run.config.rollout.max_completion_length, ways=row_ways(run))
    for program in listed:
        one = _cached(run, program.batch, program.slots, run.policy.dtype)
        whole = tuple(generate.LayerCache(one, one) for _ in range(run.shape.num_layers))
        arguments = (graphdef, weights, whole, rows(program.batch), scalar, scalar)
        options = {"sampling": sampling, "steps": program.steps, "record_routing": record}
        text = f"{program.batch} x {program.slots} slots, {program.steps} steps{greedy}"
        alive = base + per_device(whole) + per_device(arguments[3])
        yield _plan(run, stage, generate._decode, arguments, options, text, alive)


# ------------------------------------------------------------------------------------- updating


def _update(run: Sketch) -> Iterator[Planned]:
    """As `train` calls them: log-probs of the reference, of π_old, then the gradient, its use."""
    c, a = run.config, run.config.algo
    made = update_programs(c, run.policy, run.optimizer, run.goal, run.state)
    everything = c.rollout.prompts * c.rollout.group_size
    part = everything // a.minibatches
    routed = _routed(run)
    if c.algo.kl.coef:
        yield from _logps(run, made, _rows(run, everything, False))
        if a.kl.placement == "reward" and routed and a.routing_replay == "R3":
            yield from _logps(run, made, _rows(run, everything, True))
    if run.goal.critic is not None:
        add_values = make_add_values(run.policy.graphdef, run.goal, run.goal.critic)
        batch = _rows(run, everything, a.routing_replay == "R3" and routed)
        zeros = _host(batch.mask.shape, "float32")
        networks = (run.state.params, run.state.critic.params)  # pyright: ignore
        yield from _each_width(
            run, add_values, (zeros, *networks, batch), everything, run.held.always
        )
    with_ids = a.routing_replay == "R3" and routed
    if a.minibatches > 1:
        yield from _logps(run, made, _batch(run, part, with_ids))
    replays = [with_ids] if a.routing_replay != "R2" or not routed else [False, True]
    if replays == [False, True] and a.minibatches * a.epochs == 1:
        replays = [False]
    for ids in replays:
        batch, given = _batch(run, part, ids), _given(run, part)
        trained = Gradients(run.state.params, run.state.critic and run.state.critic.params)
        total = jax.eval_shape(made.start_grads, trained, batch)
        total = total._replace(grads=_like(total.grads, trained))
        base = run.held.always + per_device((batch, given))
        yield _plan(run, "update", made.start_grads, (trained, batch), (), f"{part} rows", base)
        base += per_device(total)
        arguments = (total, trained, batch, given)
        yield from _each_width(run, made.add_grads, arguments, part, base)
        arguments = (run.state, total, batch, given)
        yield _plan(run, "update", made.apply, arguments, (), f"{part} rows", base)


def _logps(run: Sketch, made, batch: TrainBatch) -> Iterator[Planned]:
    B = batch.tokens.shape[0]
    params, base = run.state.params, run.held.always + per_device(batch)
    yield _plan(run, "update", made.start_logps, (params, batch), (), f"{B} rows", base)
    found = jax.eval_shape(made.start_logps, params, batch)
    arguments = (found, params, batch)
    yield from _each_width(run, made.add_logps, arguments, B, base + per_device(found))


def _each_width(run: Sketch, jitted, arguments, rows: int, alive: int) -> Iterator[Planned]:
    count = _host((), "int32")
    for width, m in microbatch_shapes(run, rows):
        ids = _host((-(-rows // m), m), "int32")
        text = f"{m} x {width} tokens, {rows} rows in all"
        more = (*arguments, ids, count)
        yield _plan(run, "update", jitted, more, {"width": width}, text, alive)


def _batch(run: Sketch, rows: int, routed: bool) -> TrainBatch:
    """A minibatch."""
    T, by_token = run.config.rollout.max_completion_length, run.goal.critic is not None
    adv = _batched(run, (rows, T) if by_token else (rows,), "float32")
    return _rows(run, rows, routed)._replace(adv=adv)


def _rows(run: Sketch, rows: int, routed: bool) -> TrainBatch:
    """Rows without advantages."""
    S, T = run.goal.longest, run.config.rollout.max_completion_length
    ids = None
    if routed:
        ids = _batched(run, (rows, S, *_expert_ids(run)), "int16")
    return TrainBatch(
        _batched(run, (rows, S), "int32"),
        _batched(run, (rows,), "int32"),
        _batched(run, (rows,), "int32"),
        _batched(run, (rows, T), "bool"),
        routing=ids,
    )


def _given(run: Sketch, rows: int) -> Given:
    x = _batched(run, (rows, run.config.rollout.max_completion_length), "float32")
    kl = run.config.algo.kl
    ref = x if kl.coef and kl.placement == "loss" else None
    return Given(x, ref, Targets(x, x) if run.goal.critic is not None else None)


def _critic(
    config: Config, policy: Policy, updates: int, shortest: int, how: Passes
) -> tuple[CriticState | None, CriticTerm | None]:
    """`start.add_critic` in shapes."""
    c = config.algo.critic
    if c.kind == "none":
        return None, None
    optimizer, _ = optimizer_at(config, c.learning_rate, updates)
    graphs = []

    def start(params: PyTree) -> CriticState:
        graphdef, params = make_critic(c.kind, policy.graphdef, params)
        graphs.append(graphdef)
        return CriticState(params, optimizer.init(params))

    state = jax.eval_shape(start, policy.params)
    state = _placed(state, state_shardings(state, state.params, policy.mesh))
    return state, critic_term(config, policy, graphs[0], optimizer, how, shortest)


# --------------------------------------------------------------------------------------- shapes


def _plan(run: Sketch, stage, jitted, arguments, options, shape, alive: int = 0) -> Planned:
    def lower():
        with jax.set_mesh(run.policy.mesh):
            return jitted.lower(*arguments, **dict(options))

    return Planned(stage, jitted.__name__, shape, lower, alive or run.held.always)


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    """The shapes of `tree`, living as `shardings` says."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _like(tree: PyTree, other: PyTree) -> PyTree:
    return _placed(tree, jax.tree.map(lambda x: x.sharding, other))


def _network(policy: Policy) -> tuple[nnx.GraphDef, PyTree, str]:
    """What `to_sample` is given."""
    return policy.graphdef, policy.params, policy.dtype


def _sampler(policy: Policy) -> tuple[nnx.GraphDef, PyTree]:
    """What it gives."""
    with jax.set_mesh(policy.mesh):
        graphdef, shapes = compiled_to_sample.eval_shape(*_network(policy))
    return graphdef, _placed(shapes, state_shardings(shapes, shapes, policy.mesh))


def _host(shape: tuple[int, ...], dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _batched(run: Sketch, shape: tuple[int, ...], dtype, *axes: str | None) -> Any:
    """An array whose leading axis is the batch, and the next ones perhaps `axes`."""
    axes = ("batch", *axes, *(None,) * (len(shape) - 1 - len(axes)))
    where = sharding_for(axes, run.policy.mesh, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _cached(run: Sketch, rows: int, slots: int, dtype: str) -> Any:
    """Keys or values of one layer."""
    c = run.shape
    return _batched(run, (rows, c.num_kv_heads, slots, c.head_dim), dtype, *AXES[1:])


def _layers(run: Sketch) -> int:
    return 2 * run.shape.num_layers  # buffers of a cache


def _expert_ids(run: Sketch) -> tuple[int, int]:
    """M layers with experts, X of them for each token."""
    assert run.shape.experts is not None
    sparse = sum(run.shape.is_sparse(i) for i in range(run.shape.num_layers))
    return sparse, run.shape.experts.per_token


def _routed(run: Sketch) -> bool:
    return run.shape.experts is not None
