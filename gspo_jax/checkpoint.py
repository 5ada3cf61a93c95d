"""Checkpoints: the whole training state under `checkpoints/<step>`, whole or not at all.

A checkpoint holds every leaf of the state by name, in its own dtype (8-bit codes included), and
a small `meta` record. Orbax writes into a temporary directory and renames it, so a directory
whose name is a number is complete. Randomness and data order are functions of (seed, step): there
is nothing else to save.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from gspo_jax.errors import StorageError


def save(directory: Path, step: int, state: PyTree, meta: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the state of `step`, then drop all but the newest `keep` checkpoints.

    Raises:
        StorageError: the disk is full or the directory cannot be written; older ones are intact.
    """
    path = directory.resolve() / str(step)
    if path.exists():
        return path
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(_named_leaves(state)), meta=ocp.args.JsonSave(meta)
    )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=args)
    except (OSError, ValueError) as error:  # orbax reports a full disk as a ValueError
        reason = str(error).strip().splitlines()[0][:200]
        raise StorageError(
            f"{path}: the checkpoint could not be written ({reason}); free some space, or set "
            "run.dir to another disk. Older checkpoints are intact."
        ) from error
    for old in steps(directory)[:-keep]:
        _remove(directory / str(old))
    return path


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def restore(directory: Path, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The state of `step` in the structure, dtypes and shardings of `like`, and its meta record.

    Args:
        like: arrays, or `jax.ShapeDtypeStruct`s with shardings, as the run would start with.

    Raises:
        StorageError: no such checkpoint, or it belongs to another model or optimizer.
    """
    path = directory.resolve() / str(step)
    if not path.is_dir():
        raise StorageError(f"{path}: no such checkpoint; found steps {steps(directory)}.")
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in _named_leaves(like).items()
    }
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(path, args=args)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise StorageError(
            f"{path}: does not fit this model and optimizer ({reason}); resume with the run's own "
            "config.yaml, or set run.resume=never and another run.name."
        ) from error
    leaves = [found.state[name] for name in abstract]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), found.meta


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"params.layers.0.q": array, ...}: names that survive a change of container types."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    keys = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return ".".join(keys)


def _remove(path: Path) -> None:
    """Rename first: a deletion that dies half-way must not leave a number behind."""
    trash = path.with_name(f".{path.name}.removed")
    path.rename(trash)
    shutil.rmtree(trash)
