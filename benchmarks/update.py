"""How fast one optimizer update is, beside what the machine multiplies at best.

    python benchmarks/update.py                                      a 10 M model, on anything
    python benchmarks/update.py --model r1-1.5b --microbatches 8192,16384,32768 \\
        --widths 1280,4352 --attention cudnn                         one H200-sized GPU

The programs are those of a training run (`make_programs`): `add_grads` once for all microbatches,
then `apply`. Weights are random, every row fills its width, and all tokens but the prompt's are
trained on. What is counted is what the model needs, whatever is computed twice:

    2 * matrices * tokens + 2 * head * response tokens + 2 * layers * width * heads * head_dim
    * tokens (causal attention), forward; three times that with the backward pass

Compilation is timed by itself, from nothing unless JAX_COMPILATION_CACHE_DIR is set; "temp" is what
the compiler sets aside for `add_grads`.
"""

import argparse
import time
from typing import Any

import calibrate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from decode import MODELS, multiplied, qwen2, random_model
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

from gspo_jax.algo.losses import gspo
from gspo_jax.batch import TrainBatch
from gspo_jax.models.attention import KINDS
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.remat import POLICIES
from gspo_jax.update.objective import Given, Gradients, Objective
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.programs import Accumulated, make_programs, microbatches
from gspo_jax.update.state import init_state

COLUMNS = ("microbatch, width", "rows", "gradient s", "optimizer s", "low - high", "FLOP/s")
COLUMNS += ("of matmul", "of datasheet", "compile s", "temp MiB", "n, others' cores")


def main() -> None:
    o = parse()
    config = qwen2(o.model)
    rates = calibrate.rates(o.dtype)
    cases = [case(config, o, rates, m, w) for w in o.widths for m in o.microbatches]
    result = {"model": o.model, "dtype": o.dtype, "state": o.state}
    result |= {"remat": o.remat, "attention": o.attention}
    result |= {"rates": rates, "cases": cases}
    report("update", result, COLUMNS, [row(c) for c in cases], o.out)


def case(config: QwenConfig, o, rates, tokens: int, width: int) -> dict[str, Any]:
    """Time one update of `o.rows` rows in microbatches of `tokens` tokens."""
    graphdef, params = random_model(config, "float32")
    prompt = min(o.prompt_length, width // 2)
    objective = Objective(
        gspo,
        dtype=o.dtype,
        remat=o.remat,
        attention=o.attention,
        microbatch_tokens=tokens,
        longest=width,
        shortest_prompt=prompt,
    )
    optimizer = make_optimizer(optax.constant_schedule(1e-6), state=o.state)
    programs = make_programs(graphdef, optimizer, objective)
    batch = full_batch(config, o.rows, width, prompt)
    ((rows, count, _),) = microbatches(batch, objective)  # rows of one length: one group
    placed = jax.tree.map(jnp.asarray, batch)
    given = Given(jnp.full(batch.mask.shape, jnp.nan))  # on-policy, as a rollout's first update
    state = [jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)]
    trained = Gradients(state[0].params)
    total: list[Accumulated] = [programs.start_grads(trained, placed)]
    steps = (rows, np.int32(count))
    began = time.perf_counter()
    add = programs.add_grads.lower(total[0], trained, placed, given, *steps, width=width).compile()
    apply = programs.apply.lower(state[0], total[0], placed, given).compile()
    compiled = time.perf_counter() - began

    def gradient():
        total[0] = add(total[0], Gradients(state[0].params), placed, given, *steps)
        return total[0].found

    def update():
        state[0], metrics, _ = apply(state[0], total[0], placed, given)
        return metrics

    took = calibrate.timed({"gradient": gradient, "update": update}, repeats=o.repeats)
    if int(state[0].skipped):
        raise SystemExit(f"{int(state[0].skipped)} updates were not finite: the times mean nothing")
    seconds = took["gradient"].median + took["update"].median
    rate = needed(config, state[0].params, o.rows, width, prompt) / seconds
    return {
        "microbatch": tokens,
        "width": width,
        "rows": o.rows,
        "gradient_seconds": list(took["gradient"][:3]),
        "optimizer_seconds": list(took["update"][:3]),
        "flops_per_second": rate,
        **shares(rate, rates),
        "compile_seconds": compiled,
        "temp_bytes": temp_bytes(add),
        "n": o.repeats,
        "foreign_cores": took["gradient"].foreign,
    }


def full_batch(config: QwenConfig, rows: int, width: int, prompt: int) -> TrainBatch:
    """Random tokens, every response as long as the width allows; advantages of either sign."""
    rng = np.random.default_rng(0)
    return TrainBatch(
        rng.integers(0, config.vocab_size, (rows, width), dtype=np.int32),
        np.full(rows, prompt, np.int32),
        np.full(rows, width - prompt, np.int32),
        np.ones((rows, width - prompt), bool),
        np.where(np.arange(rows) % 2, 1, -1).astype(np.float32),
    )


def needed(config: QwenConfig, params, rows: int, width: int, prompt: int) -> float:
    """Floating-point operations of an update, by the formula above."""
    head = config.vocab_size * config.hidden_size
    per_text = 2 * (multiplied(config, params) - head) * width
    attention = 2 * config.num_layers * width * config.num_heads * config.head_dim * width
    return 3 * rows * (per_text + attention + 2 * head * (width - prompt))


def row(c: dict[str, Any]) -> list[str]:
    median, low, high = (
        a + b for a, b in zip(c["gradient_seconds"], c["optimizer_seconds"], strict=True)
    )
    return [
        f"{c['microbatch']} tokens, {c['width']}",
        str(c["rows"]),
        f"{median - c['optimizer_seconds'][0]:.3f}",
        f"{c['optimizer_seconds'][0]:.3f}",
        f"{low:.3f} - {high:.3f}",
        operations(c["flops_per_second"]),
        percent(c["of_measured"]),
        percent(c["of_datasheet"]),
        f"{c['compile_seconds']:.1f}",
        mebibytes(c["temp_bytes"]),
        f"{c['n']}, {c['foreign_cores']:.1f}",
    ]


def parse() -> argparse.Namespace:
    small = on_cpu()
    options = parser("seconds and FLOP/s of one update")
    options.add_argument("--model", choices=MODELS, default="10m" if small else "r1-1.5b")
    options.add_argument("--state", default="8bit", choices=["float32", "8bit"])
    options.add_argument("--remat", choices=POLICIES, default="none")
    options.add_argument("--attention", choices=KINDS, default="xla")
    options.add_argument("--rows", type=int, default=32 if small else 128)
    options.add_argument("--prompt-length", type=int, default=32 if small else 256)
    options.add_argument(
        "--microbatches",
        type=numbers,
        default=[512, 3072] if small else [8192, 16384],
        help="tokens",
    )
    options.add_argument("--widths", type=numbers, default=[96] if small else [1280])
    options.set_defaults(repeats=3)
    return options.parse_args()


if __name__ == "__main__":
    main()
