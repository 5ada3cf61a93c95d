"""One rollout becomes minibatches x epochs updates.

The first minibatch needs no pass beforehand: there π_θ = π_old, so its old log-probabilities are
its own (stop_gradient), its ratio is exactly 1 and nothing can be clipped. The others' come
from the training program's own forward on the same shapes, never from the sampler: GSPO's clip
band is as narrow as the noise between two programs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree

from gspo_jax.batch import TrainBatch
from gspo_jax.mesh.distributed import host
from gspo_jax.numbers.tally import Tally, merged, numbers
from gspo_jax.update.objective import Metrics, Targets
from gspo_jax.update.programs import LogProbs, Programs
from gspo_jax.update.state import TrainState


class Progress(NamedTuple):
    """A rollout and how far its updates have come.

    Attributes:
        batch: the rollout's rows on the host; contiguous blocks of them are the minibatches.
        ref_logp: reference log-probabilities, where the objective has a KL term.
        targets: values and returns on the host, where the objective has a critic.
        old: what the policy at the start says of each minibatch, None for the first until its
            update is done; empty before any was asked for.
        stats: the metrics of each update that is done.
    """

    batch: TrainBatch
    ref_logp: Float[Any, "B T"] | None = None
    targets: Targets | None = None
    old: tuple[LogProbs | None, ...] = ()
    stats: tuple[dict[str, Tally], ...] = ()


def continue_updates(
    programs: Programs,
    state: TrainState,
    progress: Progress,
    *,
    minibatches: int,
    epochs: int = 1,
    phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
    hold: Callable[[TrainState], None] = lambda state: None,
) -> tuple[TrainState, Progress]:
    """The updates of a rollout that are left, or some of them: `stop` is asked before each.

    Continuing later, from what is returned, gives bit for bit what would have come without a stop.
    `state.step` counts the rollout once all its updates are done.

    Args:
        programs: from `make_programs`; `state` is donated.
        minibatches: updates per epoch; must divide the rows.
        epochs: passes over the rollout.
        phase: entered for "old_logp", "update" (the gradient) and "optimizer", to time them.
        hold: given the state after each update at once, so that whatever interrupts the next one
            leaves its caller with what is whole.
    """
    parts, total = _blocks(progress.batch, minibatches), minibatches * epochs
    refs, goals = (
        [None] * minibatches if tree is None else _blocks(tree, minibatches)
        for tree in (progress.ref_logp, progress.targets)
    )
    if stop():
        return state, progress
    old, stats = list(progress.old), list(progress.stats)
    if not old:
        # The first update is on-policy by construction, and tells its own π_old; the others' is
        # needed before the policy moves.
        with phase("old_logp"):
            old = [None, *(programs.logps(state.params, part) for part in parts[1:])]
            jax.block_until_ready(old)
    for done in range(len(stats), total):
        if stop():
            break
        i = done % minibatches
        own, part = old[i], parts[i]  # what π_old said of this minibatch, if it was asked
        if own is not None and part.routing is None:
            # R2's; without replay they only tell how many experts have changed.
            part = part._replace(routing=own.experts)
        old_logp = None if own is None else own.logp
        state, metrics, said = programs.update(
            state, part, old_logp, refs[i], goals[i], phase=phase, hold=hold
        )
        stats.append(metrics)
        old[i] = said if own is None else own
    state = state._replace(step=state.step + int(len(stats) == total))
    return state, progress._replace(old=tuple(old), stats=tuple(stats))


def old_logps(done: Progress) -> Float[np.ndarray, "B T"]:
    """log π_old of all rows of a rollout, once every minibatch has had its update."""
    return np.concatenate([host(x.logp) for x in done.old if x is not None])


def _blocks(tree: PyTree, count: int) -> list[PyTree]:
    """`count` contiguous blocks of the leading axis."""
    size = jax.tree.leaves(tree)[0].shape[0] // count
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], tree) for i in range(count)]


BY_UPDATE = ("clip_frac", "loss", "router/changed", "ratio_std")
BY_UPDATE += ("ratio_q05", "ratio_q50", "ratio_q95")


def summarise(per_update: Sequence[Mapping[str, Tally]]) -> Metrics:
    """A step's metrics from those of its updates: `tally.merged`, and lists of what differs."""
    per_update = jax.device_get(per_update)
    updates = [numbers(update) for update in per_update]
    by_update = {name: [u[name] for u in updates if name in u] for name in BY_UPDATE}
    listed = {f"{name}_by_update": values for name, values in by_update.items() if values}
    return numbers(merged(per_update)) | listed
