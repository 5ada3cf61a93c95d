"""How many ways are there to fill a logic grid? Domains, propagation, and a search that counts.

A grid has N houses and M attributes with N values each. Variable `a * N + v` is the house of value
v of attribute a; the values of one attribute are in different houses. A domain is a bit mask of
houses, so that a clue between two variables is a table from one domain to the other.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

UNARY = ("found", "not")
BINARY: dict[str, Callable[[int, int], bool]] = {
    "same": lambda x, y: x == y,
    "next": lambda x, y: x + 1 == y,
    "beside": lambda x, y: abs(x - y) == 1,
    "left": lambda x, y: x < y,
    "gap1": lambda x, y: abs(x - y) == 2,
    "gap2": lambda x, y: abs(x - y) == 3,
}
SYMMETRIC = ("same", "beside", "gap1", "gap2")


class Clue(NamedTuple):
    """`kind` of variable `x` and, if unary, house `y`, else variable `y`. Houses count from 0."""

    kind: str
    x: int
    y: int


class Count(NamedTuple):
    """What a search found.

    Attributes:
        solutions: their number, counted up to the limit.
        nodes: states that the search looked at; 1 if propagation alone settles the grid.
        first: the house of every variable in the first solution, or ().
    """

    solutions: int
    nodes: int
    first: tuple[int, ...]


def count_solutions(houses: int, attributes: int, clues: Iterable[Clue], limit: int = 2) -> Count:
    """Solutions of a grid, counted up to `limit`; 1 of at most 2 proves that there is just one."""
    full = (1 << houses) - 1
    domains = [full] * (houses * attributes)
    links: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in domains]
    tables = _tables(houses)
    for kind, x, y in clues:
        if kind in UNARY:
            domains[x] &= 1 << y if kind == "found" else full ^ (1 << y)
        else:
            forward, backward = tables[kind]
            links[x].append((forward, y))
            links[y].append((backward, x))
    if not all(domains) or not _propagate(domains, links, houses, list(range(len(domains)))):
        return Count(0, 1, ())
    search = _Search(links, houses, limit)
    search.run(domains)
    return Count(search.solutions, search.nodes, search.first)


class _Search:
    def __init__(self, links: list, houses: int, limit: int):
        self.links, self.houses, self.limit = links, houses, limit
        self.solutions, self.nodes, self.first = 0, 0, ()

    def run(self, domains: list[int]) -> None:
        """Count the solutions below a state that propagation has nothing to add to."""
        self.nodes += 1
        open_ = [(d.bit_count(), v) for v, d in enumerate(domains) if d & (d - 1)]
        if not open_:
            self.first = self.first or tuple(d.bit_length() - 1 for d in domains)
            self.solutions += 1
            return
        _, v = min(open_)
        for house in range(self.houses):
            bit = 1 << house
            if domains[v] & bit and self.solutions < self.limit:
                below = domains.copy()
                below[v] = bit
                if _propagate(below, self.links, self.houses, [v]):
                    self.run(below)


def _propagate(domains: list[int], links: list, houses: int, queue: list[int]) -> bool:
    """Narrow the domains until nothing follows any more; False if one becomes empty."""
    full = (1 << houses) - 1
    while queue:
        v = queue.pop()
        domain = domains[v]
        for table, w in links[v]:
            old = domains[w]
            new = old & table[domain]
            if new != old:
                if not new:
                    return False
                domains[w] = new
                queue.append(w)
        siblings = range(v - v % houses, v - v % houses + houses)
        if not domain & (domain - 1):  # this house is taken
            for w in siblings:
                if w != v and domains[w] & domain:
                    domains[w] ^= domain
                    if not domains[w]:
                        return False
                    queue.append(w)
        once = twice = 0
        for w in siblings:
            twice |= once & domains[w]
            once |= domains[w]
        if once != full:
            return False  # nobody is left for some house
        if lone := once & ~twice:  # houses that only one value can have
            for w in siblings:
                mine = domains[w] & lone
                if mine and mine != domains[w]:
                    if mine & (mine - 1):
                        return False
                    domains[w] = mine
                    queue.append(w)
    return True


@cache
def _tables(houses: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each kind, domain of x -> houses left for y, and domain of y -> houses left for x."""
    return {
        kind: (
            _table(houses, holds),
            _table(houses, lambda y, x, holds=holds: holds(x, y)),
        )
        for kind, holds in BINARY.items()
    }


def _table(houses: int, holds: Callable[[int, int], bool]) -> tuple[int, ...]:
    pairs = [(1 << a, sum(1 << b for b in range(houses) if holds(a, b))) for a in range(houses)]
    out = []
    for mask in range(1 << houses):
        union = 0
        for bit, left in pairs:
            union |= left if mask & bit else 0
        out.append(union)
    return tuple(out)
