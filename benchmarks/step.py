"""One training step, phase by phase: prompts in, new weights out.

    python benchmarks/step.py --model-dir DIR                    8 x 8 responses of 64 tokens
    python benchmarks/step.py --model-dir DIR --eos 21           rows end early: 21 ids end a row
    python benchmarks/step.py --model r1-1.5b --prompts 64 --prompt-length 256 --new-tokens 1024

The step is that of `gspo-jax train`, by the same functions: sample, decode the text, score it by
a reward function, advantages, minibatches with the old log-probabilities that they need, AdamW.
Without --eos no token ends a row, so that all of them have the full length: the worst case.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from calibrate import environment
from decode import MODELS, qwen2, random_model
from flax import nnx

from gspo_jax.algo.advantages import group_normalised
from gspo_jax.algo.losses import gspo
from gspo_jax.batch import Completions, Problem, Rollout
from gspo_jax.models import load_model
from gspo_jax.models.attention import KINDS
from gspo_jax.models.remat import POLICIES
from gspo_jax.policy import compiled_to_sample
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.rollout.engine import generate
from gspo_jax.rollout.train_rows import to_train_batch
from gspo_jax.update.microbatch import MICROBATCH_TOKENS
from gspo_jax.update.objective import Objective
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.programs import make_programs
from gspo_jax.update.state import init_state
from gspo_jax.update.steps import Progress, continue_updates, summarise

BY_UPDATE = ("clip_frac", "ratio_std")  # what is told of each update, beside its time


def main() -> None:
    o = parse()
    step = make_step(o)
    rows = []
    for number in range(o.warmup + o.steps):
        began = time.perf_counter()
        phases = step(number)
        rows.append({"step": time.perf_counter() - began, **phases})
    kept = rows[o.warmup :]
    by_update = {name: [row.pop(name) for row in kept] for name in BY_UPDATE}
    result = {
        "environment": environment(),
        "options": {key: str(value) for key, value in vars(o).items()},
        "first_step": rows[0]["step"],
        "median": {name: statistics.median(row[name] for row in kept) for name in kept[0]},
        "low": {name: min(row[name] for row in kept) for name in kept[0]},
        "steps": [row["step"] for row in kept],
        "by_update": by_update,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "device_peak_gb": device_peak(),
    }
    print(json.dumps(result) if o.json else table(result))


def make_step(o: argparse.Namespace):
    """step(number) -> seconds of each phase; the state goes on from step to step."""
    if o.model_dir:
        graphdef, params = nnx.split(load_model(o.model_dir))
        decode = load_tokenizer(o.model_dir).decode
        rows = [json.loads(x) for x in (o.model_dir / "prompts.jsonl").read_text().splitlines()]
        prompts = [row["prompt_ids"] for row in rows]
    else:
        graphdef, params = random_model(qwen2(o.model), "float32")
        decode = str
        ids = np.random.default_rng(0).integers(3, 1000, (8 * o.prompts, o.prompt_length))
        prompts = ids.tolist()
    dtype = o.dtype
    optimizer = make_optimizer(optax.constant_schedule(o.learning_rate), state=o.state)
    longest = -(-(max(map(len, prompts)) + o.new_tokens) // 8) * 8
    platform = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    objective = Objective(
        gspo,
        dtype=dtype,
        remat=o.remat,
        attention=o.attention,
        microbatch_tokens=o.microbatch or MICROBATCH_TOKENS[platform],
        longest=longest,
        shortest_prompt=min(map(len, prompts)),
    )
    programs = make_programs(graphdef, optimizer, objective)
    # Compiled, the moments never exist in float32, nor a second copy of the parameters.
    state = [jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(params)]
    del params
    advantage = jax.jit(partial(group_normalised, group_size=o.group_size))
    eos = list(range(3, 3 + o.eos))

    def step(number: int) -> dict[str, float]:
        began = time.perf_counter()
        first = number * o.prompts % (len(prompts) - o.prompts + 1)
        asked = prompts[first : first + o.prompts]
        key = jax.random.fold_in(jax.random.key(0), number)
        sampled = generate(
            compiled_to_sample(graphdef, state[0].params, dtype),
            asked,
            group_size=o.group_size,
            max_new_tokens=o.new_tokens,
            eos_ids=eos,
            key=key,
        )
        generated = time.perf_counter()
        rollout = scored(asked, sampled, decode)
        adv = np.asarray(advantage(jnp.asarray(rollout.reward)))
        batch = to_train_batch(rollout, adv, width=longest)
        rewarded = time.perf_counter()
        progress = Progress(batch)
        state[0], done = continue_updates(programs, state[0], progress, minibatches=o.minibatches)
        jax.block_until_ready((state[0], done.stats))
        return {
            "generate": generated - began,
            "reward": rewarded - generated,
            "update": time.perf_counter() - rewarded,
            "mean_length": float(sampled.mask.sum(1).mean()),
            **{name: summarise(done.stats)[f"{name}_by_update"] for name in BY_UPDATE},
        }

    return step


def scored(prompts: Sequence[Sequence[int]], sampled: Completions, decode) -> Rollout:
    """The reward is the share of digits in the text: it costs little, and differs."""
    texts = [decode(t[m].tolist()) for t, m in zip(sampled.tokens, sampled.mask, strict=True)]
    reward = [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]
    values = np.array(reward, np.float32)
    problems = [Problem(str(i), "") for i in range(len(prompts))]
    return Rollout(problems, list(map(list, prompts)), sampled, texts, {"digits": values}, values)


def device_peak() -> float | None:
    """The allocator's own peak; None where the backend keeps none."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else None


def table(result: dict[str, Any]) -> str:
    lines = [f"{'phase':12} {'median s':>9} {'low s':>9}"]
    for name, value in result["median"].items():
        lines.append(f"{name:12} {value:9.3f} {result['low'][name]:9.3f}")
    memory = result["device_peak_gb"]
    device = "" if memory is None else f", device {memory:.1f} GB"
    lines.append(
        f"first step {result['first_step']:.1f} s, peak RSS {result['peak_rss_gb']:.2f} GB"
    )
    return "\n".join(lines) + device


def parse() -> argparse.Namespace:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description="seconds per training step, by phase")
    parser.add_argument("--model-dir", type=Path, help="with prompts.jsonl; else --model")
    parser.add_argument("--model", choices=MODELS, default="10m", help="random weights")
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--state", default="float32", choices=["float32", "8bit"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--microbatch", type=int, default=0, help="tokens; 0 chooses")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--remat", choices=POLICIES, default="none")
    parser.add_argument("--attention", choices=KINDS, default="xla")
    parser.add_argument("--eos", type=int, default=0, help="how many token ids end a row")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
