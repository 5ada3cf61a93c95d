"""What one program needs: by the compiler's own account, or by a formula.

peak = alive before the call + output - what of it takes over arguments + temporary
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from gspo_jax.mesh.sharding import platform_of
from gspo_jax.plan import hlo
from gspo_jax.plan.memory import (
    Sketch,
    activation_bytes_of,
    logit_bytes_of,
    per_device,
    size,
    working_bytes_of,
)


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


class Account(NamedTuple):
    """A program's needs in bytes per device, and what compiling it took in seconds.

    Attributes:
        aliased: of the output, what takes over buffers of donated arguments.
        text: of the compiled module, for `hlo`.
        seconds: 0 where it was not compiled.
    """

    planned: Planned
    output: int
    aliased: int
    temporary: int
    text: str = ""
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        return self.planned.alive + self.output - self.aliased + self.temporary


def compiled(planned: Planned) -> Account:
    """By the compiler, which for a TPU refuses what does not fit into one; then by its refusal."""
    began = time.perf_counter()
    try:
        module = planned.lower().compile()
    except RuntimeError as error:  # XLA's own
        used = re.search(r"Used ([\d.]+)([MG]) of [\d.]+[MG] hbm", str(error))
        if used is None:
            raise
        count = int(float(used[1]) * {"M": 2**20, "G": 2**30}[used[2]])
        return Account(planned, 0, 0, count, seconds=time.perf_counter() - began)
    found = module.memory_analysis()
    return Account(
        planned,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        module.as_text(),
        time.perf_counter() - began,
    )


def estimated(run: Sketch, p: Planned) -> Account:
    """By a formula, within a factor of two on a CPU, near the compiler's account on accelerators.

    The gradient of a microbatch needs its activations and logits beside `working`; a forward pass
    keeps one layer at a time. The optimizer goes parameter by parameter, for the largest of which
    it holds the step, and in 8 bits both moments unpacked and a new code; XLA's CPU programs then
    hold the new codes of all.
    """
    h = run.held
    temporary, output = 0, 0
    if p.name == "add_grads":
        temporary = working_bytes_of(run) + activation_bytes_of(run) + logit_bytes_of(run)
    elif p.name in ("add_logps", "add_values"):
        temporary = logit_bytes_of(run) + activation_bytes_of(run, "full") + h.weights
    elif p.name == "apply":
        largest_one = max(per_device(x) for x in jax.tree.leaves(run.state.params)) // 4
        codes = h.masters // 2 if platform_of(run.policy.mesh) == "cpu" else 0
        in_8_bits = run.config.optim.state == "8bit"
        temporary = 13 * largest_one + codes if in_8_bits else 4 * largest_one
    elif p.name == "start_grads":
        output = h.gradients
    elif p.name == "to_sample":
        output = h.weights
    return Account(p, output, 0, temporary)


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


def named(p: Planned) -> str:
    """For people."""
    return f"{p.name.lstrip('_')} of {p.shape}" if p.shape else p.name


def table(found: Sequence[Account]) -> list[str]:
    """A line for each program, the largest peak first, and what its devices tell each other."""
    rows = [["program", "peak", "alive", "aliased", "temporary", "compiled in"]]
    for x in sorted(found, key=lambda x: -x.peak):
        held = (x.peak, x.planned.alive, x.aliased, x.temporary)
        rows.append([named(x.planned), *map(size, held), f"{x.seconds:.1f} s"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    told = [(x.planned, sent(x)) for x in found]
    return lines + [f"{named(planned)} sends {text}" for planned, text in told if text]


def sent(x: Account) -> str:
    """What each device sends once through the program's loop, by kind, for people."""
    count, total = Counter(), Counter()
    for each in hlo.collectives(x.text):
        count[each.kind] += 1
        total[each.kind] += each.sent
    return ", ".join(f"{size(total[kind])} in {n} {kind}" for kind, n in count.items())
