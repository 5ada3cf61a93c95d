"""What the text of a compiled program (an HLO module) says of it, whatever backend it is for.

instructions   one by one, with the shapes of what they give and the JAX operation behind them
collectives    what devices tell each other, in bytes
kernels        what a GPU is told to do in one round of the loop, a decoded token say
"""

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# What moves no number: names for others' results, and for parts of them.
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
)
ITEMSIZE = {"pred": 1, "s4": 1, "u4": 1, "token": 0}


class Shape(NamedTuple):
    """Of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        width = ITEMSIZE.get(self.dtype) or int(re.sub(r"\D", "", self.dtype[:4]) or 32) // 8
        return math.prod(self.dims) * width


class Instruction(NamedTuple):
    """One line of a module.

    Attributes:
        computation: the function of the module that it stands in; "ENTRY" is the outermost.
        result: the type of what it gives, as text.
        code: what it does: "fusion", "all-gather-start", ...
        rest: operands and attributes.
    """

    computation: str
    name: str
    result: str
    code: str
    rest: str

    @property
    def shapes(self) -> list[Shape]:
        """Of all arrays that it gives."""
        return shapes(self.result)

    @property
    def operation(self) -> str:
        """As JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    """An exchange among several devices.

    Attributes:
        kind: of COLLECTIVES.
        shapes: of what each device has after it.
        groups: the devices of each group, by their numbers in the mesh.
        looped: whether it is in a loop: once per microbatch, or per decoded token.
    """

    kind: str
    shapes: list[Shape]
    groups: Int[np.ndarray, "n g"]
    operation: str
    looped: bool

    @property
    def sent(self) -> int:
        """Bytes that each device sends, where the exchange is a ring."""
        g, total = self.groups.shape[1], sum(shape.bytes for shape in self.shapes)
        if self.kind == "all-reduce":
            return 2 * total * (g - 1) // g
        if self.kind == "reduce-scatter":
            return total * (g - 1)
        return total if self.kind == "collective-permute" else total * (g - 1) // g


def shapes(text: str) -> list[Shape]:
    """Every array type in a piece of a module."""
    found = re.findall(r"\b(pred|bf16|[sufc]\d+(?:e\w+)?)\[([\d,]*)\]", text)
    return [Shape(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found]


@lru_cache(maxsize=8)
def instructions(text: str) -> tuple[Instruction, ...]:
    """All of a module, in its order."""
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ?\(", line)):
            computation = "ENTRY" if head[1] else head[2]
        elif m := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            found.append(Instruction(computation, *m.groups()))
    return tuple(found)


def collectives(text: str) -> Iterator[Collective]:
    """Those of several devices.

    An exchange that goes on beside other work is two instructions. What starts it counts; that
    gives the operands too, but for a sum's, and behind them what the exchange gives.
    """
    loops = _in_loops(instructions(text))
    for x in instructions(text):
        kind = x.code.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        result = x.result
        if x.code != kind and kind != "all-reduce":
            result = _parts(result)[1]
        groups = groups_of(x.rest)
        if groups.shape[1] > 1:
            looped = x.computation in loops
            yield Collective(kind, shapes(result), groups, x.operation, looped)


def kernels(text: str) -> int:
    """What is launched in one round of the outermost loop; 0 where there is none.

    A loop inside it counts once, and so does a conditional.
    """
    outer = [x for x in instructions(text) if x.code == "while" and x.computation == "ENTRY"]
    bodies = {name for x in outer for name in _called(x)}
    inside = [x for x in instructions(text) if x.computation in bodies]
    return sum(x.code not in FREE and not x.code.endswith("-done") for x in inside)


def groups_of(text: str) -> Int[np.ndarray, "n g"]:
    """The groups of devices of a collective, one per row, however it writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int)
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return np.array([g.split(",") for g in re.findall(r"\{([\d,]+)\}", listed[1])], int)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes, order = (_numbers(x) for x in iota.groups())
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return ids.transpose(order or range(ids.ndim)).reshape(shape)
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{(.*?)\}",
        text,
    )
    assert mesh, text[:300]
    sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    ids = np.arange(math.prod(sizes.values()))
    if mesh[2]:
        ids = ids.reshape(_numbers(mesh[2])).transpose(_numbers(mesh[3]))
    ids = ids.reshape(list(sizes.values()))
    inner = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", mesh[4])]
    outer = [i for i in range(len(sizes)) if i not in inner]
    return ids.transpose(outer + inner).reshape(-1, math.prod(ids.shape[i] for i in inner))


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _called(x: Instruction) -> list[str]:
    """The computations that an instruction runs, but for a loop's condition."""
    return re.findall(r"\b(?:body|calls|to_apply|\w+_computation)=%?([\w.\-]+)", x.rest)


def _in_loops(module: Sequence[Instruction]) -> set[str]:
    """The computations that a loop runs over and over."""
    calls: dict[str, set[str]] = {}
    for x in module:
        calls.setdefault(x.computation, set()).update(_called(x))
    found: set[str] = set()
    left = {name for x in module if x.code == "while" for name in _called(x)}
    while left:
        name = left.pop()
        found.add(name)
        left |= calls.get(name, set()) - found
    return found


def _parts(result: str) -> Sequence[str]:
    """The elements of a tuple type, of which each may be a tuple; else the type itself."""
    if not result.startswith("("):
        return [result, result]
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(result):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(result[start:i])
            start = i + 1
    return parts
