"""What a run would do, checked as far as can be without weights, compiling or writing a file."""

import math
from pathlib import Path

from gspo_jax import checkpoint
from gspo_jax.checks import check_experts
from gspo_jax.config import Config, model_dir, run_dir
from gspo_jax.metrics import check_place
from gspo_jax.models.files import find_tensors
from gspo_jax.models.hf import lent_files, read_config
from gspo_jax.policy import load_problems
from gspo_jax.tokenizer import load_tokenizer


def plan(config: Config) -> str:
    """One line per stage, after reading the model's headers, the task and the reward functions.

    Raises:
        DataError: the model directory, the data or a reward function is not what it should be.
        StorageError: the run directory is in use, or cannot be written.
    """
    directory = model_dir(config)
    shape = read_config(directory)
    check_experts(config.algo, shape)
    size = "random weights"
    if config.model.init == "pretrained":
        count = sum(math.prod(tensor.shape) for tensor in find_tensors(directory).values())
        size = f"{count / 1e6:,.2f} M parameters"
    lent_files(directory)
    tokenizer = load_tokenizer(directory, template_args=config.model.template_args)
    problems = load_problems(config, tokenizer)
    check_place(run_dir(config))
    lines = {
        "model": f"{directory}: {shape.family}, {shape.num_layers} layers, {size}",
        "task": _task(config, problems),
        "rewards": _rewards(config),
        "step": _step(config),
        "run": _run(config),
        "eval": _eval(config),
        "writes": _place(run_dir(config)),
    }
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def _task(config: Config, problems) -> str:
    counts = ", ".join(f"{len(kept):,} {split}" for split, kept in problems.indices.items())
    text = f"{config.task.name or config.task.path}: {counts}"
    if problems.too_long:
        text += f"; {problems.too_long:,} left out, longer than {config.task.max_prompt_length}"
    return text


def _rewards(config: Config) -> str:
    names = config.task.rewards or ["the task's own"]
    weights = config.task.reward_weights or [1.0] * len(names)
    return ", ".join(f"{name} x {weight:g}" for name, weight in zip(names, weights, strict=True))


def _step(config: Config) -> str:
    rollout, algo = config.rollout, config.algo
    responses = rollout.prompts * rollout.group_size
    updates = algo.minibatches * algo.epochs
    return (
        f"{rollout.prompts} prompts x {rollout.group_size} responses of at most "
        f"{rollout.max_completion_length} tokens; {algo.loss['name']}, {updates} updates of "
        f"{responses // algo.minibatches} responses"
    )


def _run(config: Config) -> str:
    optim, steps = config.optim, config.run.steps
    updates = steps * config.algo.minibatches * config.algo.epochs
    return (
        f"{steps:,} steps = {updates:,} updates, learning rate {optim.learning_rate:g} "
        f"{optim.schedule}, {optim.state} optimizer state"
    )


def _eval(config: Config) -> str:
    e = config.eval
    when = f"every {e.every} steps, before and after" if e.every else "before and after"
    return f"{e.problems} {e.split} problems, greedy and {e.samples} samples each, {when}"


def _place(directory: Path) -> str:
    found = checkpoint.steps(directory / "checkpoints")
    return f"{directory} ({f'has checkpoints of steps {found}' if found else 'new'})"
