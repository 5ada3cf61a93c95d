"""Arithmetic made on the spot: problems, worked solutions, and splits that cannot overlap."""

from random import Random

from gspo_jax.answers.verify import accuracy
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.draw import chosen_sizes, split_of
from gspo_jax.tasks.task import SPLITS, Task, fingerprint, fraction

ARITHMETIC_SIZES = {"train": 20_000, "val": 512, "test": 1024}
# Of the 325,090 problems, 259,971, 22,879 and 42,240 belong to the splits. Asking for nearly all
# of them would make drawing at random slow, and for more than all of them endless.
ARITHMETIC_LARGEST = {"train": 200_000, "val": 18_000, "test": 33_000}

Terms = tuple[int, int, int]  # a, b, c of "a+b-c"


def arithmetic(
    *,
    seed: int = 0,
    slip: float | int = 0.0,
    carrying: bool = False,
    sizes: dict[str, int] | None = None,
) -> Task:
    """Two-digit chains, "What is a+b-c?" with 10 <= a, b, c <= 99 and a+b-c >= 0.

    Each problem carries a worked solution in `columns["completion"]`, to supervise a cold start:
    the three lines ``47+25=72``, ``72-18=54`` and ``\\boxed{54}``.

    A problem belongs to the split that the hash of its canonical key says (a+b-c and b+a-c are
    the same problem), whatever the seed: no seed, size or slip can bring a held-out problem into
    training. "val" and "test" do not depend on the seed either, so that runs with different
    seeds are judged on the same problems.

    Args:
        seed: chooses the training problems.
        slip: probability that a solution forgets its carry or its borrow; see `worked_solution`.
        carrying: only problems whose solution has a carry or a borrow to forget.
        sizes: number of problems per split; what is not named keeps ARITHMETIC_SIZES.

    Raises:
        ConfigError: a slip outside [0, 1], an unknown split, or more problems than exist.
    """
    if not 0 <= slip <= 1:
        raise ConfigError(f"slip={slip} is a probability; it must lie between 0 and 1.")
    size = chosen_sizes(ARITHMETIC_SIZES, sizes)
    for split, largest in ARITHMETIC_LARGEST.items():
        largest //= 2 if carrying else 1
        if not 0 <= size[split] <= largest:
            raise ConfigError(f"sizes.{split}={size[split]}: must lie between 0 and {largest}.")
    terms = {
        split: _draw(split, size[split], Random(seed if split == "train" else split), carrying)
        for split in SPLITS
    }

    def problem(split: str, index: int) -> Problem:
        a, b, c = terms[split][index]
        return Problem(
            id=f"{a}+{b}-{c}",
            prompt=f"What is {a}+{b}-{c}?",
            answer=str(a + b - c),
            columns={"completion": worked_solution(a, b, c, slip=slip)},
        )

    made_of = fingerprint(["arithmetic", slip, terms])
    return Task("arithmetic", size, problem, accuracy, fingerprint=made_of)


def worked_solution(a: int, b: int, c: int, *, slip: float | int = 0.0) -> str:
    """a+b-c step by step, ending in a boxed value.

    With probability `slip` (decided by the hash of the problem, so always the same way) one step
    forgets its carry, as in 47+25=62, or its borrow, as in 72-18=64: the step is wrong by ten
    and the rest follows from it without a further error. A problem without carry and borrow,
    or one whose wrong value would be negative, is always solved correctly.
    """
    total = a + b
    slips = possible_slips(a, b, c)
    key = canonical_key(a, b, c)
    kind = None
    if slips and fraction(f"slip {key}") < slip:
        kind = slips[int(fraction(f"kind {key}") * len(slips))]
    total -= 10 * (kind == "carry")
    result = total - c + 10 * (kind == "borrow")
    return f"{a}+{b}={total}\n{total}-{c}={result}\n\\boxed{{{result}}}"


def possible_slips(a: int, b: int, c: int) -> list[str]:
    """What a+b-c gives to forget: "carry", "borrow", both or neither."""
    total, slips = a + b, []
    if a % 10 + b % 10 >= 10 and total - 10 >= c:
        slips.append("carry")
    if total % 10 < c % 10:
        slips.append("borrow")
    return slips


def canonical_key(a: int, b: int, c: int) -> str:
    """The same text for two problems exactly when they differ only in the order of the sum."""
    return f"{min(a, b)}+{max(a, b)}-{c}"


def _draw(split: str, count: int, rng: Random, carrying: bool) -> list[Terms]:
    """The first `count` problems of `split` that `rng` comes upon, without repetition."""
    found: dict[str, Terms] = {}
    while len(found) < count:
        a, b, c = (10 + int(90 * rng.random()) for _ in range(3))
        key = canonical_key(a, b, c)
        wanted = a + b >= c and (not carrying or possible_slips(a, b, c))
        if wanted and split_of(key) == split:
            found.setdefault(key, (a, b, c))
    return list(found.values())
