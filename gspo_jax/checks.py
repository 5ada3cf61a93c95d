"""What must hold within and between settings, told before anything is loaded or compiled.

A message says what was got, what is wanted and what to change, with the name that the user typed.
"""

import difflib
import inspect
import math
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gspo_jax.advantages import ADVANTAGES
from gspo_jax.errors import ConfigError
from gspo_jax.losses import LOSSES, check_options, loss_options
from gspo_jax.models.config import QwenConfig
from gspo_jax.settings import (
    GAE,
    AlgoConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
)
from gspo_jax.tasks import SPLITS, TASKS, user_data

AT_LEAST = {
    "task.max_prompt_length": 1,
    "rollout.prompts": 1,
    "rollout.group_size": 1,
    "rollout.max_completion_length": 1,
    "rollout.top_k": 0,
    "rollout.resample": 0,
    "rollout.overlong_buffer": 0,
    "algo.minibatches": 1,
    "algo.epochs": 1,
    "algo.microbatch": 0,
    "algo.kl.coef": 0,
    "algo.entropy_coef": 0,
    "algo.router_aux_coef": 0,
    "algo.router_z_coef": 0,
    "algo.critic.learning_rate": 0,
    "algo.critic.coef": 0,
    "task.reward_memory": 0,
    "optim.learning_rate": 0,
    "optim.warmup": 0,
    "optim.weight_decay": 0,
    "eval.problems": 1,
    "eval.samples": 0,
    "eval.temperature": 0,
    "eval.every": 0,
    "eval.batch": 1,
    "sft.batch_size": 1,
    "run.seed": 0,
    "run.steps": 1,
    "run.save_every": 0,
    "run.keep": 1,
    "run.keep_every": 0,
    "run.log_completions": 0,
    "run.skip_budget": 0,
    "run.spike_sigmas": 0,
    "run.save_by": 0,
}

ONE_PER_RESPONSE = ("gspo", "luspo", "gmpo")  # of the losses; the others take one per token too

UNUSUAL = 30  # times a loss's own clip range; token and sequence ratios differ by 1000


def check_numbers(values: dict[str, Any]) -> None:
    """Single numbers by their dotted names: finite, and at least AT_LEAST."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value) and name != "optim.max_grad_norm":
            raise ConfigError(f"{name}={value}: expected a finite number.")
    for name, low in AT_LEAST.items():
        if values[name] < low:
            raise ConfigError(f"{name}={values[name]:g}: must be at least {low}.")


def check_model(model: ModelConfig) -> None:
    """A model is named; whether it is there is for the model's own loader to say."""
    if not model.path:
        raise ConfigError('model.path is empty; give a model directory, or "demo".')
    for name in model.template_args.keys() & {"messages", "add_generation_prompt"}:
        raise ConfigError(f"model.template_args.{name}: the prompt's own; it cannot be set.")


def check_task(task: TaskConfig, evaluation: EvalConfig) -> None:
    """One source of problems, options that it takes, and reward functions by name."""
    if (task.name is None) == (task.path is None):
        raise ConfigError(
            f"task.name={task.name or 'null'} with task.path={task.path or 'null'}: give one, "
            "a built-in task or data of your own, and set the other to null."
        )
    if task.name is not None and task.name not in TASKS:
        meant = _meant(task.name, TASKS)
        raise ConfigError(f"task.name={task.name}: {meant}the tasks are {sorted(TASKS)}.")
    if task.name is not None and task.fields:
        raise ConfigError(f"task.fields: columns of task.path; {task.name} has none.")
    source = user_data if task.name is None else TASKS[task.name]
    taken = [name for name in _defaults(source) if name not in ("seed", "fields")]
    for key in task.options:
        if key not in taken:
            raise ConfigError(f"task.options.{key}: {task.name or 'task.path'} takes {taken}.")
    for level, share in task.curriculum.items():
        if not 0 <= share < 1:
            raise ConfigError(
                f"task.curriculum.{level}={share:g}: the share of the run at which these problems "
                "join; it must be 0 or more and below 1."
            )
    if task.curriculum and 0 not in task.curriculum.values():
        raise ConfigError(f"task.curriculum={task.curriculum}: some level must start at 0.")
    for spec in task.rewards:
        if not all(spec.rpartition(":")[::2]):
            raise ConfigError(f"task.rewards: {spec!r} is not module:function or file.py:function.")
    if task.reward_timeout <= 0:
        raise ConfigError(f"task.reward_timeout={task.reward_timeout:g}: must be above 0 seconds.")
    functions = max(len(task.rewards), 1)
    if task.reward_weights and len(task.reward_weights) != functions:
        raise ConfigError(
            f"task.reward_weights has {len(task.reward_weights)} numbers for {functions} reward "
            "functions; give one each."
        )
    if evaluation.split not in SPLITS:
        raise ConfigError(f"eval.split={evaluation.split}: the splits are {list(SPLITS)}.")


def check_rollout(rollout: RolloutConfig, algo: AlgoConfig) -> None:
    """A group to compare within, and a distribution to sample from."""
    if rollout.group_size < 2 and algo.advantage.get("name") != "gae":
        raise ConfigError(
            f"rollout.group_size={rollout.group_size}: a group-relative advantage needs at least "
            "2 responses per prompt; with 1 every advantage is zero."
        )
    if rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature={rollout.temperature:g}: must be above 0; training samples, and "
            "at 0 a group would hold one response many times."
        )
    if not 0 < rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p={rollout.top_p:g}: must be above 0 and at most 1.")


def check_algo(algo: AlgoConfig, rollout: RolloutConfig) -> None:
    """Known functions with options that they take, and a rollout that splits evenly."""
    name = algo.loss.get("name")
    if name not in LOSSES:
        meant = _meant(str(name), LOSSES)
        raise ConfigError(f"algo.loss.name={name}: {meant}the losses are {list(LOSSES)}.")
    for key in algo.loss:
        if key in ELSEWHERE and key not in loss_options(name):
            raise ConfigError(f"algo.loss.{key}: {name} has none. Did you mean {ELSEWHERE[key]}?")
    try:
        check_options(name, algo.loss.keys() - {"name"})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_types("algo.loss", algo.loss, _defaults(LOSSES[name]))
    for key, value in algo.loss.items():
        if key.startswith("clip") and value <= 0:
            raise ConfigError(f"algo.loss.{key}={value:g}: must be above 0.")
    name = algo.advantage.get("name")
    known = [*ADVANTAGES, "gae"]
    if name not in known:
        meant = _meant(str(name), known)
        raise ConfigError(f"algo.advantage.name={name}: {meant}choose from {known}.")
    defaults = GAE if name == "gae" else _defaults(ADVANTAGES[name])
    taken = [key for key in defaults if key != "groups"]
    for key in algo.advantage.keys() - {"name", *taken}:
        raise ConfigError(f"algo.advantage.{key}: {name} takes {taken}.")
    _check_types("algo.advantage", algo.advantage, defaults)
    _check_critic(algo)
    if rollout.prompts % algo.minibatches:
        raise ConfigError(
            f"rollout.prompts={rollout.prompts} do not split into algo.minibatches="
            f"{algo.minibatches} equal parts; change one of them."
        )


def _check_critic(algo: AlgoConfig) -> None:
    """A critic and `gae` come together, with a loss that takes one advantage per token."""
    kind, advantage, loss = algo.critic.kind, algo.advantage["name"], algo.loss["name"]
    if advantage == "gae" and kind == "none":
        raise ConfigError(
            "algo.advantage.name=gae: needs the values of a critic; set algo.critic.kind to "
            "separate or shared."
        )
    if advantage != "gae" and kind != "none":
        raise ConfigError(
            f"algo.critic.kind={kind}: {advantage} makes no use of a critic; set "
            "algo.advantage=gae, or algo.critic.kind=none."
        )
    if advantage == "gae" and loss in ONE_PER_RESPONSE:
        raise ConfigError(
            f"algo.loss.name={loss}: takes one advantage per response, and gae gives one per "
            "token; choose ppo, or gspo_token."
        )
    for key in ("gamma", "lam"):
        if not 0 <= algo.advantage.get(key, 0) <= 1:
            raise ConfigError(f"algo.advantage.{key}={algo.advantage[key]:g}: must be in [0, 1].")
    if algo.critic.clip <= 0:
        raise ConfigError(f"algo.critic.clip={algo.critic.clip:g}: must be above 0.")


def check_experts(algo: AlgoConfig, shape: QwenConfig) -> None:
    """What concerns a router asks for a model that has one; told once the model is known."""
    for name, unused in (("routing_replay", "off"), ("router_aux_coef", 0), ("router_z_coef", 0)):
        value = getattr(algo, name)
        if value != unused and shape.experts is None:
            raise ConfigError(
                f"algo.{name}={value}: the model is {shape.family}, which has no experts; leave it "
                f"at {unused}."
            )


def check_mesh(mesh: Mesh, shape: QwenConfig) -> None:
    """What is split over devices must divide; told once the model is known, before compiling.

    Heads and experts alone: rows are filled up, and other axes that do not divide stay whole.
    """
    tensor, expert = mesh.shape["tensor"], mesh.shape["expert"]
    for heads in ("num_heads", "num_kv_heads"):
        if (count := getattr(shape, heads)) % tensor:
            hf = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}[heads]
            raise ConfigError(
                f"mesh.tensor={tensor}: the model has {hf}={count}, which do not split into "
                f"{tensor} equal parts; {math.gcd(shape.num_heads, shape.num_kv_heads)} and its "
                "divisors would."
            )
    if expert == 1:
        return
    if shape.experts is None:
        raise ConfigError(
            f"mesh.expert={expert}: the model is {shape.family}, which has no experts; use "
            "mesh.fsdp, or mesh.tensor."
        )
    if shape.experts.count % expert:
        raise ConfigError(
            f"mesh.expert={expert}: the model has num_experts={shape.experts.count}, which do not "
            f"split into {expert} equal parts; change mesh.expert to a divisor."
        )


def check_rest(optim: OptimConfig, mesh: MeshConfig, run: RunConfig) -> None:
    """The optimizer's ranges, the mesh, and where the run is kept."""
    for name in ("b1", "b2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ConfigError(f"optim.{name}={getattr(optim, name):g}: must be in [0, 1).")
    for name in ("eps", "max_grad_norm"):
        if not getattr(optim, name) > 0:
            raise ConfigError(f"optim.{name}={getattr(optim, name):g}: must be above 0.")
    for axis, size in vars(mesh).items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size}: at least 1, or -1 for all that remain.")
    if len(rest := [f"mesh.{axis}" for axis, size in vars(mesh).items() if size == -1]) > 1:
        raise ConfigError(f"{' and '.join(rest)} are both -1; give all of them but one a number.")
    if run.name in (".", "..") or Path(run.name).name != run.name:
        raise ConfigError(f"run.name={run.name}: a folder's name; run.dir says where it lies.")
    if not run.dir:
        raise ConfigError('run.dir is empty; "." is the current directory.')
    if not run.resume:
        raise ConfigError('run.resume is empty; give "auto", "never" or a checkpoint.')
    if unknown := sorted(set(run.report_to) - {"wandb"}):
        raise ConfigError(f"run.report_to={unknown}: only ['wandb'] is known.")


def algo_warnings(algo: AlgoConfig, rollout: RolloutConfig) -> list[str]:
    """What is possible but probably not meant, one line each."""
    name = algo.loss["name"]
    own = _defaults(LOSSES[name])
    out = [
        f"algo.loss.{key}={algo.loss[key]:g}: far from {name}'s own {own[key]:g}; the ratio of a "
        "whole response strays some 1000 times less than that of a token. null takes the default."
        for key in ("clip_low", "clip_high")
        if key in algo.loss and not 1 / UNUSUAL < algo.loss[key] / own[key] < UNUSUAL
    ]
    if algo.minibatches * algo.epochs == 1 and "clip_low" in loss_options(name):
        out.append(
            "algo.minibatches=1 with algo.epochs=1: one update per rollout, at ratio 1, so "
            "clipping can never act."
        )
    cut = [f"rollout.top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    cut += [f"rollout.top_k={rollout.top_k}"] if rollout.top_k else []
    if cut:
        out.append(
            f"{' and '.join(cut)}: responses come from a truncated distribution, while the update "
            "takes log-probabilities over the whole vocabulary."
        )
    return out


# What the same thing is called elsewhere, TRL first.
ELSEWHERE = {
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "beta": "algo.kl.coef",
    "chat_template_kwargs": "model.template_args",
    "dataset": "task.path",
    "dataset_name": "task.path",
    "enable_thinking": "model.template_args",
    "epsilon": "algo.loss.clip_low",
    "epsilon_high": "algo.loss.clip_high",
    "eval_steps": "eval.every",
    "gradient_accumulation_steps": "algo.microbatch",
    "gradient_checkpointing": "model.remat",
    "importance_sampling_level": "algo.loss.name",
    "kl_coef": "algo.kl.coef",
    "loss_type": "algo.loss.name",
    "lr": "optim.learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "mask_truncated_completions": "algo.mask_truncated",
    "max_new_tokens": "rollout.max_completion_length",
    "max_steps": "run.steps",
    "model_name_or_path": "model.path",
    "num_iterations": "algo.epochs",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "algo.microbatch",
    "resume_from_checkpoint": "run.resume",
    "reward_funcs": "task.rewards",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "scale_rewards": "algo.advantage.name",
    "steps_per_generation": "algo.minibatches",
    "warmup_steps": "optim.warmup",
}


def _defaults(function: Any) -> dict[str, Any]:
    """The keyword-only arguments of a function and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _check_types(setting: str, given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Texts where the default is a text, true or false likewise, finite numbers elsewhere."""
    for key, value in given.items():
        if isinstance(defaults.get(key), str) or key == "name":
            continue
        if isinstance(defaults.get(key), bool):
            if not isinstance(value, bool):
                raise ConfigError(f"{setting}.{key}={value}: expected true or false.")
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ConfigError(f"{setting}.{key}={value}: expected a finite number.")


def _meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]}? " if close else ""
