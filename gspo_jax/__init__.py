"""gspo_jax: Group Sequence Policy Optimization for Qwen-family language models, in JAX and Flax.

    algo         gspo, gspo_token, grpo, ppo, kl, LOSSES, Mean; group_normalised, group_centred,
                 leave_one_out, gae; token_logps
    models       Qwen, load_model, save_model
    update       compress_state
    config       Config, load_config
    trainer      GSPOTrainer, GSPOConfig, GSPOCustomDataset

and, each from its own room, train.train, rollout.generate, evaluation.evaluate.evaluate.

Each name is imported from its module when it is first used: commands that only read files start
without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_jax.algo.advantages import gae, group_centred, group_normalised, leave_one_out
    from gspo_jax.algo.logps import token_logps
    from gspo_jax.algo.losses import LOSSES, Mean, grpo, gspo, gspo_token, kl, ppo
    from gspo_jax.config.load import Config, load_config
    from gspo_jax.models import Qwen, load_model, save_model
    from gspo_jax.trainer import GSPOCustomDataset, GSPOTrainer
    from gspo_jax.trainer_config import GSPOConfig
    from gspo_jax.update.optim import compress_state

__version__ = "0.1.0"

_HOME = {
    "Config": "config.load",
    "GSPOConfig": "trainer_config",
    "GSPOCustomDataset": "trainer",
    "GSPOTrainer": "trainer",
    "LOSSES": "algo.losses",
    "Mean": "algo.losses",
    "Qwen": "models",
    "compress_state": "update.optim",
    "gae": "algo.advantages",
    "group_centred": "algo.advantages",
    "group_normalised": "algo.advantages",
    "grpo": "algo.losses",
    "gspo": "algo.losses",
    "gspo_token": "algo.losses",
    "kl": "algo.losses",
    "leave_one_out": "algo.advantages",
    "load_config": "config.load",
    "load_model": "models",
    "ppo": "algo.losses",
    "save_model": "models",
    "token_logps": "algo.logps",
}

__all__ = [
    "LOSSES",
    "Config",
    "GSPOConfig",
    "GSPOCustomDataset",
    "GSPOTrainer",
    "Mean",
    "Qwen",
    "compress_state",
    "gae",
    "group_centred",
    "group_normalised",
    "grpo",
    "gspo",
    "gspo_token",
    "kl",
    "leave_one_out",
    "load_config",
    "load_model",
    "ppo",
    "save_model",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gspo_jax' has no attribute {name!r}")
    return getattr(import_module(f"gspo_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
