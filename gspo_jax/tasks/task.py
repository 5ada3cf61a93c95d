"""What a task is, and the order in which a run visits its problems."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from gspo_jax.batch import Problem

SPLITS = ("train", "val", "test")


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
    """

    name: str
    size: dict[str, int]
    problem: Callable[[str, int], Problem]
    reward: Callable[..., list[float | None]]
    warnings: tuple[str, ...] = ()
    fingerprint: str = ""


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
