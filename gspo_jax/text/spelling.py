"""How a wrong setting is told: the value as it is typed, and what was probably meant."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 80  # characters of a value in a message

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
    "multi_objective_aggregation": "algo.advantage.name",
    "num_epochs": "run.steps",
    "num_iterations": "algo.epochs",
    "num_train_epochs": "run.steps",
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
"""What the same setting is called elsewhere, TRL first."""


def meant(name: Any, known: Iterable[Any]) -> str:
    """ " Did you mean x?", where something known is near, in whatever case; else nothing."""
    plain = {str(item).lower().replace("-", "_"): str(item) for item in known}
    close = difflib.get_close_matches(str(name).lower().replace("-", "_"), plain, 1)
    return f" Did you mean {plain[close[0]]}?" if close else ""


def shown(value: Any) -> str:
    """A value as one would type it, on one line, cut where it is long."""
    text = _typed(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _typed(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        case dict():
            return f"{{{', '.join(f'{_typed(k)}: {_typed(v)}' for k, v in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_typed, value))}]"
    return str(value)


def without_comma(text: Any, kind: type) -> str:
    """ " Did you mean 1024?" of 1,024, and 1.5 of 1,5 where a fraction may stand; else nothing."""
    if kind is int and re.fullmatch(r"-?\d{1,3}(,\d{3})+", str(text)):
        return f" Did you mean {str(text).replace(',', '')}?"
    if kind is float and re.fullmatch(r"-?\d+,\d+", str(text)):
        return f" Did you mean {str(text).replace(',', '.')}?"
    return ""
