"""What a run keeps in memory, by kind, and how much of it a device has.

Bytes per device at any time:

    always    float32 masters, the optimizer's moments, the reference (with a KL term), the critic
    rollout   + the sampler's weights (unless it computes in float32 too and fsdp splits nothing:
              then they are the masters) + the cache
    update    + the gradients + what one microbatch needs: activations, its own gradients, logits

The peak is the largest of these over all programs: alive before the call (arguments included)
+ output - what the output takes over from donated arguments + temporary. The first comes from
shapes, the others from the compiled program's own account.
"""

import math
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from gspo_jax.config import Config
from gspo_jax.errors import OutOfMemory
from gspo_jax.generate import LENGTHS
from gspo_jax.microbatch import rows_of, widths
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.remat import share_of
from gspo_jax.objective import Objective
from gspo_jax.policy import Policy, Problems
from gspo_jax.sharding import RULES, sharding_for, unsplit, ways_of
from gspo_jax.update import TrainState


class Planned(NamedTuple):
    """One program, not yet compiled.

    Attributes:
        stage: "rollout", "evaluate" or "update".
        name: of the jitted function.
        shape: what tells it from others of the name, for people.
        lower: traces it; `.compile()` of that is the program.
        alive: bytes per device when it is called, its arguments included.
    """

    stage: str
    name: str
    shape: str
    lower: Callable[[], Any]
    alive: int


class Compiled(NamedTuple):
    """A program and its own account, in bytes per device and seconds."""

    planned: Planned
    output: int
    aliased: int
    temporary: int
    seconds: float

    @property
    def peak(self) -> int:
        return self.planned.alive + self.output - self.aliased + self.temporary


class Held(NamedTuple):
    """Bytes per device of what lives longer than one program."""

    masters: int
    moments: int
    reference: int = 0
    critic: int = 0
    weights: int = 0  # the sampler's own copy
    gradients: int = 0

    @property
    def always(self) -> int:
        """From the first step to the last."""
        return self.masters + self.moments + self.reference + self.critic


class Sketch(NamedTuple):
    """What `train` builds before its first step; shapes stand for arrays, or the arrays."""

    config: Config
    shape: QwenConfig
    policy: Policy
    problems: Problems
    state: TrainState
    goal: Objective
    optimizer: Any
    held: Held


def held_by(state: TrainState, *, dtype: str, reference: bool) -> Held:
    """What a run with this state (or its shapes) holds; `dtype` is that of the sampler."""
    masters = per_device(state.params)
    trained_too = per_device(state.critic.params) if state.critic is not None else 0
    return Held(
        masters=masters,
        moments=per_device(state.opt_state),
        reference=masters if reference else 0,
        critic=per_device(state.critic),
        weights=_sampler_bytes(state.params, dtype),
        gradients=masters + trained_too,
    )


def _sampler_bytes(params: PyTree, dtype: str) -> int:
    """Of the sampler's weights on one device; 0 where it computes with the masters."""
    total, itemsize = 0, jax.numpy.dtype(dtype).itemsize
    for p in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "axes")):
        (x,) = jax.tree.leaves(p)
        mesh = getattr(getattr(x, "sharding", None), "mesh", None)
        where = mesh and sharding_for(unsplit(p.axes), mesh, x.shape)
        total += math.prod(where.shard_shape(x.shape) if where else x.shape) * itemsize
    return 0 if dtype == "float32" and total == per_device(params) else total


def compile_one(planned: Planned) -> Compiled:
    """The program, compiled, with what XLA says of its memory."""
    began = time.perf_counter()
    found = planned.lower().compile().memory_analysis()
    return Compiled(
        planned,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        time.perf_counter() - began,
    )


def largest(planned: Sequence[Planned]) -> list[Planned]:
    """The programs that can set the peak: of each name the one with most alive.

    Of the update's all, since one of fewer tokens with longer rows may need more.
    """
    chosen: dict[str, Planned] = {}
    for p in planned:
        key = f"{p.name} {p.shape}" if p.stage == "update" else p.name
        if key not in chosen or p.alive > chosen[key].alive:
            chosen[key] = p
    return list(chosen.values())


def per_device(tree: PyTree) -> int:
    """Bytes of the arrays in `tree` on one of the devices that share them; shapes will do."""
    total = 0
    for x in jax.tree.leaves(tree):
        where = getattr(x, "sharding", None)
        shape = x.shape if where is None else where.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def capacity() -> int:
    """Bytes that one device can give: the accelerator's limit, or a share of the machine's RAM.

    Of that only what this process may have, where its container or `ulimit -v` says so.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits += [space] if space != resource.RLIM_INFINITY else []
    limits += cgroup_limits()
    return min(limits) // jax.local_device_count()


def cgroup_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that this process's control groups allow, its own and every one above it.

    Containers, Slurm and systemd limit a group or one of its parents. Version 2 has one tree
    ("0::/path", memory.max), version 1 one of memory ("9:memory:/path", memory.limit_in_bytes; of
    no limit it says a number larger than any machine has). In a container the path may be the
    host's, and what is mounted is the container's own group: then that is all there is to see.
    """
    lines = membership.read_text().splitlines() if membership.is_file() else ["0::/"]
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        is_v1 = "memory" in controllers.split(",")
        if controllers and not is_v1:
            continue
        tree = root / "memory" if is_v1 else root
        name = "memory.limit_in_bytes" if is_v1 else "memory.max"
        place = tree / path.lstrip("/")
        groups = [group for group in (place, *place.parents) if group.is_relative_to(tree)]
        for group in groups:
            with suppress(OSError, ValueError):  # no such file; "max"
                limits.append(int((group / name).read_text()))
    return limits


def microbatch_shapes(run: Sketch, rows: int) -> list[tuple[int, int]]:
    """(width, rows) of each microbatch of a minibatch of `rows`."""
    return [(w, rows_of(w, run.goal.microbatch, rows, ways(run))) for w in widths(run.goal.longest)]


def activations(run: Sketch, layers: int | None = None) -> int:
    """Bytes per device that a microbatch keeps for its backward pass, by a formula.

    Per token and layer without rematerialisation: 6 D (residuals and norms), 3 N H + 3 K H
    (queries, keys, values, heads), 4 F (MLP; X of F with experts), and N S twice (scores and
    weights). With it: D, and one layer in whole.
    """
    c = share_of(run.shape, tensor_ways(run))
    width, rows = max(microbatch_shapes(run, 1 << 30), key=lambda shape: math.prod(shape))
    itemsize = jax.numpy.dtype(run.policy.dtype).itemsize
    mlp = c.intermediate_size if c.experts is None else c.experts.size * c.experts.per_token
    heads = 3 * (c.num_heads + c.num_kv_heads) * c.head_dim
    numbers = (6 * c.hidden_size + heads + 4 * mlp) * itemsize
    attention = c.num_heads * width * (4 + itemsize)
    one = numbers + attention
    if layers is None:
        layers = c.num_layers if run.config.model.remat in ("auto", "none") else 1
    kept = layers * one + c.num_layers * c.hidden_size * itemsize
    return rows // ways(run) * width * kept


def head(run: Sketch) -> int:
    """Bytes per device of the logits that are alive at a time, and of their gradient."""
    width, rows = microbatch_shapes(run, 1 << 30)[0]
    positions = min(rows // ways(run) * width, 4096)
    return 3 * positions * -(-run.shape.vocab_size // tensor_ways(run)) * 4


def cache(run: Sketch) -> int:
    """Bytes per device of the rollout's keys and values, when all responses are full."""
    c, r = run.shape, run.config.rollout
    slots = run.problems.longest + r.max_completion_length
    rows = -(-r.prompts * r.group_size // ways(run))
    itemsize = jax.numpy.dtype(run.policy.dtype).itemsize
    heads = c.num_kv_heads // tensor_ways(run)
    return 2 * c.num_layers * rows * heads * c.head_dim * slots * itemsize


def short_memory(run: Sketch) -> str:
    """What is kept, in one line, from shapes alone."""
    return f"{_kinds(run)} per device, estimated (gspo-jax plan compiles)"


def stages(run: Sketch, *, least: bool = False) -> dict[str, int]:
    """Bytes per device at the peak of each stage, by formulas.

    With `least`, what no length of the responses and no kernel can lower: the cache in its first
    portion, and activations, of one layer, only where XLA's own attention is sure.
    """
    h, cpu = run.held, run.policy.mesh.devices.flat[0].platform == "cpu"
    kept = activations(run, layers=1 if least else None) if cpu or not least else 0
    update = h.always + 2 * h.gradients + 2 * h.weights + kept + head(run)
    portion = cache(run) // LENGTHS if least else cache(run)
    return {"update": update, "rollout": h.always + h.weights + portion}


def refuse_hopeless(run: Sketch) -> None:
    """Stop before compiling what cannot fit by far; killed by the kernel, nobody would know why.

    Raises:
        OutOfMemory: even the least estimate is twice what a device has.
    """
    stage, need = max(stages(run, least=True).items(), key=lambda x: x[1])
    if need > 2 * capacity():
        raise OutOfMemory(f"it would run out of memory: {_advice(run, stage, need)}")


@contextmanager
def explained(run: Sketch) -> Iterator[None]:
    """Turn an allocation that failed, while compiling or running, into one line of advice.

    Raises:
        OutOfMemory: what the run needs by estimate, what the device has, what to lower.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # XLA's is a RuntimeError
        text = str(error)
        ours = isinstance(error, OutOfMemory) or "No space left" in text
        if ours or not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text):
            raise
        stage, need = max(stages(run).items(), key=lambda x: x[1])
        raise OutOfMemory(f"out of memory{wanted(text)}: {_advice(run, stage, need)}") from error


def wanted(text: str) -> str:
    """What the allocator said that it was asked for, in parentheses after a space, if it did."""
    found = re.search(r"allocat\w* ([\d.]+ ?\w+)", text)
    return f" (allocating {found[1]})" if found else ""


def _advice(run: Sketch, stage: str, need: int) -> str:
    c, limit = run.config, capacity()
    rows = microbatch_shapes(run, 1 << 30)[0][1]
    length = f"rollout.max_completion_length={c.rollout.max_completion_length}"
    if run.held.always + run.held.gradients > limit:  # whatever the batch is
        knobs = ["optim.state=8bit"] if c.optim.state == "float32" else []
        knobs += ["algo.kl.coef=0"] if run.held.reference else []
        knobs += [f"mesh.fsdp={2 * c.mesh.fsdp}", "a smaller model.path"]
        change = f"Set {knobs[0]} or {knobs[1]}"
    elif stage == "rollout":
        change = f"Lower rollout.prompts={c.rollout.prompts} or {length}"
    else:
        change = f"Lower algo.microbatch={c.algo.microbatch or rows} or {length}"
    return (
        f"the {stage} needs about {size(need)} per device by estimate ({_kinds(run)}), which has "
        f"{size(limit)}. {change}; gspo-jax plan says what fits."
    )


def _kinds(run: Sketch) -> str:
    h = run.held
    extra = {"sampler": h.weights, "reference": h.reference, "critic": h.critic}
    parts = {"masters": h.masters, "moments": h.moments, "gradients": h.gradients, **extra}
    parts |= {"cache": cache(run), "activations": activations(run), "logits": head(run)}
    return ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)


def size(count: int) -> str:
    """For people, in decimal units."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def ways(run: Sketch) -> int:
    """Devices that rows are split over."""
    return ways_of(RULES["batch"], run.policy.mesh)


def tensor_ways(run: Sketch) -> int:
    """Devices that heads, MLP and vocabulary are split over."""
    return run.policy.mesh.shape["tensor"]
