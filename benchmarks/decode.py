"""How fast the sampler decodes, beside what the machine could do at best.

    python benchmarks/decode.py                                      a 10 M model, on anything
    python benchmarks/decode.py --model r1-1.5b --batches 64,256,512 --contexts 1024,4096 \\
        --prompts 64 --prompt-length 256 --new-tokens 1024           one H200-sized GPU

Weights are random, drawn on the device from shapes alone. Two tables:

    steps      ms per token step at a batch and a cache length, beside the floor
               max(weights / copy rate, operations / matmul rate) + cache / copy rate
    rollouts   whole calls of `generate`: at the cap, and with rows that end. Of a random model's
               nearly even distribution, calling n of the V tokens EOS ends a row with
               probability n / V per token; n is chosen for a mean length of half the cap.
               "fixed" is the same with halving switched off: the same tokens, so the same work.
               Their floor is that of a step summed over the steps, for the rows still alive.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import calibrate
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from output import numbers, parser, report

from gspo_jax.models.cache import LayerCache
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.qwen import Qwen
from gspo_jax.policy import compiled_to_sample
from gspo_jax.rollout import engine, schedule
from gspo_jax.rollout.engine import PureModel, Rows, generate
from gspo_jax.rollout.sampling import Sampling
from gspo_jax.rollout.schedule import bucket, programs_for

NAMES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
MODELS = {  # name -> NAMES, key/value heads, vocabulary, tied
    "tiny": ((32, 1, 64, 2), 1, 1024, True),
    "1m": ((128, 4, 384, 4), 2, 1024, True),
    "10m": ((384, 6, 1024, 6), 2, 1024, True),
    "r1-1.5b": ((1536, 28, 8960, 12), 2, 151936, False),
}
STEPS = 16  # timed together
RATE = 1.594  # (1 - exp(-x)) / x = 1/2: rows that end at rate x / cap live half the cap on average


def main() -> None:
    options = parse()
    config = qwen2(options.model)
    model = compiled_to_sample(*random_model(config, options.dtype), options.dtype)
    rates = calibrate.rates(options.dtype)
    floor = floor_of(config, model[1], rates)
    result = {
        "model": options.model,
        "dtype": options.dtype,
        "rates": rates,
        "steps": [
            step(model, config, floor, batch, context, options.repeats)
            for context in options.contexts
            for batch in options.batches
        ],
        "rollouts": rollouts(model, config, floor, options) if options.prompts else [],
    }
    report("decode", result, COLUMNS, rows(result), options.out)


def parse() -> argparse.Namespace:
    options = parser("ms per token step, and seconds per rollout")
    options.add_argument("--model", choices=MODELS, default="10m")
    options.add_argument("--batches", type=numbers, default=[8, 16, 32, 64])
    options.add_argument("--contexts", type=numbers, default=[96, 288])
    options.add_argument("--prompts", type=int, default=8, help="0 leaves out whole rollouts")
    options.add_argument("--group-size", type=int, default=8)
    options.add_argument("--prompt-length", type=int, default=32)
    options.add_argument("--new-tokens", type=int, default=64)
    options.set_defaults(repeats=7)
    return options.parse_args()


def qwen2(name: str) -> QwenConfig:
    shape, kv_heads, vocabulary, tied = MODELS[name]
    return QwenConfig.from_hf(
        dict(zip(NAMES, shape, strict=True))
        | {
            "model_type": "qwen2",
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 131072,
        }
    )


def random_model(config: QwenConfig, dtype: str) -> PureModel:
    """Matrices normal with standard deviation 0.02, norms 1, biases 1: drawn in one program."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(shapes)

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(leaves))
        matrices = [
            jax.random.normal(k, x.shape, dtype) * jnp.asarray(0.02, dtype)
            if x.ndim > 1
            else jnp.ones(x.shape, dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, matrices)

    return graphdef, draw(jax.random.key(0))


def multiplied(config: QwenConfig, params) -> int:
    """Parameters that a token is multiplied with: the matrices, an embedding only as the head."""
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return matrices - looked_up


def floor_of(config: QwenConfig, params, rates: dict[str, float]) -> Callable[[int, float], float]:
    """(rows, slots) -> seconds of one token step at best; no rows take none."""
    matrices = multiplied(config, params)
    width = jax.tree.leaves(params)[0].dtype.itemsize
    per_slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim * width

    def floor(rows: int, slots: float) -> float:
        reading = matrices * width / rates["copy"]
        computing = 2 * matrices * rows / rates["matmul"]
        return (max(reading, computing) + rows * slots * per_slot / rates["copy"]) * (rows > 0)

    return floor


def step(model: PureModel, config, floor, batch: int, context: int, repeats: int) -> dict[str, Any]:
    """Time STEPS steps at the end of a full cache."""
    dtype = jax.tree.leaves(model[1])[0].dtype
    shape = (batch, config.num_kv_heads, context, config.head_dim)
    fresh = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    keys = jax.random.split(jax.random.key(1), batch)
    token = jnp.zeros(batch, jnp.int32)
    state = [
        tuple(LayerCache(fresh(keys[0]), fresh(keys[0])) for _ in range(config.num_layers)),
        Rows(token, token + context, keys),
    ]

    def run():
        state[0], state[1], drawn = engine._decode(
            *model,
            *state,
            np.int32(context - STEPS),
            np.int32(1),
            sampling=Sampling(),
            steps=STEPS,
            record_routing=False,
        )
        return drawn

    took = calibrate.timed({"step": run}, repeats=repeats)["step"]
    best = floor(batch, context)
    return {
        "batch": batch,
        "context": context,
        "ms": [1e3 * x / STEPS for x in took[:3]],
        "floor_ms": 1e3 * best,
        "share_of_floor": best * STEPS / took.median,
        "tokens_per_second": batch * STEPS / took.median,
        "n": took.n,
        "foreign_cores": took.foreign,
    }


def rollouts(model: PureModel, config, floor, o: argparse.Namespace) -> list[dict[str, Any]]:
    """`generate` at the cap; with rows that end; and with those, but no halving."""
    V, S = config.vocab_size, o.prompt_length
    prompts = np.random.default_rng(0).integers(0, V, (o.prompts, S)).tolist()
    ends = range(round(V * RATE / o.new_tokens))
    last = {}

    def run(name: str, eos: range, batches: int):
        def sample():
            schedule.BATCHES, before = batches, schedule.BATCHES
            last[name] = generate(
                model,
                prompts,
                group_size=o.group_size,
                max_new_tokens=o.new_tokens,
                eos_ids=eos,
                key=jax.random.key(2),
            )
            schedule.BATCHES = before

        return sample

    cases = {
        "at the cap": (range(0), schedule.BATCHES),
        "rows end": (ends, schedule.BATCHES),
        "rows end, fixed": (ends, 1),
    }
    functions = {name: run(name, *case) for name, case in cases.items()}
    took = calibrate.timed(functions, repeats=o.repeats)
    listed = programs_for(o.prompts * o.group_size, bucket(S), o.new_tokens)
    found = []
    for name, timing in took.items():
        lengths = last[name].mask.sum(1)
        alive = [int((lengths > t).sum()) for t in range(1, o.new_tokens)]
        best = sum(floor(rows, S + t) for t, rows in enumerate(alive, 1))
        found.append(
            {
                "case": name,
                "mean_length": float(lengths.mean()),
                "seconds": list(timing[:3]),
                "floor_seconds": best,
                "share_of_floor": best / timing.median,
                "tokens_per_second": float(lengths.sum()) / timing.median,
                "n": timing.n,
                "foreign_cores": timing.foreign,
                "programs": [list(p) for p in listed],
            }
        )
    return found


COLUMNS = ("", "ms, median of n", "low - high", "floor ms", "of floor", "tokens/s", "length")
COLUMNS += ("n, others' cores",)


def rows(result: dict[str, Any]) -> list[list[str]]:
    found = [
        (f"step, {r['batch']} rows x {r['context']} slots", r["ms"], r["floor_ms"], "", r)
        for r in result["steps"]
    ] + [
        (
            f"rollout, {r['case']}",
            [1e3 * x for x in r["seconds"]],
            1e3 * r["floor_seconds"],
            f"{r['mean_length']:.1f}",
            r,
        )
        for r in result["rollouts"]
    ]
    lines = []
    for name, (median, low, high), best, length, r in found:
        digits = max(0, 2 - math.floor(math.log10(max(median, 1e-9))))
        lines.append(
            [
                name,
                f"{median:.{digits}f}",
                f"{low:.{digits}f} - {high:.{digits}f}",
                f"{best:.{digits}f}",
                f"{r['share_of_floor']:.0%}",
                f"{r['tokens_per_second']:,.0f}",
                length,
                f"{r['n']}, {r['foreign_cores']:.1f}",
            ]
        )
    return lines


if __name__ == "__main__":
    main()
