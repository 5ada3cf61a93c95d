"""What a run would do and what it would need, before a weight is read or a file is written.

    plan(config)      one line per stage, from the model's headers, the task and the rewards
    report(config)    memory per device, work and time of a step; compiles the largest programs, for
                      the devices that are here or for a target

Advice on what does not fit names the settings that lower what is largest.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from gspo_jax.config.load import Config, model_dir, run_dir
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.files.whole import check_place
from gspo_jax.mesh.sharding import platform_of
from gspo_jax.models.hf.files import find_tensors
from gspo_jax.models.hf.weights import lent_files, read_model_config
from gspo_jax.plan import costs
from gspo_jax.plan.account import Account, Planned, compiled, estimated, largest, named, table
from gspo_jax.plan.capacity import capacity
from gspo_jax.plan.hlo import kernels
from gspo_jax.plan.memory import (
    MANY,
    Sketch,
    cache_bytes_of,
    logit_bytes_of,
    microbatch_shapes,
    row_ways,
    short_memory,
    size,
    working_bytes_of,
)
from gspo_jax.plan.programs import programs, sketch
from gspo_jax.plan.target import Target, target_of
from gspo_jax.policy import (
    Problems,
    check_experts,
    load_problems,
    open_mesh,
    within_positions,
)
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.run import checkpoint
from gspo_jax.run.resume import check_named
from gspo_jax.run.trackers import check_installed
from gspo_jax.tasks import Task


def plan(config: Config) -> str:
    """One line per stage, after reading the model's headers, the task and the reward functions.

    Raises:
        DataError: the model directory, the data or a reward function is not what it should be.
        StorageError: the run directory is in use, or cannot be written.
    """
    check_named(config.run.resume, run_dir(config) / "checkpoints")
    check_installed(config.run.report_to)
    directory = model_dir(config)
    shape = read_model_config(directory)
    check_experts(config.algo, shape)
    simulate_devices(config)
    mesh = open_mesh(config, shape)
    size = "random weights"
    if config.model.init == "pretrained":
        count = sum(math.prod(tensor.shape) for tensor in find_tensors(directory).values())
        size = f"{count / 1e6:,.2f} M parameters"
    lent_files(directory)
    tokenizer = load_tokenizer(directory, template_args=config.model.template_args)
    problems = within_positions(config, shape, load_problems(config, tokenizer))
    check_place(run_dir(config))
    lines = {
        "model": f"{directory}: {shape.family}, {shape.num_layers} layers, {size}",
        "task": _task(config, problems),
        "rewards": _rewards(config),
        "step": _step(config),
        "run": _run(config),
        "eval": _eval(config, problems),
        "writes": _place(run_dir(config)),
    }
    if problems.task.warnings:
        lines["warning"] = " ".join(problems.task.warnings)
    run = sketch(config, shape, problems, mesh)
    lines["memory"] = short_memory(run)
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def report(
    config: Config,
    *,
    compile: bool = True,
    limit: int | None = None,
    target: str = "",
    show: Callable[[str], None] = print,
) -> None:
    """Show memory by kind and peak per device, and what a step costs; then refuse what is too much.

    Without a tokenizer or data, prompts are taken to be of any length up to
    task.max_prompt_length. The devices of a mesh that the CPU lacks are simulated.

    Args:
        compile: compile the largest programs for their temporary memory; else estimate it.
        limit: bytes of a device; None asks the device, or the target.
        target: devices to compile for that need not be here (`target.target_of`); "" is those
            that are.
        show: is given the table, which stands there in either case.

    Raises:
        ConfigError: it does not fit; the message says what to change.
        DataError: the model's config.json is not what it should be.
    """
    to = target_of(target) if target else None
    run, note = sketched(config, limit, to)
    planned = programs(run)
    found = [compiled(p) if compile else estimated(run, p) for p in largest(planned)]
    if limit is None:
        limit = to.limit if to else capacity()
    lines = [*_sizes(run, note), *_memory(run, found, limit), *_cost(run, to)]
    if compile:
        lines.append(_compiling(planned, found))
    page = [f"{name:11} {text}" for name, text in lines]
    show("\n".join([*page, "", *table(found)] if compile else page))
    refuse(run, found, limit)


def sketched(
    config: Config, limit: int | None = None, to: Target | None = None
) -> tuple[Sketch, str]:
    """The run in shapes, on simulated devices where need be, and what had to be assumed.

    Args:
        limit: bytes of a device; None asks the device, or the target.
        to: devices instead of those that are here.

    Raises:
        ConfigError, DataError: as `report`.
    """
    if to is None:
        simulate_devices(config)
    elif limit is None:
        limit = to.limit
    directory = model_dir(config)
    shape = read_model_config(directory)
    check_experts(config.algo, shape)
    mesh = open_mesh(config, shape, to and to.devices)
    problems, note = _problems(config, directory)
    fitting = within_positions(config, shape, problems)
    note += f"; {fitting.task.warnings[-1]}" if fitting is not problems else ""
    return sketch(config, shape, fitting, mesh, limit=limit), note


def refuse(run: Sketch, found: Sequence[Account], limit: int) -> None:
    """Raise where the peak is above the limit.

    Raises:
        ConfigError: names the program and the settings that lower what it needs.
    """
    worst = max(found, key=lambda x: x.peak)
    if worst.peak <= limit:
        return
    raise ConfigError(
        f"needs {worst.peak / 1e9:.3g} of {limit / 1e9:.3g} GB per device ({named(worst.planned)} "
        f"of the {worst.planned.stage}): {advice(run, worst)}."
    )


def advice(run: Sketch, worst: Account) -> str:
    """Settings that lower this program's peak, the strongest first."""
    c, held = run.config, run.held
    settings = []
    if worst.planned.stage == "update":
        if worst.planned.name in ("add_grads", "add_logps", "add_values"):
            settings += ["model.remat=full"] if run.goal.remat != "full" else []
            rows = microbatch_shapes(run, MANY)[0][1]
            settings += [f"algo.microbatch={max(rows // 2, 1)}"] if rows > 1 else []
    elif worst.planned.stage == "rollout":
        settings += [f"rollout.prompts={max(c.rollout.prompts // 2, 1)}"]
    else:
        settings += [f"eval.batch={max(c.eval.batch // 2, 1)}"]
    settings += ["optim.state=8bit"] if c.optim.state == "float32" else []
    settings += ["algo.kl.coef=0"] if held.reference else []
    settings += ["algo.critic.kind=shared"] if c.algo.critic.kind == "separate" else []
    settings += [f"mesh.fsdp={2 * run.policy.mesh.shape['fsdp']}"]
    length = f"rollout.max_completion_length={c.rollout.max_completion_length // 2}"
    return "set " + " or ".join([*settings, length])


def simulate_devices(config: Config) -> None:
    """On a CPU: as many devices as the mesh wants, where JAX has not yet counted them."""
    wanted = math.prod(size for size in vars(config.mesh).values() if size > 1)
    if wanted > 1:
        try:
            jax.config.update("jax_num_cpu_devices", wanted)
        except RuntimeError:  # they are counted; make_mesh refuses where they are too few
            return


def _problems(config: Config, directory: Path) -> tuple[Problems, str]:
    """The task's problems; where they cannot be read, stand-ins with the longest prompts."""
    try:
        tokenizer = load_tokenizer(directory, template_args=config.model.template_args)
        return load_problems(config, tokenizer), ""
    except DataError as error:
        c, e = config.task, config.eval
        task = Task("unknown", {}, _nothing, _nothing)
        held_out = {"train": [], e.split: list(range(e.problems))}
        stand_in = Problems(task, held_out, 0, _nothing, 1, c.max_prompt_length)
        return stand_in, f" (assumed: {error})"


def _nothing(*_, **__):
    raise NotImplementedError("stands where there is no data")


def _sizes(run: Sketch, note: str) -> list[tuple[str, str]]:
    mesh = run.policy.mesh
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(run.policy.params))
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1 or axis == "data")
    return [
        ("model", f"{run.shape.family}, {count / 1e6:,.2f} M parameters, {run.policy.dtype}"),
        ("devices", f"{mesh.size} x {kind}: {axes}"),
        ("passes", f"attention {run.goal.attention}, remat {run.goal.remat}{_decided(run)}"),
        ("prompts", f"{run.problems.shortest} to {run.problems.longest} tokens{note}"),
    ]


def _decided(run: Sketch) -> str:
    """Which of the two was left to us; a run on this device would do the same."""
    model = run.config.model
    autos = [name for name in ("attention", "remat") if getattr(model, name) == "auto"]
    return f" ({' and '.join(autos)} decided here)" if autos else ""


def _memory(run: Sketch, found: Sequence[Account], limit: int) -> list[tuple[str, str]]:
    """Kinds, then peaks: of sampling, and of the update."""
    h = run.held
    adds = [x for x in found if x.planned.name == "add_grads"]
    worst_add = max(adds, key=lambda x: x.peak)
    logits = min(logit_bytes_of(run), worst_add.temporary)
    at_work = working_bytes_of(run)
    kinds = {
        "weights": (h.weights, "the sampler's, in " + run.policy.dtype),
        "masters": (h.masters, "float32" + ("" if h.weights else "; the sampler's too")),
        "moments": (h.moments, run.config.optim.state),
        "reference": (h.reference, "of the KL term"),
        "critic": (h.critic, "with its moments"),
        "gradients": (h.gradients, "accumulated over microbatches"),
        "cache": (cache_bytes_of(run), "responses at full length"),
        "at work": (at_work, f"weights in {run.policy.dtype}, gradients not yet added (estimated)"),
        "head": (logits, "logits and their gradient, a chunk at a time (estimated)"),
        "activations": (
            max(worst_add.temporary - logits - at_work, 0),
            f"of {worst_add.planned.shape}, the rest of its temporary memory",
        ),
    }
    lines = [(name, f"{size(n):>9}  {text}") for name, (n, text) in kinds.items() if n]
    how = "" if worst_add.seconds else ", estimated within a factor of two"
    for title, stages in (("sampling", ("rollout", "evaluate")), ("update", ("update",))):
        worst = max((x for x in found if x.planned.stage in stages), key=lambda x: x.peak)
        lines.append((title, f"{size(worst.peak):>9}  peak, in {named(worst.planned)}{how}"))
    peak = max(x.peak for x in found)
    text = f"{size(peak):>9}  of {size(limit)} per device ({peak / limit:.0%})"
    if worst_add.seconds and platform_of(run.policy.mesh) == "cpu":
        text += "; of the programs for this CPU: an accelerator's need other temporary memory"
    lines.append(("peak", text))
    if worst_add.seconds and platform_of(run.policy.mesh) == "gpu":
        count = max(kernels(x.text) for x in found if x.planned.name == "_decode")
        lines.append(("decoding", f"{count} kernels per token"))
    return lines


def _cost(run: Sketch, to: Target | None) -> list[tuple[str, str]]:
    c = run.config
    itemsize = jax.numpy.dtype(run.policy.dtype).itemsize
    work = costs.step_work(
        run.shape,
        c.rollout,
        c.algo,
        run.problems.longest,
        remat=run.goal.remat == "full",
        itemsize=itemsize,
        ways=row_ways(run),
    )
    rates = to.rates if to else costs.measured_rates(run.policy.dtype)
    time = costs.seconds(work, rates, run.policy.mesh.size)
    where = "on paper" if to else "here"
    return [
        ("step", f"{work.tokens:,} tokens at most, {work.total / 1e12:,.4g} TFLOP"),
        (
            "time",
            f"{time:,.3g} s per step at full length, were all of it as fast as one large matmul "
            f"({rates.matmul / 1e12:,.3g} TFLOP/s {where}) and one copy "
            f"({rates.copy / 1e9:,.3g} GB/s {where})",
        ),
    ]


def _compiling(planned: Sequence[Planned], found: Sequence[Account]) -> tuple[str, str]:
    spent = sum(x.seconds for x in found)
    return (
        "compiling",
        f"{spent:,.1f} s for the {len(found)} largest of {len(planned)} programs that a run with "
        "the longest prompts can need",
    )


def _task(config: Config, problems) -> str:
    counts = ", ".join(f"{len(kept):,} {split}" for split, kept in problems.indices.items())
    text = f"{config.task.name or config.task.path}: {counts}"
    if problems.too_long:
        text += f"; {problems.too_long:,} left out, longer than {config.task.max_prompt_length}"
    return text


def _rewards(config: Config) -> str:
    names = config.task.rewards or ["the task's own"]
    weights = config.task.reward_weights or [1.0] * len(names)
    return ", ".join(f"{name} x {weight:g}" for name, weight in zip(names, weights, strict=True))


def _step(config: Config) -> str:
    rollout, algo = config.rollout, config.algo
    responses = rollout.prompts * rollout.group_size
    updates = algo.minibatches * algo.epochs
    return (
        f"{rollout.prompts} prompts x {rollout.group_size} responses of at most "
        f"{rollout.max_completion_length} tokens; {algo.loss['name']}, {updates} updates of "
        f"{responses // algo.minibatches} responses"
    )


def _run(config: Config) -> str:
    optim, steps = config.optim, config.run.steps
    updates = steps * config.algo.minibatches * config.algo.epochs
    return (
        f"{steps:,} steps = {updates:,} updates, learning rate {optim.learning_rate:g} "
        f"{optim.schedule}, {optim.state} optimizer state"
    )


def _eval(config: Config, problems: Problems) -> str:
    e = config.eval
    count = min(e.problems, len(problems.indices.get(e.split, ())))
    when = f"every {e.every} steps, before and after" if e.every else "before and after"
    return f"{count} {e.split} problems, greedy and {e.samples} samples each, {when}"


def _place(directory: Path) -> str:
    found = checkpoint.steps(directory / "checkpoints")
    return f"{directory} ({f'has checkpoints of steps {found}' if found else 'new'})"
