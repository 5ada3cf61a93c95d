"""Qwen-family language models: their shape, their network, their directories."""

from gspo_jax.models.config import QwenConfig
from gspo_jax.models.hf import load_model, save_model
from gspo_jax.models.qwen import Qwen

__all__ = ["Qwen", "QwenConfig", "load_model", "save_model"]
