"""Every test runs on the CPU with 8 simulated devices, strict dtypes and strict ranks."""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

# Many tests compile the same tiny programs; workers and later sessions share them.
CACHE = Path(tempfile.gettempdir()) / f"gspo_jax-tests-{os.getuid()}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # of the commands that tests start
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
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


@pytest.fixture(autouse=True, scope="module")
def programs_of_other_files_are_let_go():
    """A worker would keep every program that it ever ran: 4 GB by the end."""
    yield
    jax.clear_caches()


# Tracing makes objects by the million that live on: looking through all of them again and again
# takes a tenth of the time.
gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="session")
def tiny() -> Qwen:
    """A random two-layer Qwen2 whose logits spread enough for samples to differ."""
    model = Qwen(QwenConfig.from_hf(TINY), rngs=nnx.Rngs(0))
    model.embed[...] = model.embed[...] * 4
    return model


@pytest.fixture(scope="session")
def tiny_view(tiny):
    """Its pure view: (graphdef, params)."""
    return nnx.split(tiny)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A Hugging Face directory with random tiny weights and the demo's tokenizer."""
    from gspo_jax.config.load import load_config, model_dir
    from gspo_jax.models.hf.weights import save_model

    like = model_dir(load_config())
    # Positions for the README's and the cookbook's longest texts.
    config = QwenConfig.from_hf(TINY | {"vocab_size": 296, "max_position_embeddings": 1024})
    model = Qwen(config, rngs=nnx.Rngs(1))
    model.embed[...] = model.embed[...] * 10
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, path, like=like)
    return path
