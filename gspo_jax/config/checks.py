"""What must hold within and between settings, told before anything is loaded or compiled.

A message says what was got, what is wanted and what to change, with the name that the user typed.
"""

import inspect
import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gspo_jax.config.names import AT_LEAST
from gspo_jax.config.settings import (
    ADVANTAGE_OPTIONS,
    LOSS_OPTIONS,
    TRACKERS,
    AlgoConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
)
from gspo_jax.errors import ConfigError
from gspo_jax.tasks import SPLITS, TASKS, user_data
from gspo_jax.tasks.sources import SPLIT_NAMES
from gspo_jax.text.spelling import ELSEWHERE, meant, shown

SCALES = ["group", "batch", "none"]  # whose standard deviation divides

ONE_PER_RESPONSE = ("gspo", "luspo", "gmpo")  # of the losses; the others take one per token too

LARGEST = 2**31 - 1  # of whole numbers; arrays are counted in 32 bits

LARGEST_SEED = 2**32 - 1  # JAX takes the lower 32 bits: larger ones would all be the same

UNUSUAL = 30  # times a loss's own clip range; token and sequence ratios differ by 1000


def check_numbers(values: dict[str, Any]) -> None:
    """Numbers by their dotted names: finite, and neither too small nor larger than can be used."""
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        floats = [number for number in numbers if isinstance(number, float)]
        if not all(map(math.isfinite, floats)) and name != "optim.max_grad_norm":
            raise ConfigError(f"{name}={shown(value)}: expected a finite number.")
        largest = LARGEST_SEED if name == "run.seed" else LARGEST
        if any(isinstance(number, int) and number > largest for number in numbers):
            raise ConfigError(f"{name}={shown(value)}: must be at most {largest}.")
    for name, low in AT_LEAST.items():
        if values[name] < low:
            raise ConfigError(f"{name}={shown(values[name])}: must be at least {low}.")


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
    if task.path == "":
        raise ConfigError("task.path is empty; give a file or a directory, or null.")
    if task.name is not None and task.name not in TASKS:
        known = f"The tasks are {sorted(TASKS)}; data of your own is task.path."
        raise ConfigError(f"task.name={task.name}: no such task.{meant(task.name, TASKS)} {known}")
    if task.name is not None and task.fields:
        raise ConfigError(f"task.fields: columns of task.path; {task.name} has none.")
    source = user_data if task.name is None else TASKS[task.name]
    taken = {k: v for k, v in _defaults(source).items() if k not in ("seed", "fields")}
    _check_known("task.options", task.options, list(taken), task.name or "task.path")
    for key, value in task.options.items():
        _check_type(f"task.options.{key}", value, taken[key])
    for level, share in task.curriculum.items():
        if not 0 <= share < 1:
            raise ConfigError(
                f"task.curriculum.{level}={shown(share)}: the share of the run at which these "
                "problems join; it must be 0 or more and below 1."
            )
    if task.curriculum and 0 not in task.curriculum.values():
        raise ConfigError(f"task.curriculum={shown(task.curriculum)}: some level must start at 0.")
    _check_rewards(task)
    if (split := evaluation.split) not in SPLITS:
        like = f" Did you mean {SPLIT_NAMES[split]}?" if split in SPLIT_NAMES else ""
        raise ConfigError(
            f"eval.split={split}: no such split.{like or meant(split, SPLITS)} The splits are "
            f"{list(SPLITS)}."
        )


def _check_rewards(task: TaskConfig) -> None:
    for spec in task.rewards:
        if not all(spec.rpartition(":")[::2]):
            raise ConfigError(
                f"task.rewards={shown(task.rewards)}: {spec!r} is not module:function or "
                "file.py:function."
            )
    if task.reward_timeout <= 0:
        raise ConfigError(
            f"task.reward_timeout={shown(task.reward_timeout)}: must be above 0 seconds."
        )
    weights, functions = task.reward_weights, max(len(task.rewards), 1)
    if weights and len(weights) != functions:
        raise ConfigError(
            f"task.reward_weights={shown(weights)}: {len(weights)} numbers for {functions} reward "
            f"function{'s' * (functions > 1)}; give one each."
        )


def check_rollout(rollout: RolloutConfig, algo: AlgoConfig) -> None:
    """A group to compare within, and a distribution to sample from."""
    if rollout.group_size < 2 and algo.advantage.get("name") != "gae":
        raise ConfigError(
            f"rollout.group_size={rollout.group_size}: a group-relative advantage needs at least "
            "2 responses per prompt; with 1 every advantage is zero."
        )
    if rollout.temperature <= 0:
        raise ConfigError(
            f"rollout.temperature={shown(rollout.temperature)}: must be above 0; training "
            "samples, and at 0 a group would hold one response many times."
        )
    if not 0 < rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p={shown(rollout.top_p)}: must be above 0 and at most 1.")
    if rollout.overlong_buffer > rollout.max_completion_length:
        raise ConfigError(
            f"rollout.overlong_buffer={rollout.overlong_buffer}: must be at most "
            f"rollout.max_completion_length={rollout.max_completion_length}."
        )


def check_algo(algo: AlgoConfig, rollout: RolloutConfig) -> None:
    """Known functions with options that they take, and a rollout that splits evenly."""
    _check_loss(algo.loss)
    _check_advantage(algo.advantage)
    _check_critic(algo)
    _check_kl(algo)
    if rollout.prompts % algo.minibatches:
        raise ConfigError(
            f"rollout.prompts={rollout.prompts} do not split into algo.minibatches="
            f"{algo.minibatches} equal parts; change one of them."
        )


def _check_loss(given: dict[str, Any]) -> None:
    name, taken = _chosen("algo.loss", given, LOSS_OPTIONS, "losses")
    for key in given:
        if key in ELSEWHERE and key not in taken:
            raise ConfigError(f"algo.loss.{key}: {name} has none. Did you mean {ELSEWHERE[key]}?")
        if key in ("aggregation", "loss_agg_mode", "mean", "over", "reduction"):
            advice = f"each loss has one mean, {name} that of its paper"
            if name in (*ONE_PER_RESPONSE, "gspo_token"):
                advice += "; luspo is the one that weighs responses by their tokens"
            raise ConfigError(f"algo.loss.{key}: {advice}.")
    _check_options("algo.loss", given, taken, name)
    if name not in LOSS_OPTIONS:
        return  # what its numbers may be is for its author to say
    options = taken | given
    for key, value in options.items():
        if key == "name" or value is None:
            continue
        if value < 0 or (value == 0 and key != "floor"):
            least = "at least 0" if key == "floor" else "above 0"
            raise ConfigError(f"algo.loss.{key}={shown(value)}: must be {least}.")
    if options.get("clip_low", 0) > 1:
        raise ConfigError(
            f"algo.loss.clip_low={shown(options['clip_low'])}: must be at most 1; ratios are "
            "clipped below at 1 - clip_low."
        )
    if (delta := options.get("delta")) is not None and delta <= 1 + options["clip_high"]:
        raise ConfigError(
            f"algo.loss.delta={shown(delta)}: bounds ratios above the clip range; it must be above "
            f"1 + clip_high, {1 + options['clip_high']:g}."
        )
    if "cap" in options and options["cap"] <= options["floor"]:
        raise ConfigError(
            f"algo.loss.cap={shown(options['cap'])}: must be above algo.loss.floor="
            f"{shown(options['floor'])}."
        )


def _check_advantage(given: dict[str, Any]) -> None:
    name, taken = _chosen("algo.advantage", given, ADVANTAGE_OPTIONS, "advantages")
    _check_options("algo.advantage", given, taken, name)
    if name not in ADVANTAGE_OPTIONS:
        return
    if (scale := given.get("scale", "group")) not in SCALES:
        raise ConfigError(
            f"algo.advantage.scale={shown(scale)}: expected one of {SCALES}.{meant(scale, SCALES)}"
        )
    if (ddof := given.get("ddof", 1)) not in (0, 1):
        raise ConfigError(f"algo.advantage.ddof={shown(ddof)}: expected 0 or 1.")
    if given.get("eps", 0) < 0:
        raise ConfigError(f"algo.advantage.eps={shown(given['eps'])}: must be at least 0.")
    for key in ("gamma", "lam"):
        if not 0 <= given.get(key, 0) <= 1:
            raise ConfigError(f"algo.advantage.{key}={shown(given[key])}: must be from 0 to 1.")


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
    if algo.critic.clip <= 0:
        raise ConfigError(f"algo.critic.clip={shown(algo.critic.clip)}: must be above 0.")


def _check_kl(algo: AlgoConfig) -> None:
    """A penalty that the advantage can take, and a weight that can be steered."""
    kl, in_reward = algo.kl, algo.kl.coef > 0 and algo.kl.placement == "reward"
    if kl.target and not in_reward:
        raise ConfigError(
            f"algo.kl.target={shown(kl.target)}: steers the weight of a penalty in the reward; set "
            "algo.kl.placement=reward and algo.kl.coef above 0, or leave it out."
        )
    if in_reward and algo.advantage["name"] == "normalise_then_sum":
        raise ConfigError(
            "algo.kl.placement=reward: normalise_then_sum normalises each reward function apart, "
            "and the penalty is none; set algo.kl.placement=loss."
        )


def check_rest(optim: OptimConfig, mesh: MeshConfig, run: RunConfig) -> None:
    """The optimizer's ranges, the mesh, and where the run is kept."""
    for name in ("b1", "b2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ConfigError(
                f"optim.{name}={shown(getattr(optim, name))}: must be at least 0 and below 1."
            )
    for name in ("eps", "max_grad_norm"):
        if not getattr(optim, name) > 0:
            raise ConfigError(f"optim.{name}={shown(getattr(optim, name))}: must be above 0.")
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
    for name in run.report_to:
        if name not in TRACKERS:
            raise ConfigError(
                f"run.report_to={shown(run.report_to)}: {name!r} is no tracker of ours."
                f"{meant(name, TRACKERS)} They are {list(TRACKERS)}."
            )
    if any(step < 1 for step in run.profile_steps):
        raise ConfigError(f"run.profile_steps={shown(run.profile_steps)}: steps count from 1.")


def algo_warnings(algo: AlgoConfig, rollout: RolloutConfig) -> list[str]:
    """What is possible but probably not meant, one line each."""
    name = algo.loss["name"]
    own = LOSS_OPTIONS.get(name, {})
    out = [
        f"algo.loss.{key}={shown(algo.loss[key])}: far from {name}'s own {shown(own[key])}; the "
        "ratio of a whole response strays some 1000 times less than that of a token. null takes "
        "the default."
        for key in ("clip_low", "clip_high")
        if key in algo.loss and key in own and not 1 / UNUSUAL < algo.loss[key] / own[key] < UNUSUAL
    ]
    if algo.minibatches * algo.epochs == 1 and "clip_low" in own:
        out.append(
            "algo.minibatches=1 with algo.epochs=1: one update per rollout, at ratio 1, so "
            "clipping can never act."
        )
    cut = [f"rollout.top_p={shown(rollout.top_p)}"] if rollout.top_p < 1 else []
    cut += [f"rollout.top_k={rollout.top_k}"] if rollout.top_k else []
    if cut:
        out.append(
            f"{' and '.join(cut)}: responses come from a truncated distribution, while the update "
            "takes log-probabilities over the whole vocabulary."
        )
    return out


def _chosen(
    setting: str, given: dict[str, Any], table: dict[str, dict[str, Any]], module: str
) -> tuple[str, dict[str, Any]]:
    """The function that is named, of `table` or of what a script has put into the module's own
    table of `algo`, which has none before it is loaded; and the options that it takes.

    The keywords `weight` and `groups` of the latter are the program's, and no settings.
    """
    loaded = getattr(sys.modules.get(f"gspo_jax.algo.{module}"), module.upper(), {})
    own = {key: _defaults(loaded[key]) for key in loaded if key not in table}
    reserved = ("weight", "groups")
    own = {n: {k: v for k, v in o.items() if k not in reserved} for n, o in own.items()}
    name, known = given.get("name"), table | own
    if name is None or name not in known:
        kind = setting.rpartition(".")[2]
        raise ConfigError(
            f"{setting}.name={shown(name)}: no such {kind}.{meant(name, known)} "
            f"Choose from {list(known)}."
        )
    return name, known[name]


def _defaults(function: Any) -> dict[str, Any]:
    """The keyword-only arguments of a function and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _check_options(
    setting: str, given: dict[str, Any], defaults: dict[str, Any], owner: str
) -> None:
    """Options that `owner` takes, of the types of their defaults; a number where that is null."""
    _check_known(setting, given.keys() - {"name"}, list(defaults), owner)
    for key in given.keys() - {"name"}:
        default = defaults[key]
        _check_type(f"{setting}.{key}", given[key], 0.0 if default is None else default)


def _check_known(setting: str, given: Collection[str], taken: list[str], owner: str) -> None:
    for key in sorted(given):
        if key not in taken:
            like = meant(key, taken)
            raise ConfigError(
                f"{setting}.{key}: {owner} has no such option.{like} It takes {taken or 'none'}."
            )


def _check_type(setting: str, value: Any, default: Any) -> None:
    """A switch, a whole number or a number where the default is one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{setting}={shown(value)}: expected true or false.")
    if type(default) is int and (not is_number or isinstance(value, float)):
        raise ConfigError(f"{setting}={shown(value)}: expected a whole number, like {default}.")
    if isinstance(default, float) and not (is_number and math.isfinite(value)):
        raise ConfigError(f"{setting}={shown(value)}: expected a finite number.")
