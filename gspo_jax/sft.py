"""Supervised fine-tuning on worked solutions, with the update stage of reinforcement learning.

The negative log-likelihood is REINFORCE with advantage 1 on given tokens, averaged over tokens:
the same programs, the same optimizer, the same checkpoints.
"""

import numpy as np

from gspo_jax.batch import Problem, TrainBatch
from gspo_jax.config.load import Config
from gspo_jax.errors import DataError
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.plan.memory import held_by, passes
from gspo_jax.policy import load_policy, load_problems, text_sizes, within_positions
from gspo_jax.prompt.tokenizer import Tokenizer
from gspo_jax.run.lifecycle import Result, open_run
from gspo_jax.start import base_objective, make_state, update_programs
from gspo_jax.update.optim import schedule_count


def sft(config: Config) -> Result:
    """Train `config.model` on the "completion" column of `config.task`, one update per step.

    Raises:
        DataError: a problem without a completion, or with one that does not fit.
    """
    c = config
    policy = load_policy(config)
    problems = load_problems(config, policy.tokenizer, scored=False)
    shape = read_model_config(policy.directory)
    problems = within_positions(config, shape, problems)
    optimizer, schedule, state = make_state(config, policy, updates=c.run.steps)
    sizes = text_sizes(config, problems, policy.mesh)
    held = held_by(state, dtype=policy.dtype, reference=False)
    how = passes(config, policy, shape, held, sizes)
    objective = base_objective(config, policy, problems, how)
    programs = update_programs(config, policy, optimizer, objective, state)
    total = c.run.steps * c.sft.batch_size

    with open_run(config, policy, problems, kind="sft") as run:
        state = run.start(state)
        for step in run.steps(state):
            first = (step - 1) * c.sft.batch_size
            chosen = problems.visit(first, c.sft.batch_size, total=total, seed=c.run.seed)
            shown = problems.get("train", chosen)
            batch = solutions(shown, policy.tokenizer, config, objective.longest)
            rate = float(schedule(schedule_count(state.opt_state)))
            state, stats, _ = programs.update(state, batch, phase=run.phase)
            state = state._replace(step=state.step + 1)
            metrics = {name: float(stats[name].value) for name in ("loss", "grad_norm", "entropy")}
            tokens = int(batch.prompt_length.sum() + batch.length.sum())
            run.record(state, metrics | {"learning_rate": rate}, tokens=tokens)
            run.save(state)
        return run.finish(state)


def solutions(
    problems: list[Problem], tokenizer: Tokenizer, config: Config, width: int
) -> TrainBatch:
    """Prompts with their worked solutions and an end of sequence, advantage 1 on each."""
    limit = config.rollout.max_completion_length
    rows = len(problems)
    tokens = np.full((rows, width), tokenizer.pad_id, np.int32)
    prompt_length, length = np.zeros((2, rows), np.int32)
    prompts = tokenizer.encode_prompts([p.prompt for p in problems])
    for row, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        text = problem.columns.get("completion")
        if not isinstance(text, str):
            raise DataError(f'problem {problem.id}: no "completion" to learn from, got {text!r}.')
        answer = [*tokenizer.encode(text), tokenizer.eos_ids[0]]
        if len(answer) > limit:
            raise DataError(
                f"problem {problem.id}: its completion has {len(answer)} tokens; raise "
                f"rollout.max_completion_length={limit}."
            )
        prompt_length[row], length[row] = len(prompt), len(answer)
        tokens[row, : len(prompt) + len(answer)] = [*prompt, *answer]
    mask = np.arange(limit)[None] < length[:, None]
    return TrainBatch(tokens, prompt_length, length, mask, np.ones(rows, np.float32))
