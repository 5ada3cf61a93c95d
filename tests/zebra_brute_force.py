"""Logic grids solved from their English alone, by trying everything: knows nothing of the solver.

Values are read from the list above the clues; a clue is understood by its words.
"""

import re
from itertools import permutations

PLACES = ["first", "second", "third", "fourth", "fifth", "sixth"]
RELATIONS = [  # words, and what they say of the houses of the two that are named, in their order
    ("lives immediately to the left of", lambda x, y: y - x == 1),
    ("lives somewhere to the left of", lambda x, y: x < y),
    ("lives somewhere to the right of", lambda x, y: x > y),
    ("live next door to each other", lambda x, y: abs(x - y) == 1),
    ("exactly one house between", lambda x, y: abs(x - y) == 2),
    ("exactly two houses between", lambda x, y: abs(x - y) == 3),
    (" is ", lambda x, y: x == y),
]


def read(puzzle):
    """(houses, column -> values, clues); a clue is (the values it names, what must hold)."""
    head, _, tail = puzzle.partition("## Clues:")
    columns = {
        line[2:].partition(",")[0]: re.findall(r"`(.+?)`", line)
        for line in head.splitlines()
        if line.startswith("- ")
    }
    (houses,) = {len(values) for values in columns.values()}
    where = {value: column for column, values in columns.items() for value in values}
    any_value = re.compile(rf"\b({'|'.join(map(re.escape, where))})\b")
    clues = []
    for line in tail.strip().splitlines():
        text = line.partition(". ")[2]
        named = any_value.findall(_lower_first(text, where))
        place = re.search(rf"(does not live|lives) in the ({'|'.join(PLACES)}) house", text)
        if place:
            h, wanted = PLACES.index(place[2]), place[1] == "lives"
            clues.append((named, lambda x, h=h, wanted=wanted: (x == h) == wanted))
            assert len(named) == 1, text
        else:
            clues.append((named, next(holds for words, holds in RELATIONS if words in text)))
            assert len(named) == 2, text
    return houses, columns, where, clues


def _lower_first(text, where):
    return text if re.match(r"[A-Z]\w*", text)[0] in where else text[0].lower() + text[1:]


def solutions(puzzle):
    """Every way to give values to houses, as lists of {column: value}, that no clue forbids."""
    houses, columns, where, clues = read(puzzle)
    names = list(columns)
    # A clue is checked as soon as the columns that it speaks of are filled.
    due = {name: [] for name in names}
    for named, holds in clues:
        due[max((where[v] for v in named), key=names.index)].append((named, holds))

    def fill(i, house):
        if i == len(names):
            yield [
                {n: next(v for v in columns[n] if house[v] == h) for n in names}
                for h in range(houses)
            ]
            return
        for order in permutations(range(houses)):
            now = house | dict(zip(columns[names[i]], order, strict=True))
            if all(holds(*(now[v] for v in named)) for named, holds in due[names[i]]):
                yield from fill(i + 1, now)

    return list(fill(0, {}))
