"""What every benchmark ends with: one table on the screen, and one JSON file."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import calibrate
import jax

RESULTS = Path(__file__).parent / "results"
# Dense bfloat16 operations per second in the makers' datasheets, by a word of the device's name.
DATASHEET = {"H100": 989e12, "H200": 989e12}


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def numbers(text: str) -> list[int]:
    """An option that is a list: "64,256"."""
    return [int(x) for x in text.split(",") if x]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--dtype", default="float32" if on_cpu() else "bfloat16")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--out", default=RESULTS, help="directory of the JSON file")
    return made


def datasheet() -> float | None:
    """The stated peak of this device, where it is known."""
    kind = jax.devices()[0].device_kind
    return next((peak for word, peak in DATASHEET.items() if word in kind), None)


def shares(rate: float, rates: dict[str, float]) -> dict[str, float | None]:
    """Of what was measured on this machine, and of what its datasheet states."""
    stated = datasheet()
    return {
        "of_measured": rate / rates["matmul"],
        "of_datasheet": None if stated is None else rate / stated,
    }


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def operations(rate: float) -> str:
    """Of a size that a CPU and a GPU can both be read in."""
    return f"{rate / 1e12:.3g} T"


def temp_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What the compiler sets aside for a program beside its arguments and results."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def report(
    name: str, result: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]], out
) -> None:
    """Print the table under what it depends on; write {environment, **result} to a file in `out`.

    `result` has "model", "dtype" and the "rates" of `calibrate` beside its figures.
    """
    rates, environment = result["rates"], calibrate.environment()
    print(f"{name}: {result['model']}, {result['dtype']} on {environment['device']}, ", end="")
    print(environment["processor"])
    print(f"jax {environment['jax']}, commit {environment['commit']}: {environment['command']}")
    print(f"copy {rates['copy'] / 1e9:.1f} GB/s, matmul {operations(rates['matmul'])}FLOP/s")
    print(table(columns, rows))
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = Path(out) / f"{name}-{kind}-{result['model']}-{result['dtype']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, **result}, indent=1) + "\n")
    print(f"written to {path}")
