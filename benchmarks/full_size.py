"""A full-size model in and out: DeepSeek-R1-Distill-Qwen-1.5B's shape, with random weights.

    python benchmarks/full_size.py [--dir /tmp/fullsize]     (needs the `parity` extra; 12 GB free)

Each phase is a process of its own, so that time and peak memory are its own: the peak is the
ru_maxrss that the system reports of it, interpreter and libraries included. What those take alone
is the phase `import`. Prints a table, writes results/full_size_<host>.json, exits 1 where a
tensor, a logit or a peak is not as it should be.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151646,
    "eos_token_id": 151643,
}
SHARD_BYTES = 2 * 10**9
SLACK = 1.15  # over the weights in their dtype and the largest tensor once more
TOKENS = [(7919 * i) % CONFIG["vocab_size"] for i in range(1, 17)]


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor on disk, as transformers names it."""
    V, D, F = (CONFIG[k] for k in ("vocab_size", "hidden_size", "intermediate_size"))
    K = D // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (D, D),
        "self_attn.q_proj.bias": (D,),
        "self_attn.k_proj.weight": (K, D),
        "self_attn.k_proj.bias": (K,),
        "self_attn.v_proj.weight": (K, D),
        "self_attn.v_proj.bias": (K,),
        "self_attn.o_proj.weight": (D, D),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    layers = range(CONFIG["num_hidden_layers"])
    found = {"model.embed_tokens.weight": (V, D)}
    found |= {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    return found | {"model.norm.weight": (D,), "lm_head.weight": (V, D)}


# ---------------------------------------------------------------------------------- the phases


def write(root: Path) -> dict[str, Any]:
    """The source: random bfloat16 in shards of 2 GB."""
    import ml_dtypes

    from gspo_jax.models.hf import files

    dtype = np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)

    def drawn(part: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
        for name, shape in part.items():
            noise = rng.standard_normal(shape, np.float32)
            if name.endswith("norm.weight"):
                noise = 1 + noise / 10
            else:
                noise *= 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[1])
            yield noise.astype(dtype)

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes().items():
        if 2 * sum(map(math.prod, (*shards[-1].values(), shape))) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    source = root / "source"
    source.mkdir(parents=True)
    weight_map = {}
    for number, part in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.write_tensors(source / name, part, dtype, drawn(part))
        weight_map |= dict.fromkeys(part, name)
    (source / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps(CONFIG))
    return {"tensors": len(weight_map), "shards": len(shards)}


def imports(root: Path) -> dict[str, Any]:
    """What a process takes that reads nothing."""
    import jax

    import gspo_jax.models  # noqa: F401

    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    return {}


def load(root: Path, dtype: str) -> dict[str, Any]:
    """The source into memory."""
    import jax
    from flax import nnx

    from gspo_jax.models import load_model

    began = time.perf_counter()
    model = load_model(root / "source", dtype=dtype)
    sizes = [jax.block_until_ready(p[...]).nbytes for _, p in nnx.to_flat_state(nnx.state(model))]
    return {
        "seconds": time.perf_counter() - began,
        "weights": sum(sizes),
        "limit": SLACK * (sum(sizes) + max(sizes)),
    }


def forward(root: Path) -> dict[str, Any]:
    """Our logits of 16 tokens, in float32."""
    import jax
    from flax import nnx

    from gspo_jax.models import load_model

    graphdef, params = nnx.split(load_model(root / "source", dtype="float32"))
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).logits(tokens))
    tokens = np.array([TOKENS], np.int32)
    np.save(root / "ours.npy", np.asarray(run(params, tokens)))
    began = time.perf_counter()
    np.asarray(run(params, tokens))
    return {"seconds": time.perf_counter() - began}


def export(root: Path) -> dict[str, Any]:
    """Loaded in bfloat16 and written again."""
    from gspo_jax.models import load_model, save_model

    model = load_model(root / "source", dtype="bfloat16")
    began = time.perf_counter()
    save_model(model, root / "export", like=root / "source", shard_bytes=SHARD_BYTES)
    return {"seconds": time.perf_counter() - began}


def transformers(root: Path) -> dict[str, Any]:
    """transformers' logits of the export, in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        root / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        np.save(root / "theirs.npy", model.eval()(torch.tensor([TOKENS])).logits.numpy())
    return {}


def compare(root: Path) -> dict[str, Any]:
    """Every bit of every tensor, through the safetensors library; and the logits."""
    import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
    from safetensors import safe_open

    def opened(directory: Path) -> dict[str, Any]:
        handles = [safe_open(path, "numpy") for path in sorted(directory.glob("*.safetensors"))]
        return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118

    source, exported = opened(root / "source"), opened(root / "export")
    differing = sorted(source.keys() ^ exported.keys())
    for name in source.keys() & exported.keys():
        a, b = (files[name].get_tensor(name) for files in (source, exported))
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        if not same or not np.array_equal(a.view(np.uint16), b.view(np.uint16)):
            differing.append(name)
    ours, theirs = np.load(root / "ours.npy"), np.load(root / "theirs.npy")
    return {
        "tensors": len(source),
        "differing": differing[:5],
        "logits_largest_difference": float(np.abs(ours - theirs).max()),
        "logits_largest": float(np.abs(theirs).max()),
        "greedy_agrees": bool((ours.argmax(-1) == theirs.argmax(-1)).all()),
    }


PHASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "write": write,
    "import": imports,
    "load bfloat16": lambda root: load(root, "bfloat16"),
    "load float32": lambda root: load(root, "float32"),
    "forward": forward,
    "export": export,
    "transformers": transformers,
    "compare": compare,
}


# ---------------------------------------------------------------------------------- the parent


def measured(phase: str, root: Path) -> dict[str, Any]:
    """One phase in a process of its own, with its wall time and the system's peak of it."""
    command = [sys.executable, __file__, "--dir", str(root), "--phase", phase]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"phase {phase} failed with {process.returncode}")
    return {
        "wall_seconds": time.perf_counter() - began,
        "peak_bytes": usage.ru_maxrss * 1024,
        **json.loads(said.strip().splitlines()[-1]),
    }


def failures(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is not as it should be."""
    found = [
        f"{phase}: peak of {result['peak_bytes'] / 1e9:.2f} GB, at most {result['limit'] / 1e9:.2f}"
        for phase, result in results.items()
        if "limit" in result and result["peak_bytes"] > result["limit"]
    ]
    last = results["compare"]
    if last["differing"]:
        found.append(f"tensors differ: {last['differing']}")
    if last["logits_largest_difference"] > 1e-3 or not last["greedy_agrees"]:
        found.append(f"logits differ: {last}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("/tmp/fullsize"))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(PHASES[arguments.phase](arguments.dir)))
        return 0
    if arguments.dir.exists():
        raise SystemExit(f"{arguments.dir} exists already; choose another --dir, or remove it.")
    results = {}
    print(f"{'phase':16} {'wall s':>8} {'itself s':>9} {'peak GB':>8} {'limit GB':>9}")
    try:
        for phase in PHASES:
            r = results[phase] = measured(phase, arguments.dir)
            own = f"{r['seconds']:9.2f}" if "seconds" in r else " " * 9
            limit = f"{r['limit'] / 1e9:9.2f}" if "limit" in r else ""
            print(f"{phase:16} {r['wall_seconds']:8.1f} {own} {r['peak_bytes'] / 1e9:8.2f} {limit}")
    finally:
        shutil.rmtree(arguments.dir, ignore_errors=True)
    print(json.dumps(results["compare"]))

    import jax

    from gspo_jax.files.provenance import environment

    env = environment([str(d) for d in jax.devices()])
    env = {key: value for key, value in env.items() if key != "host"}
    wrong = failures(results)
    record = {"environment": env, "config": CONFIG, "results": results, "failures": wrong}
    path = HERE / "results" / f"full_size_{jax.default_backend()}_{os.cpu_count()}cores.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([str(path), *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
