"""Knights and knaves: who tells the truth? Everyone makes a statement; one assignment fits."""

from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import NamedTuple

from gspo_jax.answers.verify import asked, counts_reasoning, items, one_box
from gspo_jax.batch import Problem
from gspo_jax.tasks.draw import (
    Drawn,
    chosen_sizes,
    chosen_weights,
    listed,
    made_up,
    mark,
    pick,
    shuffled,
    smallest,
    weighted,
)
from gspo_jax.tasks.task import Task

KNIGHTS_SIZES = {"train": 5_000, "val": 400, "test": 800}
PEOPLE = {"easy": 2, "medium": 3, "hard": 5}
_NAMES = "Abel Bruno Carla Dora Edgar Flora Gustav Helga Igor Jutta Karl Linda"
NAMES = _NAMES.split()
ROLES = ("knave", "knight")

# kind -> when it is true of people's roles (True: knight), how it is said, and how one speaks of
# oneself in it.
KINDS = {
    "knight": (lambda x: x, "{x} is a knight.", ""),
    "knave": (lambda x: not x, "{x} is a knave.", ""),
    "both": (lambda x, y: x and y, "{x} and {y} are both knights.", "I"),
    "neither": (lambda x, y: not x and not y, "{x} and {y} are both knaves.", "I"),
    "same": (lambda x, y: x == y, "{x} and {y} are both knights, or both knaves.", "I"),
    "one": (lambda x, y: x != y, "Exactly one of {x} and {y} is a knight.", "me"),
    "knights": (lambda x, y: x or y, "At least one of {x} and {y} is a knight.", "me"),
    "knaves": (lambda x, y: not (x and y), "At least one of {x} and {y} is a knave.", "me"),
}
ABOUT_ONE = ("knight", "knave")
ABOUT_TWO = tuple(kind for kind in KINDS if kind not in ABOUT_ONE)


class Statement(NamedTuple):
    """What one person says of one or two people; `y` is the speaker where it is two of us."""

    kind: str
    people: tuple[int, ...]


def knights_and_knaves(
    *,
    seed: int = 0,
    levels: Mapping[str, float | int] | Sequence[str] = ("easy", "medium", "hard"),
    sizes: dict[str, int] | None = None,
) -> Task:
    """Puzzles with 2 (easy), 3 (medium) or 5 (hard) people, of whom all must be named rightly.

    Guessing is right once in 4, 8 or 32 times. What is left of a puzzle without names and without
    the order of its people (`structure`) decides the split; of two people there are too few such
    puzzles for that, and their split depends on the names.

    Args:
        seed: chooses the training problems.
        levels: a list of names, or how often each of them is wanted.
        sizes: number of problems per split; what is not named keeps KNIGHTS_SIZES.

    Raises:
        ConfigError: an unknown level or split.
    """
    mix = chosen_weights("levels", levels, list(PEOPLE))

    def draw(rng: Random, split: str) -> Drawn:
        level = weighted(rng, mix)
        names = shuffled(rng, NAMES, PEOPLE[level])
        statements, roles = make_knights(rng, len(names))
        text = puzzle_text(names, statements)
        kept_apart = structure(statements) if len(names) > 2 else text
        return Drawn(kept_apart, text, to_problem(text, names, roles, level))

    sizes = chosen_sizes(KNIGHTS_SIZES, sizes)
    return made_up("knights", sizes, draw, knights_reward, seed=seed, answer_in=roles_in)


def make_knights(rng: Random, people: int) -> tuple[list[Statement], tuple[bool, ...]]:
    """One statement per person, drawn until exactly one assignment of roles fits them."""
    while True:
        statements = [_statement(rng, people, speaker) for speaker in range(people)]
        found = fitting(statements)
        if len(found) == 1:
            return statements, found[0]


def _statement(rng: Random, people: int, speaker: int) -> Statement:
    """Of one other person, or of two, one of whom may be the speaker.

    Of oneself alone there is nothing to say: "I am a knight" is what everyone would claim.
    """
    others = shuffled(rng, [p for p in range(people) if p != speaker])
    if rng.random() < (0.3 if people == 2 else 0.5):
        return Statement(pick(rng, ABOUT_ONE), (others[0],))
    second = speaker if people == 2 or rng.random() < 0.4 else others[1]
    return Statement(pick(rng, ABOUT_TWO), (others[0], second))


def is_true(statement: Statement, roles: Sequence[bool]) -> bool:
    """Does what is said hold, if these are knights (True) and knaves?"""
    return bool(KINDS[statement.kind][0](*[roles[p] for p in statement.people]))


def fitting(statements: Sequence[Statement]) -> list[tuple[bool, ...]]:
    """Every assignment in which knights say what is true, and knaves what is false."""
    return [
        roles
        for roles in product((False, True), repeat=len(statements))
        if all(is_true(said, roles) == role for said, role in zip(statements, roles, strict=True))
    ]


def structure(statements: Sequence[Statement]) -> str:
    """The same text for two puzzles that differ in names and in the order of people alone.

    People are numbered in the order in which the text comes out smallest, tried only among those
    that what they say, and what is said of them, does not tell apart.
    """
    said_of: dict[int, list[str]] = {p: [] for p in range(len(statements))}
    for speaker, (kind, people) in enumerate(statements):
        said_of[speaker].append(f"!{kind}{speaker in people}")
        for p in people:
            said_of[p].append(f"{kind}{speaker in people}")

    def text(order: list[int]) -> str:
        said = [statements[p] for p in order]  # all kinds are mutual
        return " ".join(f"{kind}{sorted(order.index(q) for q in people)}" for kind, people in said)

    return smallest({p: sorted(texts) for p, texts in said_of.items()}, text)


def puzzle_text(names: Sequence[str], statements: Sequence[Statement]) -> str:
    """The island, its people, and what each of them says."""
    lines = [
        "On an island everyone is either a knight, who only says what is true, or a knave, who "
        f"only says what is false. You meet {listed(names)}."
    ]
    for speaker, statement in enumerate(statements):
        lines.append(f'{names[speaker]} says: "{_said(names, speaker, statement)}"')
    return "\n".join(lines)


def _said(names: Sequence[str], speaker: int, statement: Statement) -> str:
    _, words, me = KINDS[statement.kind]
    x, *rest = (me if p == speaker else names[p] for p in statement.people)
    return words.format(x=x, y=rest[0] if rest else "")


def to_problem(text: str, names: Sequence[str], roles: Sequence[bool], level: str) -> Problem:
    answer = ", ".join(ROLES[role] for role in roles)
    prompt = (
        f"{text}\nWho is what? Give the roles of {listed(names)}, in this order and separated by "
        "commas, in \\boxed{}: the word knight or knave for each."
    )
    columns = {
        "names": list(names),
        "difficulty": level,
        "completion": f"\\boxed{{{answer}}}",
    }
    return Problem(f"knights-{len(names)}-{mark(text)}", prompt, answer, columns)


@counts_reasoning
def knights_reward(completions, answer, names, **columns) -> list[float | None]:
    """1 where everyone's role is right, else 0."""
    rows = zip(map(asked, completions), answer, names, strict=True)
    return [float(read_roles(one_box(text), people) == gold) for text, gold, people in rows]


def roles_in(problem: Problem, text: str) -> str | None:
    """The roles that `text` boxes, in the order of the names, or None."""
    return read_roles(one_box(text), problem.columns["names"])


def read_roles(answer: str | None, names: Sequence[str]) -> str | None:
    """A list of roles, or of people with their roles in any order, as "knight, knave".

    Each item is a role, or a name, "is" or ":" or "=" perhaps, and a role; everyone must be
    there exactly once. Anything else is None.
    """
    if answer is None:
        return None
    said = [item.replace(":", " ").replace("=", " ").split() for item in items(answer)]
    said = [[w for w in words if w not in ("a", "is")] for words in said]
    if not all(words and words[-1] in ROLES and len(words) <= 2 for words in said):
        return None
    if all(len(words) == 1 for words in said) and len(said) == len(names):
        return ", ".join(role for (role,) in said)
    pairs = [(words[0], words[1]) for words in said if len(words) == 2]
    lower = [name.casefold() for name in names]
    if len(pairs) < len(said) or sorted(name for name, _ in pairs) != sorted(lower):
        return None
    roles = dict(pairs)
    return ", ".join(roles[name] for name in lower)
