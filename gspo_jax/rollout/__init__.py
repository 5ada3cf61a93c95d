"""Prompts -> groups of completions -> scores -> training rows.

In reading order:

    engine  the sampler: few jitted programs that never leave the device
    stages  the stages of a rollout around it, and its metrics
"""

from gspo_jax.rollout.engine import generate

__all__ = ["generate"]
