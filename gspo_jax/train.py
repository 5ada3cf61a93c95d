"""The loop: seven stages, in this order, under these names.

    1 prompt  2 rollout  3 reward  4 advantage  5 update  6 metrics  7 checkpoint

A step is one rollout and all of its updates. Every random draw and the order of the problems are
functions of (run.seed, step), so a resumed run continues exactly.
"""

from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from gspo_jax import advantages
from gspo_jax.batch import Completions
from gspo_jax.config import Config
from gspo_jax.losses import LOSSES
from gspo_jax.policy import Policy, load_policy, load_problems
from gspo_jax.rollout import (
    encode_prompts,
    rollout_metrics,
    sample_completions,
    score_completions,
    to_train_batch,
)
from gspo_jax.run import Result, make_state, open_run
from gspo_jax.sharding import shard_batch
from gspo_jax.tasks import order
from gspo_jax.update import Objective, make_programs, summarise, update_on_rollout


def train(config: Config) -> Result:
    """Train `config.model` on `config.task`; the run directory holds everything it leaves.

    Raises:
        ConfigError, DataError, StorageError: found before the first step.
        NumericalError: more than `run.skip_budget` updates were not finite.
    """
    c, roll = config, config.rollout
    policy = load_policy(config)
    problems = load_problems(config, policy.tokenizer)
    updates = c.run.steps * c.algo.minibatches * c.algo.epochs
    optimizer, schedule, state = make_state(config, policy, updates)
    reference = jax.tree.map(np.copy, policy.params) if c.algo.kl.coef else None
    shardings = jax.tree.map(lambda x: x.sharding, state)
    programs = make_programs(policy.graphdef, optimizer, objective(config, policy), shardings)
    advantage = make_advantage(config)
    place = partial(shard_batch, mesh=policy.mesh)

    with open_run(config, policy, problems) as run, jax.set_mesh(policy.mesh):
        state = run.start(state)
        for step in run.steps(state):
            with run.phase("generate"):
                key = jax.random.fold_in(jax.random.key(c.run.seed), step)
                train_set = problems.indices["train"]
                first = (step - 1) * roll.prompts
                chosen = order(len(train_set), first, roll.prompts, seed=c.run.seed)
                asked = problems.get("train", chosen)  # 1 prompt
                prompts = encode_prompts(policy.tokenizer, asked)
                completions, texts = sample_completions(  # 2 rollout
                    policy.sampler(state.params),
                    policy.tokenizer,
                    prompts,
                    key=key,
                    group_size=roll.group_size,
                    max_new_tokens=roll.max_completion_length,
                    temperature=roll.temperature,
                    top_p=roll.top_p,
                    top_k=roll.top_k,
                )
            with run.phase("reward"):
                rollout = score_completions(
                    problems.scorer, asked, prompts, completions, texts
                )  # 3
                adv = advantage(rollout.reward)  # 4 advantage
            with run.phase("update"):
                batch = to_train_batch(rollout, adv, mask_truncated=c.algo.mask_truncated)
                ref_logp = None if reference is None else programs.score(reference, place(batch))
                rate = float(schedule(int(state.updates)))
                state, stats, old_logp = update_on_rollout(  # 5 update
                    programs,
                    state,
                    batch,
                    minibatches=c.algo.minibatches,
                    epochs=c.algo.epochs,
                    ref_logp=ref_logp,
                    place=place,
                )
                stats = summarise(stats) | mismatch(old_logp, completions)
            metrics = rollout_metrics(rollout) | stats | {"learning_rate": rate}
            tokens = int(batch.prompt_length.sum() + completions.mask.sum())
            run.record(state, metrics, tokens=tokens, rollout=rollout, adv=adv)  # 6 metrics
            run.save(state)  # 7 checkpoint
        return run.finish(state)


def mismatch(old_logp: Float[np.ndarray, "B T"], completions: Completions) -> dict[str, float]:
    """|log π_old of the training program - that of the sampler|, over response tokens.

    Zero in exact arithmetic; what is left is the rounding of two programs. It should stay far
    below the clip range times the response length.
    """
    difference = np.abs(old_logp - completions.logp)[completions.mask]
    name = "sampling/sampling_logp_difference"
    return {f"{name}/mean": float(difference.mean()), f"{name}/max": float(difference.max())}


def objective(config: Config, policy: Policy) -> Objective:
    """The configured loss with its keywords bound, and how its forward pass is run."""
    options = dict(config.algo.loss)
    return Objective(
        loss=partial(LOSSES[options.pop("name")], **options),
        temperature=config.rollout.temperature,
        kl_coef=config.algo.kl.coef,
        kl_kind=config.algo.kl.kind,
        dtype=policy.dtype,
        remat=config.model.remat == "full",
        microbatch=config.algo.microbatch,
    )


def make_advantage(config: Config):
    """The configured advantage as reward [B] -> adv [B], on the host's arrays."""
    options = dict(config.algo.advantage)
    function = jax.jit(
        partial(
            getattr(advantages, options.pop("name")),
            group_size=config.rollout.group_size,
            **options,
        )
    )

    def advantage(reward: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
        return np.asarray(function(reward))

    return advantage
