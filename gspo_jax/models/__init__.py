"""Qwen-family language models: their shape, their network, their directories.

In reading order:

    config     the shape of a model, read from and written to `config.json`
    fields     single values of that file, refused in one line that names the key
    rope       frequencies of the rotary position embedding, and what stretches them
    qwen       the decoder: from tokens to hidden states
    attention  our own, which runs anywhere, and cuDNN's
    moe        a mixture of experts in place of a layer's MLP; routing replay
    linear     products with weights that devices share
    cache      keys and values of a layer, written in place
    remat      what a backward pass recomputes instead of keeping
    init       parameters before training
    hf/        Hugging Face directories in and out
"""

from gspo_jax.models.config import QwenConfig
from gspo_jax.models.hf.weights import load_model, save_model
from gspo_jax.models.qwen import Qwen

__all__ = ["Qwen", "QwenConfig", "load_model", "save_model"]
