"""What a run keeps in memory, by kind.

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
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from gspo_jax.algo.logps import head_bytes
from gspo_jax.config.load import Config
from gspo_jax.errors import OutOfMemory
from gspo_jax.mesh.distributed import agreed
from gspo_jax.mesh.sharding import RULES, platform_of, sharding_for, unsplit, ways_of
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.remat import POLICIES, activation_bytes, choose_remat, share_of
from gspo_jax.plan.capacity import capacity
from gspo_jax.policy import Passes, Policy, Problems, TextSizes, attention
from gspo_jax.rollout.schedule import LENGTHS
from gspo_jax.update.microbatch import shapes
from gspo_jax.update.objective import Objective
from gspo_jax.update.state import TrainState

MANY = 1 << 30  # rows of a minibatch that fills every microbatch


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


def passes(
    config: Config,
    policy: Policy,
    shape: QwenConfig,
    held: Held,
    sizes: TextSizes,
    *,
    limit: int | None = None,
) -> Passes:
    """How a run's passes are run: what is configured, with every "auto" decided.

    `train` asks with its arrays, `plan` with shapes: what is decided is the same.

    Args:
        held: with a separate critic or without it, as it may still have to be made.
        limit: bytes of a device; None asks the device. Without a known limit, as on a CPU,
            "auto" recomputes nothing; else as little as there is memory for.
    """
    everywhere = not agreed(attention(config, policy.dtype, shape, policy.mesh).name != "cudnn")
    how = Passes("cudnn" if everywhere else "xla", config.model.remat)
    if how.remat != "auto":
        return how
    others = 0
    if limit is None:
        limit, in_use = _of_device(policy.mesh.local_devices[0])
        others = max(in_use - held.masters - held.moments, 0)
    if limit is None:
        return how._replace(remat="none")
    if config.algo.critic.kind == "separate" and not held.critic:
        more = held.masters + held.moments
        held = held._replace(critic=more, gradients=2 * held.gradients)
    platform = platform_of(policy.mesh)
    fixed = held.always + held.gradients + working(held, policy.dtype, platform)
    fixed += logit_need(shape, policy.mesh, sizes, policy.dtype, platform)
    need = {
        name: activation_need(shape, policy.mesh, sizes, policy.dtype, how._replace(remat=name))
        for name in POLICIES
    }
    chosen = choose_remat(limit - others - fixed, need)
    chosen = POLICIES[agreed(POLICIES.index(chosen))]  # the process with least memory decides
    return how._replace(remat=chosen)


def _of_device(device: Any) -> tuple[int | None, int]:
    """Bytes that an accelerator has and that are in use; None where it has no limit of its own."""
    stats = device.memory_stats() or {}
    if device.platform == "cpu" or "bytes_limit" not in stats:
        return None, 0
    return int(stats["bytes_limit"]), int(stats["bytes_in_use"])


def working(held: Held, dtype: str, platform: str) -> int:
    """Bytes per device beside activations and logits while a gradient is computed.

    In 16 bits the weights to compute with. XLA's CPU programs also finish a microbatch's own
    gradients, in the masters' dtype and in 16 bits, before they add any.
    """
    itemsize = jax.numpy.dtype(dtype).itemsize
    cast = held.masters * itemsize // 4 if itemsize < 4 else 0
    return held.gradients + 2 * cast if platform == "cpu" else cast


def activation_need(
    shape: QwenConfig, mesh: Mesh, sizes: TextSizes, dtype: str, how: Passes
) -> int:
    """Bytes per device that the largest microbatch keeps for its backward pass (`models.remat`)."""
    tensor, rows_over = mesh.shape["tensor"], ways_of(RULES["batch"], mesh)
    share, itemsize = share_of(shape, tensor), jax.numpy.dtype(dtype).itemsize
    return max(
        activation_bytes(
            share,
            how.remat,
            tokens=rows // rows_over * width,
            width=width,
            itemsize=itemsize,
            attention=how.attention,
        )
        for width, rows in shapes(sizes.longest, sizes.microbatch_tokens, MANY, rows_over)
    )


def logit_need(shape: QwenConfig, mesh: Mesh, sizes: TextSizes, dtype: str, platform: str) -> int:
    """Bytes per device of the logits that are alive at a time, and of their gradient.

    On an accelerator once in float32, and their gradient in `dtype`.
    """
    tensor, rows_over = mesh.shape["tensor"], ways_of(RULES["batch"], mesh)
    width, rows = shapes(sizes.longest, sizes.microbatch_tokens, MANY, rows_over)[0]
    three = head_bytes(rows // rows_over * width, -(-shape.vocab_size // tensor))
    if platform == "cpu":
        return three
    return three // 12 * (4 + jax.numpy.dtype(dtype).itemsize)


def _sampler_bytes(params: PyTree, dtype: str) -> int:
    """Of the sampler's weights on one device; 0 where it computes with the masters."""
    total, itemsize = 0, jax.numpy.dtype(dtype).itemsize
    for p in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "axes")):
        (x,) = jax.tree.leaves(p)
        mesh = getattr(getattr(x, "sharding", None), "mesh", None)
        where = mesh and sharding_for(unsplit(p.axes), mesh, x.shape)
        total += math.prod(where.shard_shape(x.shape) if where else x.shape) * itemsize
    return 0 if dtype == "float32" and total == per_device(params) else total


def per_device(tree: PyTree) -> int:
    """Bytes of the arrays in `tree` on one of the devices that share them; shapes will do."""
    total = 0
    for x in jax.tree.leaves(tree):
        where = getattr(x, "sharding", None)
        shape = x.shape if where is None else where.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def microbatch_shapes(run: Sketch, rows: int) -> list[tuple[int, int]]:
    """(width, rows) of each microbatch of a minibatch of `rows`."""
    return shapes(run.goal.longest, run.goal.microbatch_tokens, rows, row_ways(run))


def working_bytes_of(run: Sketch) -> int:
    """`working` of the run."""
    return working(run.held, run.policy.dtype, platform_of(run.policy.mesh))


def activation_bytes_of(run: Sketch, remat: str = "") -> int:
    """`activation_need` of the run, or with another `remat`: "full" is also a pass forward alone,
    which has one layer at a time in whole."""
    how = Passes(run.goal.attention, remat or run.goal.remat)
    return activation_need(run.shape, run.policy.mesh, _sizes(run), run.policy.dtype, how)


def logit_bytes_of(run: Sketch) -> int:
    """`logit_need` of the run."""
    mesh, dtype = run.policy.mesh, run.policy.dtype
    return logit_need(run.shape, mesh, _sizes(run), dtype, platform_of(mesh))


def _sizes(run: Sketch) -> TextSizes:
    goal = run.goal
    return TextSizes(goal.microbatch_tokens, goal.longest, goal.shortest_prompt)


def cache_bytes_of(run: Sketch) -> int:
    """Bytes per device of the rollout's keys and values, when all responses are full."""
    c, r = run.shape, run.config.rollout
    slots = run.problems.longest + r.max_completion_length
    rows = -(-r.prompts * r.group_size // row_ways(run))
    itemsize = jax.numpy.dtype(run.policy.dtype).itemsize
    heads = c.num_kv_heads // tensor_ways(run)
    return 2 * c.num_layers * rows * heads * c.head_dim * slots * itemsize


def short_memory(run: Sketch) -> str:
    """What is kept, in one line, from shapes alone."""
    return f"{_kinds(run)} per device, estimated (gspo-jax plan compiles)"


def stages(run: Sketch, *, least: bool = False) -> dict[str, int]:
    """Bytes per device at the peak of each stage, by formulas.

    With `least`, what no length of the responses and no compiler can lower: the cache in its first
    portion, and the activations of one layer.
    """
    h = run.held
    kept = activation_bytes_of(run, "full" if least else "")
    update = h.always + h.gradients + working_bytes_of(run) + kept + logit_bytes_of(run)
    portion = cache_bytes_of(run) // LENGTHS if least else cache_bytes_of(run)
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
    rows = microbatch_shapes(run, MANY)[0][1]
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
    parts |= {
        "cache": cache_bytes_of(run),
        "activations": activation_bytes_of(run),
        "logits": logit_bytes_of(run),
    }
    return ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)


def size(count: int) -> str:
    """For people, in decimal units."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def row_ways(run: Sketch) -> int:
    """Devices that rows are split over."""
    return ways_of(RULES["batch"], run.policy.mesh)


def tensor_ways(run: Sketch) -> int:
    """Devices that heads, MLP and vocabulary are split over."""
    return run.policy.mesh.shape["tensor"]
