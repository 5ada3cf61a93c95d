"""Where every array of a training step lives: its shape, its logical axes, its place on the mesh.

Arrays that differ only in the number of their layer are one line. Two tables: of the parameters,
with what follows them (gradients, moments, the sampler's copy), and of the rest.
"""

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gspo_jax.algo.logps import CHUNK
from gspo_jax.mesh.sharding import (
    GATHERED,
    RULES,
    Axes,
    Names,
    leaves_of,
    partition_spec,
    sharding_for,
    unsplit,
    ways_of,
)
from gspo_jax.models.cache import AXES as CACHE
from gspo_jax.plan.memory import Sketch, microbatch_shapes, per_device, row_ways, size


class Line(NamedTuple):
    """An array, or several alike."""

    name: str
    times: int
    dtype: str
    shape: tuple[int, ...]
    axes: Axes


def page(run: Sketch) -> str:
    """The two tables, for people."""
    mesh = run.policy.mesh
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
    head = (
        f"{mesh.size} devices: {axes}. Bytes are those of one of them. A mesh axis in brackets "
        "would split what it does not divide; that stays whole."
    )
    if mesh.shape[GATHERED] > 1:
        head += (
            f" Weights split over {GATHERED} are put together where they are used, the largest "
            f"layer in {_bytes(largest_layer(run))} of {run.policy.dtype}, and dropped again."
        )
    return "\n".join([*_wrapped(head), "", *_parameters(run), "", *_others(run)])


def largest_layer(run: Sketch) -> int:
    """Bytes of the largest parts of the network that are used together, whole along GATHERED."""
    itemsize = jax.numpy.dtype(run.policy.dtype).itemsize
    totals: dict[str, int] = {}
    for _, leaf, (names, axes) in leaves_of(run.policy.params, run.policy.params):
        if len(leaf.shape) > 1:
            where = sharding_for(unsplit(axes), run.policy.mesh, leaf.shape)
            count = math.prod(where.shard_shape(leaf.shape)) * itemsize
            part = ".".join(names[:2]) if names[0] == "layers" else names[0]
            totals[part] = totals.get(part, 0) + count
    return max(totals.values())


# ---------------------------------------------------------------------------------- parameters


def _parameters(run: Sketch) -> list[str]:
    """One line per parameter: masters, gradients, moments and the sampler's weights."""
    params = run.state.params
    moments: dict[Names, list[Any]] = {}
    others = 0
    for _, leaf, (names, _) in leaves_of(run.state.opt_state, params):
        moments.setdefault(names, []).append(leaf)
        others += per_device(leaf) if not names else 0
    groups: dict[tuple, list[tuple[Names, Any]]] = {}
    for _, leaf, (names, axes) in leaves_of(params, params):
        groups.setdefault((_without_number(names), leaf.shape, axes), []).append((names, leaf))
    rows: list[tuple[str, ...]] = [
        ("parameters", "", "shape", "axes", "over", "masters", "gradients", "moments", "sampler")
    ]
    totals = [0, 0, 0, 0]
    for (name, shape, axes), members in groups.items():
        leaves = [leaf for _, leaf in members]
        held = [
            per_device(leaves),
            per_device(leaves),
            sum(per_device(moments.get(names, [])) for names, _ in members),
            len(members) * _sampler(run, shape, axes),
        ]
        totals = [a + b for a, b in zip(totals, held, strict=True)]
        line = Line(f"{_numbers(members)}{name}", len(members), "float32", shape, axes)
        rows.append((*_described(run, line), *map(_bytes, held)))
    rows.append(("together", "", "", "", "", *map(_bytes, totals)))
    return [*_table(rows, left=5), *_wrapped(_notes(run, others))]


def _notes(run: Sketch, others: int) -> str:
    """What the table of the parameters leaves unsaid."""
    moments = "Moments are two float32 numbers per parameter, and live there too"
    if run.config.optim.state == "8bit":
        moments = (
            "Moments are two 8-bit codes per parameter, which live there too, and a float32 scale "
            "for every 256 of them or fewer, split alike where blocks divide; small ones are "
            "two float32 numbers"
        )
    sampler = "The sampler uses the masters."
    if run.held.weights:
        sampler = (
            f"The sampler's copy, in {run.policy.dtype}, is whole along {GATHERED} for the time of "
            "a rollout."
        )
    return (
        f"Masters are float32. Gradients are accumulated in float32, where the masters live. "
        f"{moments}; {_bytes(others)} of counters. {sampler}"
    )


def _sampler(run: Sketch, shape: tuple[int, ...], axes: Axes) -> int:
    if not run.held.weights:
        return 0
    where = sharding_for(unsplit(axes), run.policy.mesh, shape)
    return math.prod(where.shard_shape(shape)) * jax.numpy.dtype(run.policy.dtype).itemsize


def _without_number(names: Names) -> str:
    return re.sub(r"^layers\.\d+\.", "", ".".join(names))


def _numbers(members: Sequence[tuple[Names, Any]]) -> str:
    numbers = [int(names[1]) for names, _ in members if names[0] == "layers"]
    if not numbers:
        return ""
    first, last = min(numbers), max(numbers)
    return f"layers {first}-{last}: " if last > first else f"layer {first}: "


# --------------------------------------------------------------------------------------- others


def _others(run: Sketch) -> list[str]:
    rows: list[tuple[str, ...]] = [("the rest", "", "shape", "axes", "over", "dtype", "bytes")]
    for title, lines in (
        ("a minibatch", _batch(run)),
        ("a microbatch, per layer", _activations(run)),
        ("sampling", _sampling(run)),
    ):
        rows.append((f"{title}:", "", "", "", "", "", ""))
        for line in lines:
            where = sharding_for(line.axes, run.policy.mesh, line.shape)
            count = math.prod(where.shard_shape(line.shape)) * jax.numpy.dtype(line.dtype).itemsize
            described = _described(run, line._replace(name=f"  {line.name}"))
            rows.append((*described, line.dtype, _bytes(line.times * count)))
    return _table(rows, left=6)


def _batch(run: Sketch) -> list[Line]:
    """What the update is given, and what it finds."""
    r = run.config.rollout
    B = r.prompts * r.group_size // run.config.algo.minibatches
    S, T = run.goal.longest, r.max_completion_length
    return [
        Line("tokens", 1, "int32", (B, S), ("batch", None)),
        Line("mask", 1, "bool", (B, T), ("batch", None)),
        Line("prompt_length, adv", 2, "float32", (B,), ("batch",)),
        Line("old_logp, logp, entropy", 3, "float32", (B, T), ("batch", None)),
    ]


def _activations(run: Sketch) -> list[Line]:
    """Of the widest microbatch."""
    c, dtype = run.shape, run.policy.dtype
    S, m = microbatch_shapes(run, 1 << 30)[0]
    T = min(run.config.rollout.max_completion_length, S - run.goal.shortest_prompt)
    positions = row_ways(run) * min(m // row_ways(run) * T, CHUNK)
    heads = ("batch", "heads", None, None)
    lines = [
        Line("hidden states", 1, dtype, (m, S, c.hidden_size), ("batch", None, None)),
        Line("queries", 1, dtype, (m, c.num_heads, S, c.head_dim), heads),
        Line("keys, values", 2, dtype, (m, c.num_kv_heads, S, c.head_dim), CACHE),
        Line("scores (not with cuDNN)", 1, "float32", (m, c.num_heads, S, S), heads),
    ]
    if c.experts is None:
        inner = ("batch", None, "mlp")
        lines.append(Line("gate, up", 2, dtype, (m, S, c.intermediate_size), inner))
    else:
        E, X, F = c.experts.count, c.experts.per_token, c.experts.size
        assigned = (m * S, X, F)
        lines += [
            Line("router's probabilities", 1, "float32", (m * S, E), ("batch", None)),
            Line("experts' gate, up (mean)", 2, dtype, assigned, ("batch", None, "mlp")),
        ]
    logits = (positions, c.vocab_size)
    return [*lines, Line("logits (after the last)", 1, "float32", logits, ("batch", "vocab"))]


def _sampling(run: Sketch) -> list[Line]:
    c, r = run.shape, run.config.rollout
    B = -(-r.prompts * r.group_size // row_ways(run)) * row_ways(run)
    slots = run.problems.longest + r.max_completion_length
    cache = (B, c.num_kv_heads, slots, c.head_dim)
    layers = f"keys, values 0-{c.num_layers - 1}"
    return [
        Line(layers, 2 * c.num_layers, run.policy.dtype, cache, CACHE),
        Line("logits", 1, "float32", (B, c.vocab_size), ("batch", "vocab")),
    ]


# ---------------------------------------------------------------------------------------- text


def _described(run: Sketch, line: Line) -> tuple[str, ...]:
    """Name, count, shape, logical axes, and the mesh axes that each of them is split over."""
    mesh = run.policy.mesh
    spec = partition_spec(line.axes, mesh, line.shape)
    over = []
    for axis, part in zip(line.axes, spec, strict=True):
        wanted = RULES[axis] if axis else None
        if part is None and ways_of(wanted, mesh) > 1:
            over.append(f"({'+'.join((wanted,) if isinstance(wanted, str) else wanted or ())})")
        else:
            over.append("-" if part is None else part if isinstance(part, str) else "+".join(part))
    return (
        line.name,
        f"x {line.times}" if line.times > 1 else "",
        f"[{', '.join(map(str, line.shape))}]",
        " ".join(axis or "-" for axis in line.axes),
        " ".join(over),
    )


def _bytes(count: int) -> str:
    return f"{count / 1e3:,.1f} kB" if count < 1e5 else size(count)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118)


def _table(rows: Sequence[tuple[str, ...]], *, left: int) -> list[str]:
    """Columns side by side, the first `left` of them aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
