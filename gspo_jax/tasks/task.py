"""What a task is, and the order in which a run visits its problems."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from gspo_jax.answers.verify import asked, boxed
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError

SPLITS = ("train", "val", "test")


def boxed_in(problem: Problem, text: str) -> str | None:
    """What the last box of `text` holds, or None."""
    return boxed(text, asked(problem.prompt)) or None


@dataclass(frozen=True)
class Task:
    """Problems by split and index, and the function that scores an answer to one.

    Attributes:
        name: for logs and file names.
        size: number of problems of each split; "train", "val" and "test" are always present.
        problem: (split, index) -> Problem, for 0 <= index < size[split]; the same every time.
        reward: `reward(prompts=, completions=, answer=, **columns) -> list[float | None]`.
        warnings: what the user should be told before training, one line each.
        fingerprint: differs where the problems or their order differ.
        answer_in: (problem, text) -> the answer that is read out of a response, or None if it has
            none; equal answers are equal texts, as a vote among responses needs them.
        unscored: where `reward` can score nothing: why, and what to change.
        unboxed: where no prompt asks for the box that `reward` reads: a warning.
    """

    name: str
    size: dict[str, int]
    problem: Callable[[str, int], Problem]
    reward: Callable[..., list[float | None]]
    warnings: tuple[str, ...] = ()
    fingerprint: str = ""
    answer_in: Callable[[Problem, str], str | None] = boxed_in
    unscored: str = ""
    unboxed: str = ""


def order(size: int, start: int, count: int, *, seed: int) -> list[int]:
    """Problem indices at positions start .. start + count - 1 of an endless visiting order.

    Position n belongs to epoch n // size, and each epoch is a permutation of range(size) that
    depends on (seed, epoch) alone. Nothing is carried from call to call, so a run resumed at
    any position continues with exactly the problems that it would have seen.
    """
    if size < 1:
        raise ValueError(f"a split of {size} problems has no order; it needs at least 1.")
    positions = np.arange(start, start + count)
    epochs = positions // size
    out = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(size, seed, int(epoch))[positions[here] % size]
    return out.tolist()


def staged_order(
    stages: Sequence[tuple[float | int, Sequence[int]]],
    start: int,
    count: int,
    *,
    total: int,
    seed: int,
) -> list[int]:
    """Problem indices at positions start .. start + count - 1 of a curriculum.

    Stage s begins at position ceil(share_s * total) and visits its own indices as `order` does:
    in permutations that depend on (seed, s, epoch). Like `order`, nothing is carried from call to
    call. One stage alone is `order` itself.

    Args:
        stages: (share of the run at which it begins, its indices), the first at 0, ascending.
        total: positions of the whole run; from there on the last stage goes on.
    """
    begins = [math.ceil(share * total) for share, _ in stages]
    ends = [*begins[1:], start + count]
    out: list[int] = []
    for s, (_, indices) in enumerate(stages):
        first, last = max(start, begins[s]), min(start + count, ends[s])
        if first < last:
            own = seed + (s << 40)  # another permutation in each stage
            here = order(len(indices), first - begins[s], last - first, seed=own)
            out += [indices[i] for i in here]
    return out


def curriculum_stages(
    levels: Sequence[str], starts: Mapping[str, float | int]
) -> list[tuple[float | int, list[int]]]:
    """Stages of `staged_order` in which problems join when the turn of their level comes.

    Args:
        levels: the level of every problem.
        starts: level -> share of the run at which its problems join; the others never do.

    Raises:
        ConfigError: a level that no problem has, or none that starts at 0.
    """
    if missing := [level for level in starts if level not in levels]:
        found = sorted(set(levels))[:10]
        raise ConfigError(f"task.curriculum.{missing[0]}: no such level; the task has {found}.")
    shares = sorted(set(starts.values()))
    if not shares or shares[0] != 0:
        raise ConfigError(f"task.curriculum={dict(starts)}: some level must start at 0.")
    stages = []
    for share in shares:
        open_ = {level for level, start in starts.items() if start <= share}
        stages.append((share, [i for i, level in enumerate(levels) if level in open_]))
    return stages


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw Philox words, not Generator.permutation: NumPy may change the latter between
    # versions, and a resumed run must not change its order with it.
    key = np.array([seed % 2**64, epoch], np.uint64)
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable")


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: the same on every machine and run."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def fingerprint(content: Any) -> str:
    """16 hexadecimal digits that depend on JSON-like `content` alone; dates and such as texts."""
    return blake2b(json.dumps(content, default=str).encode(), digest_size=8).hexdigest()
