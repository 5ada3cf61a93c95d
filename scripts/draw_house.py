"""Draw the rooms of the package and what each uses, from its imports.

    python scripts/draw_house.py [FILE]

A box is a room, or a file beside the rooms; it stands above all that it uses. A line is drawn where
no other path says the same. Blue is what a reader of the algorithm opens.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gspo_jax"
OUT = ROOT / "docs" / "images" / "architecture" / "house.svg"
CORE = {"algo", "models", "rollout", "update", "advantage", "train"}
EVERYWHERE = {"errors", "numbers", "text", "files"}  # lines to them would hide the others
WIDTH, HEIGHT, GAP, RISE = 104, 30, 18, 74  # of a box, between boxes, from row to row

Uses = dict[str, set[str]]


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of everything that a file imports; tests/test_architecture.py asks, too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    return names | {f"{n.module}.{a.name}" for n in froms for a in n.names}


def uses() -> Uses:
    """Each room, or file beside the rooms, and the others that it imports."""
    found: Uses = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if place.startswith("__"):
            continue
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("gspo_jax.")}
        found.setdefault(place, set()).update(rooms - {place})
    return {place: named & found.keys() for place, named in found.items()}


def rows(house: Uses) -> list[list[str]]:
    """From the ground up: a box stands one row above the highest that it uses."""
    height: dict[str, int] = {}
    for place in TopologicalSorter(house).static_order():
        height[place] = max((height[used] + 1 for used in house[place]), default=0)
    return [
        sorted(p for p in height if height[p] == row) for row in range(max(height.values()) + 1)
    ]


def lines(house: Uses) -> list[tuple[str, str]]:
    """What each uses and does not already reach through another that it uses."""
    reached: Uses = {}
    for place in TopologicalSorter(house).static_order():
        reached[place] = set().union(*(reached[used] | {used} for used in house[place]))
    return [
        (place, used)
        for place, others in sorted(house.items())
        for used in sorted(others - EVERYWHERE)
        if not any(used in reached[other] for other in others)
    ]


def ordered(levels: list[list[str]], edges: list[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Where the middle of each box lies: near what it uses, so that few lines cross."""
    width = max(len(level) for level in levels) * (WIDTH + GAP)
    at: dict[str, tuple[int, int]] = {}
    for row, level in enumerate(levels):
        wanted = {
            place: [at[used][0] for user, used in edges if user == place and used in at]
            for place in level
        }
        middle = {p: sum(xs) / len(xs) if xs else width / 2 for p, xs in wanted.items()}
        level = sorted(level, key=lambda place: (middle[place], place))
        left = (width - len(level) * (WIDTH + GAP)) // 2 + (WIDTH + GAP) // 2
        for number, place in enumerate(level):
            at[place] = (left + number * (WIDTH + GAP), (len(levels) - row) * RISE - RISE // 2)
    return at


def drawing() -> str:
    """The picture as SVG text, the same for the same imports."""
    house = uses()
    levels, edges = rows(house), lines(house)
    at = ordered(levels, edges)
    width = max(x for x, _ in at.values()) + WIDTH // 2 + GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {len(levels) * RISE}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{len(levels) * RISE}" fill="white"/>',
    ]
    for user, used in edges:
        (x, y), (u, v) = at[user], at[used]
        y, v = y + HEIGHT // 2, v - HEIGHT // 2
        bend = (v - y) // 2
        path = f"M{x},{y} C{x},{y + bend} {u},{v - bend} {u},{v}"
        out.append(f'<path d="{path}" fill="none" stroke="#9aa5b1" stroke-width="1.2"/>')
    for place, (x, y) in at.items():
        fill = "#cfe3f7" if place in CORE else "#f3f4f6"
        name = f"{place}/" if (PACKAGE / place).is_dir() else f"{place}.py"
        corner = f'x="{x - WIDTH // 2}" y="{y - HEIGHT // 2}" width="{WIDTH}" height="{HEIGHT}"'
        out.append(f'<rect {corner} rx="5" fill="{fill}" stroke="#52606d"/>')
        out.append(f'<text x="{x}" y="{y + 5}" text-anchor="middle">{name}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    out.write_text(drawing(), encoding="utf-8")
    print(out)
