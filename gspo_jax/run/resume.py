"""Continuing a run: from which checkpoint, whether that is the same run, and what a step in the
middle of its updates is made of.

Exact continuation needs the state, the configuration, the data and two integers (seed, step). What
has changed since is told, and refused where the run would no longer be the one it was.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from jaxtyping import Int

from gspo_jax.batch import Completions, TrainBatch
from gspo_jax.config.load import Config
from gspo_jax.config.names import ON_RESUME, owner
from gspo_jax.config.recorded import changes, to_yaml
from gspo_jax.errors import ConfigError, DataError, StorageError
from gspo_jax.files import integrity
from gspo_jax.files.jsonl import plain
from gspo_jax.mesh.distributed import host, place
from gspo_jax.numbers.tally import packed, unpacked
from gspo_jax.policy import Problems
from gspo_jax.run import checkpoint
from gspo_jax.run.arrays import named
from gspo_jax.tasks.task import fingerprint
from gspo_jax.text.spelling import meant
from gspo_jax.update.objective import Targets
from gspo_jax.update.programs import LogProbs
from gspo_jax.update.spikes import empty_window
from gspo_jax.update.state import TrainState
from gspo_jax.update.steps import Progress

RESUME = ("auto", "never")  # instead of a checkpoint

Say = Callable[[str], None]


class Begun(NamedTuple):
    """A step up to its updates: what they learn from, and what its line of metrics needs.

    Attributes:
        progress: the rows to learn from, and the updates that are done.
        completions: as sampled, without routing.
        metrics: what was known before the updates.
        samples: responses for people to read.
        lengths: tokens of each response's prompt and of the response, of all that was sampled.
    """

    progress: Progress
    completions: Completions
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    lengths: tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]

    @property
    def tokens(self) -> int:
        """Prompt tokens, once per response, and response tokens."""
        return int(sum(x.sum() for x in self.lengths))


def pack(begun: Begun) -> checkpoint.Pending:
    """A step in the middle of its updates, as a checkpoint keeps it."""
    p = begun.progress
    stats = host(p.stats)
    record = {
        "stats": [packed(update) for update in stats],
        "metrics": plain(begun.metrics),
        "samples": plain(begun.samples),
    }
    tree = p._replace(stats=())._asdict()
    tree |= {"completions": begun.completions, "lengths": begun.lengths}
    return checkpoint.Pending(len(stats), host(named(tree)), record)


def unpack(kept: checkpoint.Pending) -> Begun:
    """What `pack` was given, its arrays on the host."""
    found, record = kept.arrays, kept.record

    def read(kind: Any, prefix: str) -> Any:
        fields = {name: found.get(f"{prefix}.{name}") for name in kind._fields}
        return None if all(x is None for x in fields.values()) else kind(**fields)

    batch, completions = read(TrainBatch, "batch"), read(Completions, "completions")
    asked = [int(name.split(".")[1]) for name in found if name.startswith("old.")]
    minibatches = max(asked, default=-1) + 1
    progress = Progress(
        batch=batch,
        ref_logp=found.get("ref_logp"),
        targets=read(Targets, "targets"),
        old=tuple(read(LogProbs, f"old.{i}") for i in range(minibatches)),
        stats=tuple(unpacked(update) for update in record["stats"]),
    )
    lengths = found["lengths.0"], found["lengths.1"]
    return Begun(progress, completions, record["metrics"], record["samples"], lengths)


# ---------------------------------------------------------------------------- which checkpoint


class Found(NamedTuple):
    """The checkpoint to continue from, verified."""

    path: Path
    own: bool  # of this very run, not of another one that this one starts from
    stale: tuple[str, ...] = ()  # checkpoints of the run that come after it


def find(resume: str, root: Path, say: Say) -> Found | None:
    """The checkpoint that `run.resume` means, or None where the run starts from the beginning.

    Args:
        resume: "auto", "never", or the path of a checkpoint.
        root: checkpoints/ of the run.

    Raises:
        StorageError: there is no such checkpoint, or none that is whole.
    """
    names = checkpoint.names(root)
    if resume == "never":
        if names:
            raise StorageError(
                f"{root.parent} holds the checkpoints {', '.join(names)} and run.resume=never; "
                "choose another run.name, or run.resume=auto to continue them."
            )
        return None
    if resume != "auto":
        check_named(resume, root)
        path = Path(resume)
        own = path.resolve().parent == root.resolve()
        if own or not names:
            integrity.verify(path)
            return Found(path, own, _after(names, path.name) if own else ())
        say(f"The run has checkpoints of its own and continues from them, not from {path}.")
    if not names:
        say(f"No checkpoint in {root}: starting from the beginning.")
        return None
    name = newest_whole(root, names, say)
    return Found(root / name, True, _after(names, name))


def check_named(resume: str, root: Path) -> None:
    """Raise a StorageError unless `run.resume` says how, or is a checkpoint by its place."""
    path = Path(resume)
    if resume in RESUME or (checkpoint.NAME.fullmatch(path.name) and path.is_dir()):
        return
    raise StorageError(
        f"run.resume={resume}: not a checkpoint.{meant(resume, RESUME)} Give auto, never, or a "
        f"directory such as {root / '100'}."
    )


def newest_whole(root: Path, names: Iterable[str], say: Say) -> str:
    """The last of these checkpoints that is what was written; those that are not are named.

    Raises:
        StorageError: there is none.
    """
    reasons = []
    for name in reversed(list(names)):
        try:
            integrity.verify(root / name)
        except StorageError as error:
            reasons.append(str(error))
        else:
            for reason in reasons:
                say(f"warning: {reason} Checkpoint {name} is taken instead.")
            return name
    if not reasons:
        raise StorageError(f"{root}: no checkpoint; wait for the first, or see run.save_every.")
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    raise StorageError(
        f"{root}: no checkpoint is whole: {reasons[0]}{more} Put back a copy, or start again with "
        "another run.name."
    )


def _after(names: Iterable[str], name: str) -> tuple[str, ...]:
    return tuple(n for n in names if checkpoint.place(n) > checkpoint.place(name))


# ----------------------------------------------------------------------------- the same run?


def identity(config: Config, problems: Problems) -> dict[str, Any]:
    """What a checkpoint says of its run: the settings, and the fingerprint of its problems."""
    visited = [problems.task.fingerprint, problems.indices["train"]]
    return {"config": to_yaml(config, absolute=True), "data": fingerprint(visited)}


def restored_state(found: Found, meta: dict[str, Any], state: TrainState) -> TrainState:
    """The checkpoint's state like `state`; run.spike_sigmas and algo.kl.target may be switched on
    and off in between.

    Switched on, the window and the steered weight begin here.
    """
    then, everywhere = yaml.safe_load(meta["config"]), state.step.sharding
    had = {
        "spikes": empty_window() if (then["run"].get("spike_sigmas") or 0) > 0 else None,
        "kl_coef": np.float32(0) if (then["algo"]["kl"].get("target") or 0) > 0 else None,
    }
    had = jax.tree.map(partial(place, sharding=everywhere), had)
    root, name = found.path.parent, found.path.name
    restored, _ = checkpoint.restore(root, name, state._replace(**had), verified=True)
    anew = {k: getattr(state, k) for k in had if had[k] is None or getattr(state, k) is None}
    return restored._replace(**anew)


def tell_changes(
    meta: dict[str, Any], config: Config, problems: Problems, found: Found, say: Say
) -> None:
    """Tell what has changed since the checkpoint was written.

    Raises:
        ConfigError: a setting differs whose rule is "same", and the checkpoint is the run's own or
            lies in the middle of a step; or one whose rule is "data", but the path, with which the
            problems are others.
        DataError: the problems are others although the settings are the same.
    """
    now = identity(config, problems)
    differs = changes(meta["config"], config)
    rule = {name: ON_RESUME.get(owner(name) or "", "learning") for name in differs}
    if found.own or checkpoint.place(found.path.name)[1] >= 0:
        fork = f"start another run from there with run.name=NEW run.resume={found.path}"
        _refuse({n: pair for n, pair in differs.items() if rule[n] == "same"}, found.path, fork)
    if meta["data"] != now["data"]:
        another = "start another run with run.name=NEW"
        if not config.run.allow_data_change:
            choice = {n: pair for n, pair in differs.items() if rule[n] == "data"}
            choice.pop("task.path", None)  # a file is known by its rows, wherever it lies
            _refuse(choice, found.path, f"{another}, or set run.allow_data_change=true")
            raise DataError(
                f"{config.task.path or config.task.name}: not the data that {found.path} was "
                "trained on (rows were edited, moved, added or removed); put it back, "
                f"{another}, or set run.allow_data_change=true to go on with it."
            )
        say("warning: the data is not what it was; going on, as run.allow_data_change=true says.")
    # What depends on the length of a run: a schedule that ends with it, the stages of a curriculum,
    # which are shares of it.
    planned = config.optim.schedule != "constant" or bool(config.task.curriculum)
    told = {name: pair for name, pair in differs.items() if rule[name] != "silent"}
    if told:
        say(f"Settings that differ from those of {found.path}:")
    for name, (then, value) in told.items():
        moves = rule[name] in ("same", "learning") or (name == "run.steps" and planned)
        consequence = "  (changes what is learned from here)" if moves else ""
        say(f"  {name}: {then} -> {value}{consequence}")


def _refuse(changed: dict[str, tuple[Any, Any]], path: Path, otherwise: str) -> None:
    if changed:
        listed = ", ".join(f"{name} ({then} -> {now})" for name, (then, now) in changed.items())
        raise ConfigError(
            f"{listed}: not as in {path}, which this run would continue; put it back, or "
            f"{otherwise}."
        )
