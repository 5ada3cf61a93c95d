"""Every test runs on the CPU with 8 simulated devices, strict dtypes and strict ranks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
import pytest
from flax import nnx

from gspo_jax.models.config import QwenConfig
from gspo_jax.models.qwen import Qwen

TINY = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny() -> Qwen:
    """A random two-layer Qwen2 whose logits spread enough for samples to differ."""
    model = Qwen(QwenConfig.from_hf(TINY), rngs=nnx.Rngs(0))
    model.embed[...] = model.embed[...] * 10
    return model


@pytest.fixture(scope="session")
def tiny_view(tiny):
    """Its pure view: (graphdef, params)."""
    return nnx.split(tiny)
