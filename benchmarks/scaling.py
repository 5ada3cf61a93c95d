"""What a training step needs on 8, 64 and 512 H100s, from programs compiled for simulated devices.

    python benchmarks/scaling.py      (no accelerator; about 10 minutes and 6 GB on two cores)

Nothing is run and no weight is made: `jax.ShapeDtypeStruct`s are lowered and compiled by XLA's CPU
compiler for as many simulated devices. Of each network one and two layers are compiled, and the
rest extrapolated; for one of them three are compiled too, to see that this is right. Writes
results/scaling.json and the tables of docs/scaling.md, which says what is assumed.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=512"

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gspo_jax.algo.logps import head_bytes
from gspo_jax.config.load import Config, load_config
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.remat import activation_bytes, share_of
from gspo_jax.plan import costs
from gspo_jax.plan.account import Planned
from gspo_jax.plan.hlo import groups_of
from gspo_jax.plan.memory import Sketch, cache_bytes_of, row_ways
from gspo_jax.plan.programs import programs, sketch
from gspo_jax.policy import Problems
from gspo_jax.rollout.schedule import programs_for
from gspo_jax.tasks import Task

HERE = Path(__file__).parent
NODE = 8  # devices that NVLink joins ...
NVLINK, NETWORK = 450e9, 50e9  # bytes per second that each of them sends there, and elsewhere
MATMUL = 0.4 * 989e12  # bfloat16 operations per second: a share of what the datasheet says
PROMPT, RESPONSE, GROUP, MINIBATCHES = 512, 4096, 8, 4

QWEN = {
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MODELS = {
    "R1-Distill-1.5B": QWEN
    | {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "Qwen3-8B": QWEN
    | {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Qwen3-30B-A3B": QWEN
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
# Weights are gathered, and tokens sent to experts, within a node; nodes share gradients alone.
DENSE = {n: {"data": n // NODE, "fsdp": 8} for n in (8, 64, 512)}
MESHES = {
    "R1-Distill-1.5B": DENSE,
    "Qwen3-8B": DENSE,
    "Qwen3-30B-A3B": {n: {"data": n // NODE, "fsdp": 2, "expert": 4} for n in (8, 64, 512)},
}
RESPONSES = {8: 512, 64: 2048, 512: 4096}  # of a step
ROWS = {8: 4, 64: 4, 512: 2}  # responses of one forward and backward pass, on each device


class Moved(NamedTuple):
    """What one device sends in a collective (as in a ring), and whether it leaves its node."""

    kind: str
    operation: str  # as JAX names it
    count: int  # bytes
    across: bool
    looped: bool  # once per microbatch, or per decoded token


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--models", nargs="*", default=list(MODELS))
    options.add_argument("--devices", nargs="*", type=int, default=list(RESPONSES))
    options.add_argument("--out", default=HERE / "results" / "scaling.json")
    options.add_argument("--again", action="store_true", help="only the tables, from --out")
    given = options.parse_args()
    if given.again:
        return print(tables(json.loads(Path(given.out).read_text())["results"]))
    began, results = time.perf_counter(), []
    for model in given.models:
        for devices in given.devices:
            found = measure(model, devices)
            results.append(found)
            print(f"{model} on {devices}: {time.perf_counter() - began:.0f} s", flush=True)
    text = {"jax": jax.__version__, "seconds": time.perf_counter() - began, "results": results}
    Path(given.out).write_text(json.dumps(text, indent=1) + "\n")
    print(tables(results))


def measure(model: str, devices: int) -> dict[str, Any]:
    """The figures of one model on so many devices."""
    shape, axes = QwenConfig.from_hf(MODELS[model]), MESHES[model][devices]
    whole = described(shape, model, devices)
    c, held, L = whole.config, whole.held, shape.num_layers
    layers = (1, 2, 3) if (model, devices) == ("R1-Distill-1.5B", 8) else (1, 2)
    runs = {n: described(replace(shape, num_layers=n), model, devices) for n in layers}
    planned = {n: programs(run) for n, run in runs.items()}
    add = {n: account(run, planned[n], "add_grads") for n, run in runs.items()}
    apply = decode = {n: Counter() for n in runs}
    if devices == NODE:  # a few scalars, and scales of moments: no more on larger meshes
        apply = {n: account(run, planned[n], "apply") for n, run in runs.items()}
    if devices == NODE or shape.experts is not None:
        decode = {n: account(run, planned[n], "_decode") for n, run in runs.items()}
    if 3 in runs:  # the third point of a straight line
        for found in (add, apply, decode):
            assert extrapolated(found, 3) == found[3], "not linear in layers"
    rows = c.rollout.prompts * GROUP // MINIBATCHES // row_ways(whole)  # of a minibatch
    microbatches = -(-rows // ROWS[devices])
    passes = extrapolated(add, L)
    step: Counter = Counter()
    for (kind, direction, across, looped), count in passes.items():
        times = MINIBATCHES * (microbatches if looped else 1)
        if direction == "forward" and looped:  # old log-probs of three minibatches of four
            times += (MINIBATCHES - 1) * microbatches
        step[kind, "update", across] += times * count
    for (kind, _, across, _), count in extrapolated(apply, L).items():
        step[kind, "update", across] += MINIBATCHES * count
    for (kind, _, across, looped), count in extrapolated(decode, L).items():
        step[kind, "decoding", across] += (RESPONSE if looped else 1) * count
    f = axes.get("fsdp", 1)
    step["all-gather", "sampler's weights", f > NODE] += held.weights * (f - 1) // f
    work = costs.step_work(
        shape, c.rollout, c.algo, PROMPT, remat=True, itemsize=2, ways=row_ways(whole)
    )
    return {
        "model": model,
        "devices": devices,
        "mesh": axes,
        "responses": RESPONSES[devices],
        "microbatches": MINIBATCHES * microbatches,
        "bytes": {
            "masters": held.masters,
            "moments": held.moments,
            "gradients": held.gradients,
            "sampler": held.weights,
            "cache": cache_bytes_of(whole),
            "activations": activation_bytes(
                share_of(shape, 1),
                "full",
                tokens=ROWS[devices] * (PROMPT + RESPONSE),
                width=PROMPT + RESPONSE,
                itemsize=2,
                attention="cudnn",
            ),
            "head": head_bytes(4096, shape.vocab_size),
        },
        "moved": [
            {"kind": kind, "stage": stage, "across_nodes": across, "bytes": int(count)}
            for (kind, stage, across), count in sorted(step.items())
            if count
        ],
        "operations_per_device": work.matmul / devices,
    }


def described(shape: QwenConfig, model: str, devices: int) -> Sketch:
    """The run in shapes alone: 512-token prompts, responses that all have 4,096 tokens."""
    config = configured(model, devices)
    task = Task("none", {}, _nothing, _nothing)
    problems = Problems(task, {"train": [], "test": []}, 0, _nothing, PROMPT, PROMPT)
    return sketch(config, shape, problems, make_mesh(**vars(config.mesh)))


def _nothing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("shapes alone")


def configured(model: str, devices: int) -> Config:
    axes = MESHES[model][devices]
    split = math.prod(axes.values())
    settings = {
        "model.dtype": "bfloat16",
        "model.remat": "full",
        "task.max_prompt_length": PROMPT,
        "rollout.prompts": RESPONSES[devices] // GROUP,
        "rollout.group_size": GROUP,
        "rollout.max_completion_length": RESPONSE,
        "algo.minibatches": MINIBATCHES,
        "algo.microbatch": ROWS[devices] * split,
    }
    settings |= {"algo.routing_replay": "R2"} if "A3B" in model else {}
    settings |= {f"mesh.{axis}": n for axis, n in axes.items()}
    return load_config(None, [f"{name}={value}" for name, value in settings.items()])


# ----------------------------------------------------------------------- compiled programs


def account(run: Sketch, planned: list[Planned], name: str) -> Counter:
    """Bytes that one device sends in this program, by (kind, direction, across nodes, looped)."""
    found = [p for p in planned if p.name == name and p.stage != "evaluate"]
    if name == "_decode":
        responses = run.config.rollout.prompts * GROUP
        first = programs_for(responses, PROMPT, RESPONSE, ways=row_ways(run))[0]
        found = [p for p in found if p.shape.startswith(f"{first.batch} x {first.slots} ")]
    text = found[0 if name != "apply" else -1].lower().compile().as_text()
    total: Counter = Counter()
    for m in collectives(text):
        backward = "transpose" in m.operation or "rematted" in m.operation
        direction = "backward" if backward else "forward"
        total[m.kind, direction, m.across, m.looped] += m.count
    return total


def extrapolated(found: dict[int, Counter], layers: int) -> Counter:
    """What is the same for any number of layers, and as much as every layer adds."""
    keys = found[1].keys() | found[2].keys()
    total = {k: found[1][k] + (layers - 1) * (found[2][k] - found[1][k]) for k in keys}
    return Counter({k: n for k, n in total.items() if n})


COLLECTIVE = re.compile(
    r" = (?P<out>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\((?P<rest>.*)"
)
WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "f64": 8, "s64": 8}


def collectives(text: str) -> Iterator[Moved]:
    """Every collective of several devices in a compiled program."""
    for line in text.splitlines():
        if not (m := COLLECTIVE.search(line)):
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        operation = name[1] if name else ""
        arrays = re.findall(r"\b(pred|[sufb]+\d+)\[([\d,]*)\]", m["out"])
        out = sum(
            math.prod(int(n) for n in dims.split(",") if n) * WIDTH.get(dtype, 4)
            for dtype, dims in arrays
        )
        # For CPUs 16-bit numbers are widened before they travel: those of the network that
        # gathers them, and sums that say so. Gradients are summed in 32 bits, as written.
        exchanged = m["kind"] in ("all-gather", "all-to-all") and "shard_map" in operation
        if "promoted" in m["rest"] or (exchanged and all(dtype == "f32" for dtype, _ in arrays)):
            out //= 2
        groups = groups_of(m["rest"])
        g = groups.shape[1]
        if g == 1:
            continue
        share = {"all-reduce": 2 * (g - 1) / g, "reduce-scatter": g - 1, "collective-permute": 1}
        count = int(out * share.get(m["kind"], (g - 1) / g))
        across = bool((groups // NODE != groups[:, :1] // NODE).any())
        yield Moved(m["kind"], operation, count, across, "while/body" in operation)


# ---------------------------------------------------------------------------------- tables


def tables(results: list[dict[str, Any]]) -> str:
    """The tables of docs/scaling.md."""
    kinds = ["masters", "gradients", "moments", "sampler", "cache", "activations", "head"]
    lines = ["| | devices | mesh | " + " | ".join(kinds) + " | update | rollout |"]
    lines += ["|---" * (len(kinds) + 5) + "|"]
    for r in results:
        b = r["bytes"]
        update = sum(b[k] for k in ("masters", "moments", "gradients", "activations", "head"))
        update += b["masters"]  # a microbatch's own gradients, before they are added
        rollout = sum(b[k] for k in ("masters", "moments", "sampler", "cache"))
        cells = [f"{b[k] / 1e9:.1f}" for k in kinds] + [
            f"{update / 1e9:.1f}",
            f"{rollout / 1e9:.1f}",
        ]
        lines.append(
            f"| {r['model']} | {r['devices']} | {axes_of(r)} | " + " | ".join(cells) + " |"
        )
    groups = {
        "weights gathered": ("all-gather", "update"),
        "gradients scattered": ("reduce-scatter", "update"),
        "summed": ("all-reduce", "update"),
        "other": (None, "update"),
        "sampler's weights": ("all-gather", "sampler's weights"),
        "decoding": (None, "decoding"),
    }
    lines += ["", "| | devices | " + " | ".join(groups) + " | in the node | across nodes |"]
    lines += ["|---" * (len(groups) + 4) + "|"]
    for r in results:
        left, cells = list(r["moved"]), []
        for kind, stage in groups.values():
            own = [m for m in left if m["stage"] == stage and kind in (None, m["kind"])]
            left = [m for m in left if m not in own]
            cells.append(f"{sum(m['bytes'] for m in own) / 1e9:,.1f}")
        for across in (False, True):
            own = [m["bytes"] for m in r["moved"] if m["across_nodes"] == across]
            cells.append(f"{sum(own) / 1e9:,.1f}")
        lines.append(f"| {r['model']} | {r['devices']} | " + " | ".join(cells) + " |")
    lines += ["", "| | devices | sending in the node, s | across nodes, s | matmuls, s |"]
    lines += ["|---|---|---|---|---|"]
    for r in results:
        sent = [
            sum(m["bytes"] for m in r["moved"] if m["across_nodes"] == across)
            for across in (False, True)
        ]
        cells = [sent[0] / NVLINK, sent[1] / NETWORK, r["operations_per_device"] / MATMUL]
        cells = " | ".join(f"{x:,.2f}" for x in cells)
        lines.append(f"| {r['model']} | {r['devices']} | {cells} |")
    return "\n".join(lines)


def axes_of(r: dict[str, Any]) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1)


if __name__ == "__main__":
    main()
