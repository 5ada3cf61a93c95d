"""Prompts -> groups of completions -> scores -> training rows.

In reading order:

    schedule  which shapes a rollout can have: widths, batches and lengths of the cache
    sampling  how one token is drawn, and with which key
    engine    the sampler: few jitted programs that never leave the device
    stages    the stages of a rollout around it, and its metrics
"""

from gspo_jax.rollout.engine import generate

__all__ = ["generate"]
