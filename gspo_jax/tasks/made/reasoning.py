"""Four types of short problems at three levels, made up, each with exactly one right answer.

type                easy                  medium                 hard
arithmetic_chain    a + b - c             (a + b) * c - d        ((a + b) * c - d) / e
pattern_completion  + d each time         * r each time          * b and + a in turn
logical_reasoning   two people            three people           order of four runners
word_problems       one change            two changes            three, one of them a factor
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations, product
from random import Random
from typing import NamedTuple

from gspo_jax.answers.verify import list_accuracy
from gspo_jax.batch import Problem
from gspo_jax.tasks.draw import (
    Drawn,
    between,
    chosen_sizes,
    chosen_weights,
    made_up,
    mark,
    pick,
    shuffled,
    weighted,
)
from gspo_jax.tasks.task import Task

REASONING_SIZES = {"train": 10_000, "val": 400, "test": 800}
MIX = {"easy": 0.5, "medium": 0.3, "hard": 0.2}
_NAMES = (
    "Amir Anna Bella Carlos Clara Daniel Diana Emma Felix Finn Grace Hanna Ivan Jack Julia Kenji "
    "Laura Leo Lena Maya Marco Mei Nadia Noah Nora Omar Paula Peter Priya Rosa Ruth Samuel Sofia "
    "Tara Theo Tom Uma Victor Wendy Yusuf Zoe"
)
_COLORS = "black blue brown green gray orange pink purple red white yellow"
_THINGS = "apples books cards coins marbles pencils photos shells stamps stickers"
NAMES, COLORS, THINGS = _NAMES.split(), _COLORS.split(), _THINGS.split()
OWNED = (("hat", "hats"), ("bag", "bags"), ("scarf", "scarves"), ("cup", "cups"), ("kite", "kites"))
PLACES = ("first", "second", "third", "last")


class Item(NamedTuple):
    """What a generator makes.

    Attributes:
        key: the same text for two problems exactly when they are the same problem.
        query: the question.
        answer: the final answer, in the form that the question asks for.
        steps: how it is found.
        structure: decides the split where it is not the key: what is left without names.
    """

    key: str
    query: str
    answer: str
    steps: str
    structure: str = ""


def reasoning_mix(
    *,
    seed: int = 0,
    types: Mapping[str, float | int] | Sequence[str] | None = None,
    levels: Mapping[str, float | int] | Sequence[str] = MIX,
    sizes: dict[str, int] | None = None,
) -> Task:
    """The four types at the three levels, with the columns query, reference_answer, type,
    difficulty, target_answer and id.

    Problems that differ only in the order of a sum, or in who owns what in a word problem, are
    the same problem; the hash of what is left decides the split.

    Args:
        seed: chooses the training problems.
        types, levels: a list of names, or how often each of them is wanted.
        sizes: number of problems per split; what is not named keeps REASONING_SIZES.

    Raises:
        ConfigError: an unknown type, level or split, or more problems than there are.
    """
    kinds = chosen_weights("types", list(TYPES) if types is None else types, list(TYPES))
    mix = chosen_weights("levels", levels, list(MIX))

    def draw(rng: Random, split: str) -> Drawn:
        kind, level = weighted(rng, kinds), weighted(rng, mix)
        item = TYPES[kind][level](rng)
        return Drawn(item.structure or item.key, item.key, to_problem(kind, level, item))

    sizes = chosen_sizes(REASONING_SIZES, sizes)
    return made_up("reasoning", sizes, draw, list_accuracy, seed=seed)


def to_problem(kind: str, level: str, item: Item) -> Problem:
    """The item with its columns; the prompt says where the answer goes."""
    name = f"{kind}-{level}-{mark(item.key)}"
    worked = f"{item.steps}\n\\boxed{{{item.answer}}}"
    how = ", separated by commas" if "," in item.answer else ""
    columns = {
        "query": item.query,
        "reference_answer": worked,
        "type": kind,
        "difficulty": level,
        "target_answer": item.answer,
        "id": name,
        "completion": worked,
    }
    prompt = f"{item.query}\nGive the final answer in \\boxed{{}}{how}."
    return Problem(name, prompt, item.answer, columns)


# ----------------------------------------------------------------------------------- numbers


def chain_easy(rng: Random) -> Item:
    a, b, c = (between(rng, 1, 99) for _ in range(3))
    s, t = pick(rng, "+-"), pick(rng, "+-")
    first = a + b if s == "+" else a - b
    value = first + c if t == "+" else first - c
    plus = sorted([a, *[n for n, sign in ((b, s), (c, t)) if sign == "+"]])
    minus = sorted(n for n, sign in ((b, s), (c, t)) if sign == "-")
    return Item(
        f"chain +{plus} -{minus}",
        f"What is {a} {s} {b} {t} {c}?",
        str(value),
        f"{a} {s} {b} = {first}\n{first} {t} {c} = {value}",
    )


def chain_medium(rng: Random) -> Item:
    a, b, c, d = (between(rng, 1, high) for high in (50, 50, 15, 99))
    total = a + b
    value = total * c - d
    return Item(
        f"chain ({min(a, b)}+{max(a, b)})*{c}-{d}",
        f"What is ({a} + {b}) * {c} - {d}?",
        str(value),
        f"{a} + {b} = {total}\n{total} * {c} = {total * c}\n{total * c} - {d} = {value}",
    )


def chain_hard(rng: Random) -> Item:
    a, b, c, e = (between(rng, low, 20) for low in (1, 1, 2, 2))
    total, product = a + b, (a + b) * c
    d = product % e + e * between(rng, 0, 3)  # what is left can be divided by e
    if not 0 < d < product:
        return chain_hard(rng)
    value = (product - d) // e
    return Item(
        f"chain (({min(a, b)}+{max(a, b)})*{c}-{d})/{e}",
        f"What is (({a} + {b}) * {c} - {d}) / {e}?",
        str(value),
        f"{a} + {b} = {total}\n{total} * {c} = {product}\n{product} - {d} = {product - d}\n"
        f"{product - d} / {e} = {value}",
    )


def _pattern(key: str, shown: list[int], rule: str, value: int, steps: str) -> Item:
    listed = ", ".join(map(str, shown))
    return Item(
        f"pattern {key} {listed}",
        f"Here is the start of a sequence: {listed}. {rule} Which number comes next?",
        str(value),
        steps,
    )


def pattern_easy(rng: Random) -> Item:
    start, step = between(rng, 1, 200), between(rng, 2, 40) * pick(rng, (1, -1))
    terms = [start + i * step for i in range(5)]
    return _pattern(
        "sum",
        terms[:4],
        "Each number differs from the one before it by the same amount.",
        terms[4],
        f"The difference is {terms[1]} - {terms[0]} = {step}."
        f"\n{terms[3]} {'+' if step > 0 else '-'} {abs(step)} = {terms[4]}",
    )


def pattern_medium(rng: Random) -> Item:
    start, ratio = between(rng, 1, 200), between(rng, 2, 9)
    terms = [start * ratio**i for i in range(5)]
    steps = f"{terms[1]} / {terms[0]} = {ratio}\n{terms[3]} * {ratio} = {terms[4]}"
    if rng.random() < 0.3:
        terms.reverse()
        steps = f"{terms[0]} / {terms[1]} = {ratio}\n{terms[3]} / {ratio} = {terms[4]}"
    rule = "Each number is the one before it multiplied or divided by the same number."
    return _pattern("product", terms[:4], rule, terms[4], steps)


def pattern_hard(rng: Random) -> Item:
    start, factor, addend = between(rng, 1, 30), between(rng, 2, 5), between(rng, 1, 30)
    product_first = bool(between(rng, 0, 1))
    terms = [start]
    for i in range(5):
        multiply = (i % 2 == 0) == product_first
        terms.append(terms[-1] * factor if multiply else terms[-1] + addend)
    # Read in the other order, the same numbers would need factors f and g with f * g = 1: there is
    # one way to go on.
    last = f"* {factor}" if product_first else f"+ {addend}"
    in_turn = f"* {factor} and + {addend}" if product_first else f"+ {addend} and * {factor}"
    return _pattern(
        "turns",
        terms[:5],
        "It is made in two steps that take turns: one multiplies by a whole number that is always "
        "the same, the other adds a whole number that is always the same.",
        terms[5],
        f"The steps are {in_turn}.\n{terms[4]} {last} = {terms[5]}",
    )


# -------------------------------------------------------------------------------------- logic


def logic_easy(rng: Random) -> Item:
    (a, b), (x, y) = shuffled(rng, NAMES, 2), shuffled(rng, COLORS, 2)
    thing, _ = pick(rng, OWNED)
    # a's is x. The clue denies a's other color, or names the color of the one not asked about.
    asked = pick(rng, (a, b))
    about = pick(rng, (a, b)) if asked == a else a
    owns, other = (x, y) if about == a else (y, x)
    denies = about == asked or rng.random() < 0.5
    clue = f"{about}'s {thing} is {'not ' + other if denies else owns}."
    answer = x if asked == a else y
    first, second = sorted((x, y))
    rest = "" if about == asked else f" So {asked}'s is {answer}."
    return Item(
        f"logic {thing} {sorted(((a, x), (b, y)))} {clue} {asked}",
        f"{a} and {b} each have a {thing}. One of the two is {first}, the other is {second}. "
        f"{clue} What color is {asked}'s {thing}?",
        answer,
        f"{about}'s {thing} is {owns}.{rest}",
    )


def logic_medium(rng: Random) -> Item:
    people, colors = shuffled(rng, NAMES, 3), shuffled(rng, COLORS, 3)
    thing, things = pick(rng, OWNED)
    clues = []
    for i, c in permutations(range(3), 2):
        text = f"{people[i]}'s {thing} is not {colors[c]}."
        clues.append((text, lambda p, i=i, c=c: p[i] != colors[c]))
        text = f"Either {people[min(i, c)]} or {people[max(i, c)]} has the {colors[i]} {thing}."
        clues.append((text, lambda p, i=i, c=c: colors[i] in (p[i], p[c])))
    i = between(rng, 0, 2)
    clues.append((f"{people[i]}'s {thing} is {colors[i]}.", lambda p, i=i: p[i] == colors[i]))
    chosen = _enough(rng, clues, list(permutations(colors)))
    (one, two, three), (x, y, z) = people, sorted(colors)
    steps = ", ".join(f"{name} has {color}" for name, color in zip(people, colors, strict=True))
    return Item(
        f"logic {thing} {sorted(zip(people, colors, strict=True))} {sorted(chosen)}",
        f"{one}, {two} and {three} each have a {thing}. The {things} are {x}, {y} and {z}. "
        f"{' '.join(chosen)} What are the colors of the {things} of {one}, {two} and {three}, in "
        "this order?",
        ", ".join(colors),
        f"Only this fits: {steps}.",
    )


def logic_hard(rng: Random) -> Item:
    order = shuffled(rng, NAMES, 4)
    clues = []
    for (i, name), j in product(enumerate(order), range(4)):
        other = order[j]
        if i != j:
            text = f"{name} did not finish {PLACES[j]}."
            clues.append((text, lambda p, i=i, j=j: p[j] != order[i]))
        if i < j:
            text = f"{name} finished before {other}."
            clues.append((text, lambda p, a=name, b=other: p.index(a) < p.index(b)))
        if j == i + 1:
            text = f"{other} finished immediately after {name}."
            clues.append((text, lambda p, a=name, b=other: p.index(b) == p.index(a) + 1))
        if j == i + 2:
            text = f"Exactly one runner finished between {name} and {other}."
            clues.append((text, lambda p, a=name, b=other: abs(p.index(a) - p.index(b)) == 2))
    i = between(rng, 0, 3)
    clues.append((f"{order[i]} finished {PLACES[i]}.", lambda p, i=i: p[i] == order[i]))
    chosen = _enough(rng, clues, list(permutations(order)))
    one, two, three, four = shuffled(rng, order)
    numbered = [re.sub(r"\w+", lambda w: _place(w[0], order), clue) for clue in chosen]
    return Item(
        f"logic order {order} {sorted(chosen)}",
        f"{one}, {two}, {three} and {four} ran a race to its end, and no two of them "
        f"finished together. "
        f"{' '.join(chosen)} In which order did they finish, from first to last?",
        ", ".join(order),
        f"Only this order fits: {', '.join(order)}.",
        structure=f"logic order {sorted(numbered)}",
    )


def _place(word: str, order: Sequence[str]) -> str:
    """A runner's name as the place in which the runner finished; any other word as it is."""
    return f"#{order.index(word)}" if word in order else word


def _enough(
    rng: Random, clues: list[tuple[str, Callable]], worlds: Sequence[tuple[str, ...]]
) -> list[str]:
    """Some of the clues that together leave one world, none of which can be left out."""
    chosen: list[tuple[str, Callable]] = []
    left = list(worlds)
    for text, holds in shuffled(rng, clues):
        now = [world for world in left if holds(world)]
        if len(now) < len(left):
            left = now
            chosen.append((text, holds))
    for clue in list(chosen):
        others = [other for other in chosen if other is not clue]
        if sum(all(holds(world) for _, holds in others) for world in worlds) == 1:
            chosen = others
    return shuffled(rng, [text for text, _ in chosen])


# -------------------------------------------------------------------------------------- words


def words_easy(rng: Random) -> Item:
    name, things = pick(rng, NAMES), pick(rng, THINGS)
    gains = bool(between(rng, 0, 1))
    a, b = between(rng, 5, 200), between(rng, 2, 99)
    if not gains and b >= a:
        return words_easy(rng)
    value = a + b if gains else a - b
    change = f"finds {b} more" if gains else f"gives away {b} of them"
    sign = "+" if gains else "-"
    return Item(
        f"words {a}{sign}{b}",
        f"{name} has {a} {things} and {change}. How many {things} does {name} have now?",
        str(value),
        f"{a} {sign} {b} = {value}",
    )


def words_medium(rng: Random) -> Item:
    name, things = pick(rng, NAMES), pick(rng, THINGS)
    a, b, c = between(rng, 10, 200), between(rng, 5, 99), between(rng, 3, 99)
    if c >= a + b:
        return words_medium(rng)
    total, value = a + b, a + b - c
    return Item(
        f"words {a}+{b}-{c}",
        f"{name} has {a} {things}. {name} buys {b} more and then gives {c} to a friend. "
        f"How many {things} does {name} have now?",
        str(value),
        f"{a} + {b} = {total}\n{total} - {c} = {value}",
    )


def words_hard(rng: Random) -> Item:
    group, member = pick(
        rng, (("chess club", "members"), ("choir", "singers"), ("team", "players"))
    )
    a, b, c, k = (between(rng, *r) for r in ((8, 99), (2, 40), (2, 40), (2, 5)))
    if c >= a:
        return words_hard(rng)
    joined, left = a + b, a + b - c
    value = left * k
    return Item(
        f"words ({a}+{b}-{c})*{k}",
        f"A {group} has {a} {member}. In spring {b} {member} join it, and in summer {c} {member} "
        f"leave it. By winter it has {k} times as many {member} as after the summer. "
        f"How many {member} does it have by winter?",
        str(value),
        f"{a} + {b} = {joined}\n{joined} - {c} = {left}\n{left} * {k} = {value}",
    )


TYPES: dict[str, dict[str, Callable[[Random], Item]]] = {
    "arithmetic_chain": {"easy": chain_easy, "medium": chain_medium, "hard": chain_hard},
    "pattern_completion": {"easy": pattern_easy, "medium": pattern_medium, "hard": pattern_hard},
    "logical_reasoning": {"easy": logic_easy, "medium": logic_medium, "hard": logic_hard},
    "word_problems": {"easy": words_easy, "medium": words_medium, "hard": words_hard},
}
