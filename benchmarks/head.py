"""Log-probabilities of tokens from hidden states (`token_logps`), by positions at a time.

    python benchmarks/head.py                                        a 10 M model, on anything
    python benchmarks/head.py --model r1-1.5b --tokens 16384 --chunks 2048,4096,8192,16384

Counted is what a head without chunks needs: 2 * tokens * width * vocabulary forward, three times
that with the backward pass. The logits that chunks compute again are not counted, so a rate of
three quarters of the matrix product's is the most that chunks can reach there.
"""

import argparse
from typing import Any

import calibrate
import jax
import jax.numpy as jnp
from decode import MODELS, qwen2
from output import (
    mebibytes,
    numbers,
    on_cpu,
    operations,
    parser,
    percent,
    report,
    shares,
    temp_bytes,
)

from gspo_jax.algo.logps import token_logps

COLUMNS = ("pass, positions at a time", "ms", "low - high", "FLOP/s", "of matmul", "of datasheet")
COLUMNS += ("temp MiB", "n, others' cores")


def main() -> None:
    o = parse()
    rates = calibrate.rates(o.dtype)
    cases = [found for chunk in o.chunks for found in case(o, rates, chunk)]
    result = {"model": o.model, "dtype": o.dtype, "tokens": o.tokens}
    result |= {"rates": rates, "cases": cases}
    report("head", result, COLUMNS, [row(c) for c in cases], o.out)


def case(o: argparse.Namespace, rates, chunk: int) -> list[dict[str, Any]]:
    """One chunk size, both passes."""
    config = qwen2(o.model)
    D, V = config.hidden_size, config.vocab_size
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, o.tokens, D), o.dtype)
    head = jax.random.normal(keys[1], (D, V), o.dtype) * jnp.asarray(0.02, o.dtype)
    tokens = jax.random.randint(keys[2], (1, o.tokens), 0, V)

    def forward(hidden, head):
        return token_logps(hidden, head, tokens, chunk=chunk)

    def both(hidden, head):
        return jax.grad(lambda *x: jnp.sum(forward(*x)[0]), argnums=(0, 1))(hidden, head)

    passes = {
        name: jax.jit(function).lower(hidden, head).compile()
        for name, function in {"forward": forward, "forward + backward": both}.items()
    }
    took = calibrate.timed(
        {name: lambda f=function: f(hidden, head) for name, function in passes.items()},
        repeats=o.repeats,
    )
    found = []
    for name, timing in took.items():
        rate = (2 if name == "forward" else 6) * o.tokens * D * V / timing.median
        found.append(
            {
                "pass": name,
                "chunk": chunk,
                "seconds": list(timing[:3]),
                "flops_per_second": rate,
                **shares(rate, rates),
                "temp_bytes": temp_bytes(passes[name]),
                "n": timing.n,
                "foreign_cores": timing.foreign,
            }
        )
    return found


def row(c: dict[str, Any]) -> list[str]:
    median, low, high = (1e3 * x for x in c["seconds"])
    return [
        f"{c['pass']}, {c['chunk']}",
        f"{median:.1f}",
        f"{low:.1f} - {high:.1f}",
        operations(c["flops_per_second"]),
        percent(c["of_measured"]),
        percent(c["of_datasheet"]),
        mebibytes(c["temp_bytes"]),
        f"{c['n']}, {c['foreign_cores']:.1f}",
    ]


def parse() -> argparse.Namespace:
    small = on_cpu()
    options = parser("seconds and FLOP/s of token_logps")
    options.add_argument("--model", choices=MODELS, default="10m" if small else "r1-1.5b")
    options.add_argument("--tokens", type=int, default=4096 if small else 16384)
    options.add_argument(
        "--chunks", type=numbers, default=[512, 4096] if small else [2048, 4096, 8192, 16384]
    )
    return options.parse_args()


if __name__ == "__main__":
    main()
