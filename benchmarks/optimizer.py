"""One AdamW update with its moments in float32 and in 8 bits, beside what the memory allows.

    python benchmarks/optimizer.py                                   a 10 M model, on anything
    python benchmarks/optimizer.py --model r1-1.5b

The floor is the traffic that no implementation avoids, at the measured copy rate: parameters and
moments read and written once, gradients read twice, since clipping must know their norm first.
"""

import argparse
from typing import Any

import calibrate
import jax
import optax
from decode import MODELS, qwen2, random_model
from output import mebibytes, on_cpu, parser, percent, report, temp_bytes

from gspo_jax.update.optim import make_optimizer

COLUMNS = ("state", "ms", "low - high", "floor ms", "of floor", "bytes of state per parameter")
COLUMNS += ("temp MiB", "n, others' cores")


def main() -> None:
    o = parse()
    rates = calibrate.rates(o.dtype)
    cases = [case(o, rates, state) for state in ("float32", "8bit")]
    result = {"model": o.model, "dtype": o.dtype, "rates": rates, "cases": cases}
    report("optimizer", result, COLUMNS, [row(c) for c in cases], o.out)


def case(o: argparse.Namespace, rates, state: str) -> dict[str, Any]:
    _, params = random_model(qwen2(o.model), "float32")
    grads = jax.tree.map(lambda x: 1e-3 * x, params)
    optimizer = make_optimizer(optax.constant_schedule(1e-6), state=state)
    moments = jax.jit(optimizer.init)(params)

    def update(grads, params, moments, go):
        with jax.numpy_dtype_promotion("standard"):  # optax relies on implicit promotion
            return optimizer.step(grads, moments, params, go)

    compiled = jax.jit(update, donate_argnums=(1, 2)).lower(grads, params, moments, True).compile()
    count, kept = sum(x.size for x in jax.tree.leaves(params)), bytes_of(moments)
    traffic = 2 * bytes_of(params) + 2 * bytes_of(grads) + 2 * kept
    now = [params, moments]
    del params, moments

    def run():
        now[:] = compiled(grads, *now, True)
        return now

    timing = calibrate.timed({"update": run}, repeats=o.repeats)["update"]
    floor = traffic / rates["copy"]
    return {
        "state": state,
        "seconds": list(timing[:3]),
        "floor_seconds": floor,
        "share_of_floor": floor / timing.median,
        "bytes_per_parameter": kept / count,
        "temp_bytes": temp_bytes(compiled),
        "n": timing.n,
        "foreign_cores": timing.foreign,
    }


def bytes_of(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def row(c: dict[str, Any]) -> list[str]:
    median, low, high = (1e3 * x for x in c["seconds"])
    return [
        c["state"],
        f"{median:.1f}",
        f"{low:.1f} - {high:.1f}",
        f"{1e3 * c['floor_seconds']:.1f}",
        percent(c["share_of_floor"]),
        f"{c['bytes_per_parameter']:.3f}",
        mebibytes(c["temp_bytes"]),
        f"{c['n']}, {c['foreign_cores']:.1f}",
    ]


def parse() -> argparse.Namespace:
    options = parser("seconds of an AdamW update, and the bytes of its state")
    options.add_argument("--model", choices=MODELS, default="10m" if on_cpu() else "r1-1.5b")
    options.set_defaults(dtype="float32")  # of masters, gradients and arithmetic, on any device
    return options.parse_args()


if __name__ == "__main__":
    main()
