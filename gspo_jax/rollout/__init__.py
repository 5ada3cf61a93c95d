"""Prompts -> groups of completions -> scores -> training rows.

In reading order:

    schedule          which shapes a rollout can have: widths, batches and lengths of the cache
    sampling          how one token is drawn, and with which key
    engine            the sampler: few jitted programs that never leave the device
    stages            the stages around it: prompts, completions, texts, scores
    truncation        what a response pays that ran into the length limit
    train_rows        prompts and responses laid together in rows, which the update is given
    dynamic_sampling  more rounds, until enough groups have spread in their rewards
    reporting         metrics, samples for people, and a digest of what was sampled
"""

from gspo_jax.rollout.engine import generate

__all__ = ["generate"]
