"""What a script for a trainer class sets, under the names that such classes have.

The fields are settings of ours under other names, and so are the flags of scripts/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_jax.config.load import Config, load_config
from gspo_jax.errors import ConfigError
from gspo_jax.text.spelling import meant


@dataclass(frozen=True, init=False)
class GSPOConfig:
    """What a script sets; every field acts. `to_config` says which setting of ours each one is.

    Raises:
        ConfigError: no such field; the one that was meant, or what there is instead.
    """

    learning_rate: float = 1e-6
    left_clip_range: float = 3e-4
    """ε_low of the response's ratio, as in the paper."""
    right_clip_range: float = 4e-4
    """ε_high."""
    group_size: int = 8
    """Responses per prompt."""
    batch_size: int = 8
    """Prompts per step."""
    mini_batch_size: int = 0
    """Responses per forward and backward pass; 0 is by tokens. Changes memory and speed alone."""
    minibatches_per_rollout: int = 0
    """Updates per step; 0 is 4, or the largest number below that divides `batch_size`."""
    num_epochs: int = 1
    """Passes of `train` over its data."""
    max_prompt_length: int = 512
    """Tokens; problems with longer prompts are refused."""
    max_new_tokens: int = 256
    """Tokens of a response, at most."""
    max_length: int = 0
    """Prompt and response together, in place of `max_new_tokens`; 0 is unset."""
    temperature: float = 1.0
    """Of the samples, and of the policy that is trained."""
    max_grad_norm: float = 1.0
    advantage_normalization: bool = True
    """Divide by the standard deviation of the group; False subtracts the mean alone."""
    use_8bit_optimizer: bool = True
    use_gradient_checkpointing: bool = False
    """Recompute whole layers in the backward pass."""
    eval_frequency: int = 0
    """Steps of `train` between evaluations; 0 is before and after alone."""
    seed: int = 0

    def __init__(self, **fields: Any):
        known = list(self.__dataclass_fields__)
        for name, value in fields.items():
            if name in ELSEWHERE:
                raise ConfigError(f"GSPOConfig has no {name}: {ELSEWHERE[name]}.")
            if name not in known:
                raise ConfigError(f"GSPOConfig has no {name}.{meant(name, known)} It has {known}.")
            object.__setattr__(self, name, value)  # the others have the class's value

    def to_config(self, directory: Path) -> Config:
        """The same as a `Config`, for the model in `directory`.

        Raises:
            ConfigError: a value out of range.
        """
        new = self.max_new_tokens
        if self.max_length:
            new = self.max_length - self.max_prompt_length
        if new < 1:
            raise ConfigError(
                f"max_length={self.max_length} leaves no token beside max_prompt_length="
                f"{self.max_prompt_length}; lower the latter, or set max_new_tokens."
            )
        parts = self.minibatches_per_rollout
        parts = parts or max(n for n in (1, 2, 3, 4) if self.batch_size % n == 0)
        advantage = "group_normalised" if self.advantage_normalization else "group_centred"
        settings = {name: getattr(self, field) for name, field in FIELDS.items()} | {
            "model.path": str(directory),
            "model.remat": "full" if self.use_gradient_checkpointing else "auto",
            "rollout.max_completion_length": new,
            "algo.loss.name": "gspo",
            "algo.advantage.name": advantage,
            "algo.minibatches": parts,
            "optim.state": "8bit" if self.use_8bit_optimizer else "float32",
        }
        try:
            return load_config(None, [f"{name}={value}" for name, value in settings.items()])
        except ConfigError as error:
            message = str(error)
            for name, field in FIELDS.items():
                message = message.replace(name, field)
            raise ConfigError(message) from None


FIELDS = {
    "task.max_prompt_length": "max_prompt_length",
    "rollout.prompts": "batch_size",
    "rollout.group_size": "group_size",
    "rollout.max_completion_length": "max_new_tokens",
    "rollout.temperature": "temperature",
    "algo.loss.clip_low": "left_clip_range",
    "algo.loss.clip_high": "right_clip_range",
    "algo.minibatches": "minibatches_per_rollout",
    "algo.microbatch": "mini_batch_size",
    "optim.learning_rate": "learning_rate",
    "optim.max_grad_norm": "max_grad_norm",
    "run.seed": "seed",
}
"""Settings of ours, and the fields that set them."""

ELSEWHERE = {
    "gradient_accumulation_steps": "set mini_batch_size, whose passes are added up exactly",
    "reward_normalization": "rewards are compared within their group; see advantage_normalization",
    "log_frequency": "every step returns its metrics",
    "device": "jax chooses it (JAX_PLATFORMS); gspo-jax train has mesh.*",
}
"""Fields of other GSPO trainers, and what there is instead."""
