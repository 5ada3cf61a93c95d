"""Making problems up: draws that no Python version changes, and splits that cannot overlap.

Every task of made-up problems gives each problem a canonical key: the same text for two problems
that differ only in what does not matter. The key's hash decides the split, whatever the seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby, permutations, product
from math import inf
from random import Random
from typing import Any, NamedTuple, TypeVar

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.task import SPLITS, Task, fingerprint, fraction

Item = TypeVar("Item")

PATIENCE = 20_000  # draws in a row that yield nothing new before a split counts as exhausted


class Drawn(NamedTuple):
    """A problem with what decides its place.

    Attributes:
        structure: decides the split; problems of one structure are all in the same split.
        key: what may occur once; often the structure itself.
    """

    structure: str
    key: str
    problem: Problem


def between(rng: Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included.

    Only `Random.random` promises the same numbers in every version of Python, so all draws are
    made from it; otherwise an upgrade would change a run's problems.
    """
    return low + int((high - low + 1) * rng.random())


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """One of `items`."""
    return items[between(rng, 0, len(items) - 1)]


def shuffled(rng: Random, items: Sequence[Item], count: int | None = None) -> list[Item]:
    """`count` of `items`, or all of them, in random order."""
    pool = list(items)
    for i in range(len(pool) if count is None else count):
        j = i + int((len(pool) - i) * rng.random())
        pool[i], pool[j] = pool[j], pool[i]
    return pool if count is None else pool[:count]


def listed(items: Sequence[Any]) -> str:
    """ "1, 2 and 3"."""
    return f"{', '.join(map(str, items[:-1]))} and {items[-1]}"


def mark(text: str) -> str:
    """12 hexadecimal digits of a text, for the name of a problem."""
    return blake2b(text.encode(), digest_size=6).hexdigest()


def smallest(profiles: Mapping[int, Any], text: Callable[[list[int]], str]) -> str:
    """The smallest `text` of things in an order: the same whatever order they had.

    Tried are the orders of those alone that their profiles do not tell apart.
    """
    ranked = sorted(profiles, key=profiles.__getitem__)
    alike = [permutations(group) for _, group in groupby(ranked, key=profiles.__getitem__)]
    return min(text([p for group in orders for p in group]) for orders in product(*alike))


def split_of(key: str) -> str:
    """The one split a problem can ever be in: 80 % train, 7 % val, 13 % test of all keys."""
    u = fraction(f"split {key}")
    return "train" if u < 0.80 else "val" if u < 0.87 else "test"


def chosen_sizes(defaults: dict[str, int], sizes: dict[str, int] | None) -> dict[str, int]:
    """`defaults` with what `sizes` says otherwise; ConfigError where it names no split."""
    if unknown := sorted(set(sizes or {}) - set(SPLITS)):
        raise ConfigError(f"sizes names the splits {unknown}; the splits are {list(SPLITS)}.")
    size = defaults | (sizes or {})
    for split, count in size.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"sizes.{split}={count}: wanted a whole number, 0 or more.")
    return size


def weighted(rng: Random, weights: Mapping[str, float | int]) -> str:
    """One of the names, each as often as its weight says."""
    left = rng.random() * sum(weights.values())
    for name, weight in weights.items():
        left -= weight
        if left < 0:
            return name
    return next(name for name in reversed(list(weights)) if weights[name])  # rounding


def chosen_weights(
    what: str, given: Mapping[str, Any] | Sequence[str], known: Sequence[str]
) -> dict[str, float | int]:
    """Names with weights, from such a mapping or from a list of equally frequent names.

    Raises:
        ConfigError: no names, an unknown one, or weights that are no weights; `what` is theirs.
    """
    weights = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
    if isinstance(given, str) or not weights or not set(weights) <= set(known):
        raise ConfigError(f"{what}={given}: wanted some of {list(known)}.")
    numbers = [
        w for w in weights.values() if not isinstance(w, bool) and isinstance(w, int | float)
    ]
    if len(numbers) < len(weights) or not all(0 <= w < inf for w in numbers) or not sum(numbers):
        raise ConfigError(f"{what}={given}: weights must be numbers, 0 or more, and not all 0.")
    return weights


def made_up(
    name: str,
    size: dict[str, int],
    draw: Callable[[Random, str], Drawn],
    reward: Callable[..., list[float | None]],
    *,
    seed: int,
    answer_in: Callable[[Problem, str], str | None] | None = None,
) -> Task:
    """The task of the first `size[split]` different problems that `draw` comes upon.

    "train" depends on the seed; "val" and "test" do not, so that runs with different seeds are
    judged on the same problems. A smaller split is the start of a larger one.

    Args:
        draw: (rng, split) -> a problem, at least sometimes one of that split.
        answer_in: what `Task.answer_in` says, if not the boxed answer.

    Raises:
        ConfigError: a split wants more problems than `draw` finds.
    """
    problems = {}
    for split in SPLITS:
        rng = Random(f"{name} {seed}" if split == "train" else f"{name} {split}")
        problems[split] = _draw_split(name, split, size[split], rng, draw)
    ids = {split: [problem.id for problem in problems[split]] for split in SPLITS}
    prompts = [[p.prompt, p.answer] for split in SPLITS for p in problems[split]]
    made_of = fingerprint([name, ids, prompts])
    task = Task(name, size, lambda split, i: problems[split][i], reward, fingerprint=made_of)
    return task if answer_in is None else replace(task, answer_in=answer_in)


def _draw_split(name: str, split: str, count: int, rng: Random, draw: Callable) -> list[Problem]:
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < count:
        structure, key, problem = draw(rng, split)
        if split_of(structure) == split and key not in found:
            found[key] = problem
            misses = 0
        elif (misses := misses + 1) >= PATIENCE:
            raise ConfigError(
                f"sizes.{split}={count}: {name} with these options seems to have no more than "
                f"{len(found)} different {split} problems; ask for fewer, or for more levels."
            )
    return list(found.values())
