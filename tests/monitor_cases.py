"""What tests of the monitor share: run directories as a run leaves them."""

import json
from datetime import UTC, datetime

RATIO_NAMES = ("ratio_q05_by_update", "ratio_q50_by_update", "ratio_q95_by_update")
RATIOS = [[1.0, 0.996], [1.0, 1.0], [1.0, 1.003]]


def row(step, **more):
    return {
        "step": step,
        "updates": 4 * step,
        "num_tokens": 1000 * step,
        "reward": 0.25 + step / 1000,
        "entropy": 0.5,
        "clip_frac_by_update": [0.0, 0.25],
        **dict(zip(RATIO_NAMES, RATIOS, strict=True)),
        "step_time": 2.0,
        "compile_time": 0.0,
        "time/generate": 0.5,
        "time/update": 1.5,
        "tokens_per_second": 500.0,
        **more,
    }


def measured(value, n=64):
    bounds = {"eval/greedy_low": value - 0.125, "eval/greedy_high": value + 0.0625}
    return {"eval/n": n, "eval/greedy": value, **bounds}


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def append(run, *rows):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(lines(rows))


def make_run(path, rows=(), *, state="running", of=100, samples=(), age=0.0, **files):
    """`files` are texts by stem: config, warnings."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text(lines(rows))
    (path / "samples.jsonl").write_text(lines(samples))
    updated = datetime.fromtimestamp(datetime.now(UTC).timestamp() - age, UTC).isoformat()
    step = rows[-1]["step"] if rows else 0
    status = {"state": state, "step": step, "of": of, "updated": updated}
    (path / "status.json").write_text(json.dumps(status))
    (path / "config.yaml").write_text(files.get("config", "run: {seed: 0}"))
    if "warnings" in files:
        (path / "warnings.log").write_text(files["warnings"])
    return path
