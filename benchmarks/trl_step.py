"""The other side of `versus_trl.py`: the same step by TRL and transformers, timed per step.

Runs in an environment of its own: torch==2.13.0, then trl==1.16.0. Same model directory, prompts,
group size, lengths, dtype (float32), loss and optimizer (AdamW) as `step.py`.
"""

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    o = parse()
    torch.set_num_threads(os.cpu_count() or 1)
    lines = (o.model_dir / "prompts.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    system = [{"role": "system", "content": "Add."}]
    chats = [{"prompt": [*system, {"role": "user", "content": q}]} for q in questions]
    rows = o.prompts * o.group_size
    stop = {"min_new_tokens": o.new_tokens}
    if o.eos:
        stop = {"eos_token_id": list(range(3, 3 + o.eos))}
    phases: dict[str, float] = {}
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        """Seconds between the ends of two rollouts' last updates."""

        began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % o.minibatches == 0:
                now = time.perf_counter()
                steps.append({"step": now - Clock.began, **phases})
                Clock.began = now
                phases.clear()

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(o.model_dir, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(o.model_dir),
        reward_funcs=digits,
        train_dataset=Dataset.from_list(chats),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir="/tmp/trl_out",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=rows // o.minibatches,
            steps_per_generation=o.minibatches,
            num_generations=o.group_size,
            max_completion_length=o.new_tokens,
            max_steps=(o.warmup + o.steps) * o.minibatches,
            importance_sampling_level="sequence",
            loss_type="grpo",
            epsilon=3e-4,
            epsilon_high=4e-4,
            beta=0.0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            generation_kwargs=stop,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        ),
    )
    inner = trainer._generate_single_turn

    def generate(*args, **kwargs):
        began = time.perf_counter()
        out = inner(*args, **kwargs)
        phases["generate"] = phases.get("generate", 0.0) + time.perf_counter() - began
        return out

    trainer._generate_single_turn = generate
    trainer.train()
    kept = steps[o.warmup :]
    result = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "median": {name: statistics.median(row[name] for row in kept) for name in kept[0]},
        "steps": [row["step"] for row in kept],
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result))


def digits(completions, **_) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in texts]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--eos", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
