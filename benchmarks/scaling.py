"""What a training step needs on GPUs and TPUs, from its programs compiled for them.

    python benchmarks/scaling.py                       an hour on two cores; needs [targets]
    python benchmarks/scaling.py --cases r1-h200-1     one of them, minutes
    python benchmarks/scaling.py --again               only the tables

Nothing is run and no weight is made: `jax.ShapeDtypeStruct`s are lowered and compiled for devices
that are not here (`gspo_jax.plan.target`). Of each network two and four layers are compiled in full
width, and the rest extrapolated; docs/scaling.md has the tables, and says what is assumed. Results
are added to results/scaling.json.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gspo_jax.config.load import Config, load_config
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.config import QwenConfig
from gspo_jax.plan import costs, hlo
from gspo_jax.plan.account import Planned, compiled
from gspo_jax.plan.memory import Sketch, cache_bytes_of, row_ways
from gspo_jax.plan.programs import programs, sketch
from gspo_jax.plan.target import NODE, target_of
from gspo_jax.policy import Problems
from gspo_jax.tasks import Task

HERE = Path(__file__).parent
NVLINK, NETWORK, TORUS = 450e9, 50e9, 600e9  # bytes per second of each device, as stated
SHARE = 0.4  # of the datasheet's matmul rate
PROMPT, RESPONSE, GROUP, MINIBATCHES = 512, 4096, 8, 4
LAYERS = (2, 4)  # of one the head alone decides the peak

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


class Case(NamedTuple):
    """A network on devices.

    Attributes:
        responses: of a step.
        rows: responses of one forward and backward pass, on each device.
    """

    model: str
    target: str
    mesh: Mapping[str, int]
    responses: int
    rows: int = 4


# Weights are gathered, and tokens sent to experts, within a node; nodes share gradients alone.
CASES = {
    "r1-h200-1": Case("R1-Distill-1.5B", "h200:1", {"data": 1}, 64),
    "r1-h200-8": Case("R1-Distill-1.5B", "h200:8", {"data": 1, "fsdp": 8}, 512),
    "8b-h100-8": Case("Qwen3-8B", "h100:8", {"data": 1, "fsdp": 8}, 512),
    "a3b-h100-64": Case("Qwen3-30B-A3B", "h100:64", {"data": 8, "fsdp": 2, "expert": 4}, 2048),
    "a3b-v5p-64": Case("Qwen3-30B-A3B", "v5p:4x4x4", {"data": 8, "fsdp": 2, "expert": 4}, 2048),
}
PROGRAMS = ("add_logps", "add_grads", "apply", "_decode")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    options.add_argument("--programs", nargs="*", default=list(PROGRAMS), choices=PROGRAMS)
    options.add_argument("--out", default=HERE / "results" / "scaling.json")
    options.add_argument("--again", action="store_true", help="only the tables, from --out")
    given = options.parse_args()
    out = Path(given.out)
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    for name in [] if given.again else given.cases:
        for program in given.programs:
            results[name] = results.get(name) or about(CASES[name])
            results[name]["programs"][program] = measure(CASES[name], program)
            text = {"jax": jax.__version__, "results": results}
            out.write_text(json.dumps(text, indent=1) + "\n")
            print(f"{name}: {program}", flush=True)
    print(tables(results))


def about(case: Case) -> dict[str, Any]:
    """What follows from shapes and shardings, exactly."""
    whole = described(case, QwenConfig.from_hf(MODELS[case.model]).num_layers)
    c, held = whole.config, whole.held
    minibatch = case.responses // MINIBATCHES // row_ways(whole)  # rows of it, on a device
    ways = row_ways(whole)
    work = costs.step_work(
        whole.shape, c.rollout, c.algo, PROMPT, remat=True, itemsize=2, ways=ways
    )
    to = target_of(case.target)
    return {
        **case._asdict(),
        "device": to.devices[0].device_kind,
        "limit": to.limit,
        "microbatches": -(-minibatch // case.rows),
        "bytes": {**held._asdict(), "cache": cache_bytes_of(whole)},
        "seconds_of_matmuls": work.matmul / len(to.devices) / (SHARE * to.rates.matmul),
        "programs": {},
    }


def measure(case: Case, program: str) -> dict[str, Any]:
    """The figures of a program: of two layers and of four, and of all by the difference."""
    began, L = time.perf_counter(), QwenConfig.from_hf(MODELS[case.model]).num_layers
    few, more = (figures(case, program, layers) for layers in LAYERS)
    each = (L - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    total = {key: int(few[key] + each * (more[key] - few[key])) for key in few.keys() | more.keys()}
    alive = planned(described(case, L), program).alive
    held = {key: total.pop(key) for key in ("output", "aliased", "temporary")}
    return {
        **held,
        "alive": alive,
        "peak": alive + held["output"] - held["aliased"] + held["temporary"],
        "sent": [[*key.split("/"), count] for key, count in sorted(total.items()) if count],
        "seconds": time.perf_counter() - began,
    }


def figures(case: Case, program: str, layers: int) -> Counter:
    """Bytes on each device, and those that it sends, by "kind/where/how often"."""
    run = described(case, layers)
    account = compiled(planned(run, program))
    found = Counter({key: getattr(account, key) for key in ("output", "aliased", "temporary")})
    for x in hlo.collectives(account.text):
        nodes = x.groups // NODE
        across = case.target.startswith("h") and bool((nodes != nodes[:, :1]).any())
        where = "across" if across else "within"
        found[f"{x.kind}/{where}/{'looped' if x.looped else 'once'}"] += x.sent
    return found


def planned(run: Sketch, program: str) -> Planned:
    """The largest program of this name that a step runs."""
    found = [p for p in programs(run) if p.name == program and p.stage != "evaluate"]
    return max(found, key=lambda p: p.alive)


def described(case: Case, layers: int) -> Sketch:
    """The run in shapes alone: 512-token prompts, responses that all have 4,096 tokens."""
    shape = replace(QwenConfig.from_hf(MODELS[case.model]), num_layers=layers)
    config, to = configured(case), target_of(case.target)
    task = Task("none", {}, _nothing, _nothing)
    problems = Problems(task, {"train": [], "test": []}, 0, _nothing, PROMPT, PROMPT)
    mesh = make_mesh(**vars(config.mesh), devices=to.devices)
    return sketch(config, shape, problems, mesh, limit=to.limit)


def _nothing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("shapes alone")


def configured(case: Case) -> Config:
    ways = 1
    for axis in ("data", "fsdp", "expert"):
        ways *= case.mesh.get(axis, 1)
    settings = {
        "model.remat": "full",
        "task.max_prompt_length": PROMPT,
        "rollout.prompts": case.responses // GROUP,
        "rollout.group_size": GROUP,
        "rollout.max_completion_length": RESPONSE,
        "algo.minibatches": MINIBATCHES,
        "algo.microbatch": case.rows * ways,
    }
    settings |= {"algo.routing_replay": "R2"} if "A3B" in case.model else {}
    settings |= {f"mesh.{axis}": n for axis, n in case.mesh.items()}
    return load_config(None, [f"{name}={value}" for name, value in settings.items()])


# ---------------------------------------------------------------------------------- tables


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The tables of docs/scaling.md."""
    kinds = ("masters", "gradients", "moments", "weights", "cache")
    head = ["", "devices", "mesh", *kinds, "log-probs", "gradient", "optimizer", "decoding", "has"]
    lines = [_line(head), _line(["---"] * len(head))]
    for r in results.values():
        peaks = [r["programs"].get(name) for name in PROGRAMS]
        cells = [_gb(r["bytes"][kind]) for kind in kinds]
        cells += [_gb(p["peak"]) if p else "-" for p in peaks]
        lines.append(_line([r["model"], r["target"], axes_of(r), *cells, _gb(r["limit"])]))
    columns = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    head = ["", "devices", *columns, "decoding", "within, s", "across nodes, s", "matmuls, s"]
    lines += ["", _line(head), _line(["---"] * len(head))]
    for r in results.values():
        if r["programs"].keys() != set(PROGRAMS):
            continue
        sent = sent_in_a_step(r)
        cells = [
            _gb(sum(n for (k, s, _), n in sent.items() if k == kind and s != "_decode"))
            for kind in columns
        ]
        cells.append(_gb(sum(n for (_, stage, _), n in sent.items() if stage == "_decode")))
        within, across = (
            sum(n for (*_, place), n in sent.items() if place == where)
            for where in ("within", "across")
        )
        near = TORUS if "TPU" in r["device"] else NVLINK
        paper = [within / near, across / NETWORK, r["seconds_of_matmuls"]]
        cells += [f"{x:,.2f}" for x in paper]
        lines.append(_line([r["model"], r["target"], *cells]))
    return "\n".join(lines)


def sent_in_a_step(r: dict[str, Any]) -> Counter:
    """Bytes of a device by (kind, program, where)."""
    rounds = dict.fromkeys(("add_logps", "add_grads"), r["microbatches"]) | {"_decode": RESPONSE}
    calls = dict.fromkeys(PROGRAMS, MINIBATCHES) | {"add_logps": MINIBATCHES - 1, "_decode": 1}
    total: Counter = Counter()
    for name, program in r["programs"].items():
        for kind, where, often, count in program["sent"]:
            times = calls[name] * (rounds.get(name, 1) if often == "looped" else 1)
            total[kind, name, where] += times * count
    f = r["mesh"].get("fsdp", 1)  # the sampler's weights, once
    total["all-gather", "to_sample", "within"] += r["bytes"]["weights"] * (f - 1) // f
    return total


def axes_of(r: dict[str, Any]) -> str:
    return ", ".join(f"{axis} {n}" for axis, n in r["mesh"].items() if n > 1) or "-"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
