"""gspo_jax: Group Sequence Policy Optimization for Qwen-family language models, in JAX and Flax.

    losses      gspo, gspo_token, grpo, ppo, kl, LOSSES, Mean
    advantages  group_normalised, group_centred, leave_one_out, gae
    network     Qwen, load_model, save_model, token_logps
    optimizer   compress_state
    objects     GSPOTrainer, GSPOConfig, GSPOCustomDataset
    runs        Config, load_config; train.train, generate.generate, evaluate.evaluate

Each name is imported from its module when it is first used: commands that only read files start
without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_jax.advantages import gae, group_centred, group_normalised, leave_one_out
    from gspo_jax.config import Config, load_config
    from gspo_jax.logps import token_logps
    from gspo_jax.losses import LOSSES, Mean, grpo, gspo, gspo_token, kl, ppo
    from gspo_jax.models import Qwen, load_model, save_model
    from gspo_jax.optim import compress_state
    from gspo_jax.trainer import GSPOCustomDataset, GSPOTrainer
    from gspo_jax.trainer_config import GSPOConfig

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "GSPOConfig": "trainer_config",
    "GSPOCustomDataset": "trainer",
    "GSPOTrainer": "trainer",
    "LOSSES": "losses",
    "Mean": "losses",
    "Qwen": "models",
    "compress_state": "optim",
    "gae": "advantages",
    "group_centred": "advantages",
    "group_normalised": "advantages",
    "grpo": "losses",
    "gspo": "losses",
    "gspo_token": "losses",
    "kl": "losses",
    "leave_one_out": "advantages",
    "load_config": "config",
    "load_model": "models",
    "ppo": "losses",
    "save_model": "models",
    "token_logps": "logps",
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
