"""What a run carries from step to step, and what it is before the first."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from gspo_jax.update.optim import Optimizer
from gspo_jax.update.spikes import Spikes, empty_window


class CriticState(NamedTuple):
    """What is trained beside the policy where the advantage needs a critic."""

    params: PyTree
    opt_state: PyTree


class TrainState(NamedTuple):
    """All that a run carries from step to step; a checkpoint is this and the configuration."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]  # rollouts done
    updates: Int[Array, ""]  # optimizer updates done
    skipped: Int[Array, ""]  # updates skipped because a number was not finite
    critic: CriticState | None = None  # has no leaves where there is none
    spikes: Spikes | None = None  # likewise
    kl_coef: Float[Array, ""] | None = None  # likewise; the weight of a penalty that is steered


def init_state(
    params: PyTree, optimizer: Optimizer, *, spikes: bool = False, kl_coef: float | None = None
) -> TrainState:
    """The state before the first step; with `spikes`, what is needed to skip those, and with
    `kl_coef` the weight from which a steered KL penalty begins."""
    counts = [jnp.int32(0) for _ in range(3)]  # buffers of their own: all are donated
    return TrainState(
        params,
        optimizer.init(params),
        *counts,
        spikes=empty_window() if spikes else None,
        kl_coef=None if kl_coef is None else jnp.float32(kl_coef),
    )
