"""What only a GPU can show: its tests, and the speed and memory that are aimed at, in one table.

    python benchmarks/gpu_check.py               an H200, at most 9 minutes
    python benchmarks/gpu_check.py --quick       the same parts at toy sizes, on anything

It needs this checkout and the packages of `gspo_jax` (pytest for the tests; no network, no weights:
they are random, in the shape of DeepSeek-R1-Distill-Qwen-1.5B). Every part is a process of its own
with a time limit, so that one that fails costs nothing else. What each has found is in
gpu_check.json in $OUT (or --out, or benchmarks/results) as soon as it is done. The goals are those
for one H200.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent


class Part(NamedTuple):
    """One process: a script of this directory with its options on a GPU, or in a quick check.

    `needs` is what `memory.stages` gives for the full form, in GB of the H200's 140 (the parts
    that train), or what the arrays of the script add up to.
    """

    name: str
    script: str
    full: str
    quick: str
    limit: float  # seconds; all of them, with those of the tests, add up to MINUTES
    needs: float


class Goal(NamedTuple):
    """A number of a part's result, and what it should be."""

    what: str
    part: str
    limit: float
    at_most: bool
    read: Callable[[dict[str, Any]], float]


MINUTES = 9
TESTS_LIMIT = 50.0  # seconds for the tests marked `gpu`
# Attention is cuDNN's: with our own, whose scores the backward pass keeps, the step would need 170.
STEP_FULL = "--json --model r1-1.5b --prompt-length 256 --new-tokens 1024 --state 8bit"
STEP_FULL += " --attention cudnn --warmup 1 --steps 1"
STEP_QUICK = "--json --model tiny --prompts 2 --group-size 2 --prompt-length 8 --new-tokens 8"
STEP_QUICK += " --warmup 1 --steps 1"
PARTS = (
    # The step goes before the update: its compile time is to be that of an empty cache.
    Part(
        "step",
        "step.py",
        f"{STEP_FULL} --prompts 64 --group-size 8 --minibatches 4 --remat none",
        f"{STEP_QUICK} --minibatches 2 --remat none",
        180,
        needs=82,
    ),
    # The same programs: what is clipped without a step is noise of two programs, and should be
    # nothing in GSPO's own range of 3e-4.
    Part(
        "clip",
        "step.py",
        f"{STEP_FULL} --prompts 64 --group-size 8 --minibatches 4 --remat none --learning-rate 0",
        f"{STEP_QUICK} --minibatches 2 --remat none --learning-rate 0",
        50,
        needs=82,
    ),
    Part(
        "decode",
        "decode.py",
        "--model r1-1.5b --batches 64,256 --contexts 1024 --prompts 0",
        "--model tiny --batches 4 --contexts 32 --prompts 0 --repeats 1",
        40,
        needs=13,  # weights in bfloat16 and the cache of 256 rows: 3.6 + 7.5
    ),
    Part(
        "update",
        "update.py",
        "--model r1-1.5b --microbatches 16384 --widths 1280 --rows 128 --repeats 2"
        " --remat none --attention cudnn",
        "--model tiny --microbatches 64 --widths 32 --rows 4 --prompt-length 8 --repeats 1"
        " --state float32 --remat none",
        90,
        needs=82,
    ),
    Part(
        "head",
        "head.py",
        "--model r1-1.5b --tokens 16384 --chunks 4096,16384",
        "--model tiny --tokens 64 --chunks 32 --repeats 1",
        30,
        needs=32,  # three times 16,384 x 151,936 float32, and the head with its gradient
    ),
    Part(
        "memory",
        "step.py",
        f"{STEP_FULL} --prompts 1 --group-size 4 --microbatch 1280 --remat full",
        f"{STEP_QUICK} --microbatch 32 --remat full",
        70,
        needs=23,
    ),
    Part(
        "optimizer",
        "optimizer.py",
        "--model r1-1.5b",
        "--model tiny --repeats 1",
        30,
        needs=43,  # masters, gradients and both moments in float32, and two of them once more
    ),
)


def decoded(batch: int) -> Callable[[dict[str, Any]], float]:
    return lambda r: next(s["ms"][0] for s in r["steps"] if s["batch"] == batch)


def best(r: dict[str, Any], **wanted: str) -> float:
    cases = [c for c in r["cases"] if all(c[k] == v for k, v in wanted.items())]
    return max(c["flops_per_second"] for c in cases) / 1e12


def compiling(r: dict[str, Any]) -> float:
    return r["first_step"] - r["median"]["step"]


def later(name: str) -> Callable[[dict[str, Any]], float]:
    """The largest of all updates but a step's first, whose ratio is 1 by construction."""
    return lambda r: max(x for step in r["by_update"][name] for x in step[1:])


GOALS = (
    Goal("decode, 256 rows, context 1024: ms/token", "decode", 4.7, True, decoded(256)),
    Goal("decode, 64 rows, context 1024: ms/token", "decode", 2.3, True, decoded(64)),
    Goal("update, 16k tokens x 1280: model TFLOP/s", "update", 400, False, best),
    Goal(
        "head, forward + backward: TFLOP/s",
        "head",
        450,
        False,
        lambda r: best(r, **{"pass": "forward + backward"}),
    ),
    Goal(
        "step, 64 x 8 x (256 + 1024), 4 updates: s",
        "step",
        28,
        True,
        lambda r: r["median"]["step"],
    ),
    Goal("compiling it with an empty cache: s", "step", 120, True, compiling),
    Goal("clipped at learning rate 0, updates 2 to 4", "clip", 0, True, later("clip_frac")),
    Goal("std of the ratio there", "clip", 3e-4, True, later("ratio_std")),
    Goal(
        "group of 4, 1k tokens, 8-bit state: peak GiB",
        "memory",
        24,
        True,
        lambda r: r["device_peak_gb"],
    ),
)


def main() -> None:
    o = parse()
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    if not o.quick and backend() == "cpu":
        raise SystemExit("jax finds no GPU here; --quick runs the same parts at toy sizes.")
    deadline = time.monotonic() + o.minutes * 60
    found: dict[str, Any] = {"quick": o.quick, "parts": {}}
    with tempfile.TemporaryDirectory() as cache, open(out / "gpu_check.log", "w") as log:
        for part in ("tests", *PARTS):
            name = part if isinstance(part, str) else part.name
            if o.parts and name not in o.parts:
                continue
            command = tests() if part == "tests" else command_of(part, o.quick, out)
            limit = TESTS_LIMIT if isinstance(part, str) else part.limit
            limit = max(min(limit, deadline - time.monotonic()), 1)
            print(f"{name} (at most {limit:.0f} s) ... ", end="", flush=True)
            done = run(command, limit, cache, log) if command else {"status": "no pytest here"}
            print(done["status"], flush=True)
            found["parts"][name] = done
            (out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, done in found["parts"].items() if not done["status"].startswith("ok")]
    print(table(found["parts"], judged=not o.quick))
    print(f"written to {out / 'gpu_check.json'}; output of the parts in gpu_check.log")
    if failed:
        raise SystemExit(f"not ok: {', '.join(failed)}")


def backend() -> str:
    """Asked of a process that ends: one that went on would keep the GPU's memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def tests() -> list[str] | None:
    """The tests marked `gpu`, without the plugins that the whole suite asks for."""
    if importlib.util.find_spec("pytest") is None:
        return None
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    options = ["-m", "gpu", "-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-q", "-rs", *options, *map(str, files)]


def command_of(part: Part, quick: bool, out: Path) -> list[str]:
    options = (part.quick if quick else part.full).split()
    where = [] if "--json" in options else ["--out", str(out)]
    return [sys.executable, str(HERE / part.script), *options, *where]


def run(command: list[str], limit: float, cache: str, log) -> dict[str, Any]:
    """Status, seconds and, where there is one, the result of a part; its output goes to `log`."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
    }
    if command[1:3] == ["-m", "pytest"]:  # conftest.py would otherwise choose the CPU
        environment.setdefault("JAX_PLATFORMS", "")
    began = time.monotonic()
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=log,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started: pytest's workers, say
            process.wait()
        output.seek(0)
        text = output.read()
    log.write(text + "\n")
    log.flush()
    seconds = time.monotonic() - began
    status = f"ok, {seconds:.0f} s"
    if process.returncode:
        reason = "out of time" if seconds >= limit else f"exit {process.returncode}"
        status = f"failed: {reason} after {seconds:.0f} s"
    last = text.strip().splitlines()[-1] if text.strip() else ""
    done: dict[str, Any] = {"status": status, "seconds": seconds, "command": command[1:]}
    if process.returncode:
        done["last_line"] = last
    elif (result := result_of(last)) is not None:
        done["result"] = result
    else:
        done["status"] += f": {last}"
    return done


def result_of(last: str) -> dict[str, Any] | None:
    """What a part has found, from the last line that it prints; None where there is nothing."""
    if last.startswith("written to "):
        return json.loads(Path(last.removeprefix("written to ")).read_text())
    return json.loads(last) if last.startswith("{") else None


def table(parts: dict[str, Any], *, judged: bool) -> str:
    """One line per goal: reached, aimed at and, if `judged`, whether it will do."""
    lines = [f"{'':46} {'achieved':>10} {'goal':>8}"]
    for goal in GOALS:
        result = parts.get(goal.part, {}).get("result")
        value = None if result is None else achieved(goal, result)
        aim = f"{'<=' if goal.at_most else '>='} {goal.limit:g}"
        if value is None:
            lines.append(f"{goal.what:46} {'-':>10} {aim:>8}")
            continue
        reached = value <= goal.limit if goal.at_most else value >= goal.limit
        verdict = ("  yes" if reached else "  NO") if judged else ""
        lines.append(f"{goal.what:46} {value:10.4g} {aim:>8}" + verdict)
    lines += [f"{name:46} {done['status']}" for name, done in parts.items()]
    return "\n".join(lines)


def achieved(goal: Goal, result: dict[str, Any]) -> float | None:
    """None where this run has no such number: other sizes, or a backend that keeps no peak."""
    try:
        return goal.read(result)
    except StopIteration:
        return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks beside their goals")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that all parts run")
    parser.add_argument("--parts", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--out", default=os.environ.get("OUT") or HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
