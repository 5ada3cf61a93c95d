"""Which shapes a rollout can have: widths, batches and lengths of the cache, by arithmetic alone.

All are fixed before the first token is drawn, so that every program is known before it is compiled.
"""

from typing import NamedTuple

BATCHES = 5  # sizes of the batch at most, each half of the one before ...
SMALLEST_BATCH = 8  # ... and none below this many rows
LAST_SHRINK = 16  # with fewer steps left, a smaller batch is not worth its compilation
LENGTHS = 8  # lengths of the cache at most, and none ...
SHORTEST_GROWTH = 128  # ... that adds fewer slots than this


class Schedule(NamedTuple):
    """Sizes that one call can need: `steps` per chunk, and the cache's slots in each chunk."""

    steps: int
    slots: tuple[int, ...]
    batches: tuple[int, ...]  # rows, largest first

    def batch(self, chunk: int, now: int, alive: int) -> int:
        """Rows of a chunk: the smallest size that holds the living; near the end, as it is."""
        return min(b for b in self.batches if b >= alive) if self.may_shrink(chunk) else now

    def may_shrink(self, chunk: int) -> bool:
        """Whether enough steps are left that a smaller batch is worth its compilation."""
        return (len(self.slots) - chunk) * self.steps >= LAST_SHRINK


class Program(NamedTuple):
    """The shape of one compiled decode program."""

    batch: int
    slots: int
    steps: int


def schedule(
    rows: int, prompt_slots: int, max_new_tokens: int, *, ways: int = 1, chunk: int | None = None
) -> Schedule:
    """How `rows` rows are decoded, from shapes alone.

    A chunk is a sixteenth of the response, within 4 and 32 steps: the end of a row takes effect
    one to two chunks later. Slots come in at most 8 portions of 128 or more; batches are halved
    four times at most.

    Args:
        rows: completions wanted.
        prompt_slots: padded length of the prompts.
        max_new_tokens: response tokens at most; the first comes with the prompts.
        ways: devices that the rows are split over; every batch is a multiple of it.
        chunk: decode steps between two looks at who is done.
    """
    rest = max_new_tokens - 1
    chunks = -(-rest // (chunk or min(max(max_new_tokens // 16, 4), 32)))
    steps = -(-rest // max(chunks, 1))
    portion = max(SHORTEST_GROWTH, (1 << rest.bit_length()) // LENGTHS)
    ends = [(n + 1) * steps for n in range(chunks)]
    slots = tuple(prompt_slots + min(_round_up(end, portion), ends[-1]) for end in ends)
    batches = [_round_up(rows, ways)]
    while len(batches) < BATCHES and (chunks - 1) * steps >= LAST_SHRINK:
        half = _round_up(-(-batches[-1] // 2), ways)
        if half < SMALLEST_BATCH or half == batches[-1]:
            break
        batches.append(half)
    return Schedule(steps, slots, tuple(batches))


def programs_for(
    rows: int, prompt_slots: int, max_new_tokens: int, *, ways: int = 1, chunk: int | None = None
) -> list[Program]:
    """Every decode program that `generate` may compile for these sizes; arguments as `schedule`.

    Which of them it does compile depends on when rows end: a batch that no row leaves takes
    one program per length of the cache.
    """
    s = schedule(rows, prompt_slots, max_new_tokens, ways=ways, chunk=chunk)
    first = [Program(s.batches[0], s.slots[0], s.steps)] if s.slots else []
    later = [Program(b, slots, s.steps) for b in s.batches for slots in s.slots[1:]]
    return list(dict.fromkeys(first + later))


def bucket(length: int) -> int:
    """`length` rounded up so that few different shapes, and so few compilations, arise.

    At most an eighth is padding beyond 128 positions, in at most eight steps per octave; below,
    multiples of 16.
    """
    octave = 1 << (length - 1).bit_length()
    step = max(octave // 16, 16)
    return -(-length // step) * step


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
