"""What this machine can do, measured in the same process as what is compared with it.

    copy rate     bytes read and written per second by x + 1 on a large buffer, in place
    matmul rate   floating-point operations per second of a large square product

`timed` also says how busy other processes kept the CPUs meanwhile: a time measured beside
much of that is no evidence.
"""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import stand_ins  # noqa: F401, for what is imported after this


class Timing(NamedTuple):
    """Seconds of `n` repetitions, and how many CPU cores others used meanwhile (median)."""

    median: float
    low: float
    high: float
    n: int
    foreign: float


def timed(functions: Mapping[str, Callable[[], Any]], *, repeats: int = 5) -> dict[str, Timing]:
    """Time each function, all in turn, `repeats` times after a first call that compiles.

    A function may return arrays; they are waited for.
    """
    seconds = {name: [] for name in functions}
    foreign = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(repeats):
        for name, function in functions.items():
            busy, own, start = _busy(), time.process_time(), time.perf_counter()
            jax.block_until_ready(function())
            took = time.perf_counter() - start
            seconds[name].append(took)
            others = (_busy() - busy) - (time.process_time() - own)
            foreign[name].append(max(others, 0.0) / took)
    return {
        name: Timing(
            statistics.median(s), min(s), max(s), repeats, statistics.median(foreign[name])
        )
        for name, s in seconds.items()
    }


@cache
def rates(dtype: str, *, repeats: int = 5) -> dict[str, float]:
    """`copy` in bytes per second and `matmul` in operations per second: the best of `repeats`."""
    large = jax.default_backend() != "cpu"
    side = 8192 if large else 1024
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(lambda a: a @ a)
    count = 2**31 if large else 2**26
    state = [jnp.zeros(count, jnp.float32)]
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy():
        state[0] = increment(state[0])
        return state[0]

    took = timed({"copy": copy, "matmul": lambda: product(a)}, repeats=repeats)
    return {"copy": 2 * 4 * count / took["copy"].low, "matmul": 2 * side**3 / took["matmul"].low}


def environment() -> dict[str, Any]:
    """All that a figure depends on besides the code: machine, versions, commit and command."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "processor": f"{os.cpu_count()} x {_processor()}",
        "instructions": _instructions(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "commit": git("rev-parse", "--short", "HEAD") + (" + changes" if git("diff") else ""),
        "command": " ".join(["python", *(os.path.relpath(a, root) for a in sys.argv[:1])])
        + "".join(f" {a}" for a in sys.argv[1:]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _instructions() -> str:
    """The widest of the processor's vector instructions, which decide how fast it multiplies."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    widest = ("amx_tile", "avx512f", "avx2", "avx", "asimd")
    return next((name for name in widest if name in flags), "unknown")


def _busy() -> float:
    """CPU seconds spent on this machine by all processes; 0 where it cannot be known."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, fields)
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
