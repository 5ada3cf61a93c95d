"""The arrays of a tree by name, in a directory `state` that Orbax writes and reads.

Nothing else in the package calls Orbax.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from gspo_jax.errors import StorageError

PATTERN = re.compile(r"[*?\[\]\\]")  # what Orbax, which globs, would not read as itself in a path


def named(tree: PyTree) -> dict[str, Any]:
    """{"params.layers.0.q": array, ...}: names that survive a change of container types."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    keys = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return ".".join(keys)


def on_host(leaves: dict[str, Any]) -> dict[str, Any]:
    """Copies that no update can reach; with several processes each writes its own, at once."""
    if jax.process_count() > 1:
        return leaves
    found = jax.device_get(leaves)
    # On a CPU these may be views of the very buffers that the next update donates.
    return {name: x if x.flags.owndata else np.array(x) for name, x in found.items()}


def write(path: Path, leaves: dict[str, Any]) -> None:
    """`path`/state with these arrays. Every process of a run takes part, each with its shards."""
    with _orbax(path) as (checkpointer, there):
        checkpointer.save(there, args=ocp.args.Composite(state=ocp.args.StandardSave(leaves)))


def read(path: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays in `path`/state, with the dtypes and shardings of `like`.

    Raises:
        ValueError, KeyError, FileNotFoundError: others are there.
    """
    with _orbax(path) as (checkpointer, there):
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return checkpointer.restore(there, args=args).state


def check(path: Path, leaves: dict[str, Any]) -> None:
    """Raise a StorageError unless Orbax finds every leaf in `path`, of its shape and dtype."""
    try:
        handler: Any = ocp.StandardCheckpointHandler()  # whose types know no pathlib
        with closing(handler), _plain_path(path) as there:
            found = handler.metadata(there / "state")
        there_is = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in found.items()}
    except Exception as error:  # of whatever kind: it cannot be read
        raise StorageError(f"{path}: what was written cannot be read ({error!r:.200}).") from error
    wanted = {name: (tuple(np.shape(x)), np.dtype(x.dtype)) for name, x in leaves.items()}
    if missing := [name for name in wanted if there_is.get(name) != wanted[name]]:
        raise StorageError(
            f"{path}: of what was written {missing[0]} and {len(missing) - 1} more of "
            f"{len(wanted)} arrays cannot be read."
        )


@contextmanager
def _orbax(path: Path) -> Iterator[tuple[ocp.Checkpointer, Path]]:
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer, _plain_path(path) as there:
        yield checkpointer, there


@contextmanager
def _plain_path(path: Path) -> Iterator[Path]:
    """`path`, through a link where its parents have characters that Orbax takes for a pattern."""
    if not PATTERN.search(str(path.parent)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="gspo_jax-") as folder:
        link = Path(folder) / "checkpoints"
        link.symlink_to(path.parent, target_is_directory=True)
        yield link / path.name
