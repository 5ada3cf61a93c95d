"""Files of saved responses: whose they are, and what of them is whole.

A file belongs to one identity, which its name ends in a hash of: one model by the content of its
files, one set of problems, one way of sampling. Responses are appended batch by batch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gspo_jax.files import jsonl
from gspo_jax.files.integrity import sha256
from gspo_jax.files.whole import write_whole
from gspo_jax.models.hf.files import HUB_FILES
from gspo_jax.numbers.summary import Record
from gspo_jax.tasks.task import fingerprint


class Batch(NamedTuple):
    """Responses that are made, and saved, together: `samples` as `evaluate.responses` has it."""

    samples: int
    problems: range

    @property
    def places(self) -> list[tuple[int, int]]:
        """(index, sample) of each of its records."""
        numbers = range(1, self.samples + 1) if self.samples else (0,)
        return [(index, sample) for index in self.problems for sample in numbers]


def whole_batches(file: Path, batches: Sequence[Batch]) -> tuple[list[Record], list[Batch]]:
    """The records of the batches that a file holds as a whole, and the batches that it lacks.

    What stands after those, as a line torn by a crash, is cut off the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    with file.open("rb") as stream:
        rows = list(jsonl.objects(stream))
    done, kept = 0, 0
    for batch in batches:
        own = rows[kept : kept + len(batch.places)]
        if [(row.get("index"), row.get("sample")) for row in own] != batch.places:
            break
        done, kept = done + 1, kept + len(own)
    if left := list(batches[done:]):
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows[:kept]))
    return rows[:kept], left


def file_of(directory: Path, model: str, identity: Mapping[str, Any]) -> Path:
    """Where the responses of this identity are or will be; the model may have another name now."""
    mark = fingerprint(identity)
    there = sorted(directory.glob(f"*.{mark}.jsonl"))
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in model).strip("-")[-60:]
    return there[0] if there else directory / f"{name or 'model'}.{mark}.jsonl"


def model_hash(directory: Path) -> str:
    """A hash of the content of all files that say what the model is."""
    patterns = [pattern for pattern in HUB_FILES if pattern.startswith("*")]
    paths = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return fingerprint([[path.name, sha256(path)] for path in sorted(paths)])
