"""What a response pays that ran into the length limit, or came near it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from gspo_jax.algo.advantages import soft_overlong
from gspo_jax.batch import Completions


def trained_mask(completions: Completions, mask_truncated: bool) -> Bool[np.ndarray, "B T"]:
    """The tokens to train on: with `mask_truncated`, none of a response that hit the limit."""
    left = ~completions.truncated if mask_truncated else np.ones_like(completions.truncated)
    return completions.mask & left[:, None]


def overlong_punishment(completions: Completions, buffer: int) -> Float[np.ndarray, " B"]:
    """0 to -1 for responses that end within `buffer` tokens of the limit T (`soft_overlong`)."""
    length, limit = completions.mask.sum(1, dtype=np.int32), completions.mask.shape[1]
    return np.asarray(soft_overlong(jnp.asarray(length), max_length=limit, buffer=buffer))
