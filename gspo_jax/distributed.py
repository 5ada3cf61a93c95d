"""Several processes that run one program on one mesh, through `jax.distributed`.

Every process runs the same lines on the same host data: it draws the same problems, and sees all
completions. So most of the library need not know. What remains is here:

    join      find each other, where more than one process is meant
    place     a host array onto a mesh that other processes share
    host      an array that is split over processes, whole, as numpy
    gathered  rows that each process has worked out for itself, all of them
    agreed    the largest of the processes' numbers: one decision for all
    barrier   wait for the others

With one process all of these are what one would write without them.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from gspo_jax.errors import ConfigError

HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as dead


def meant(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of several.

    Asked of srun's job step, Open MPI, an indexed Kubernetes job, TPU pods, and of
    JAX_COORDINATOR_ADDRESS; an allocation in which a single process was started is not meant.
    """
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(int(env.get(name) or 1) > 1 for name in counts)
        or "JAX_COORDINATOR_ADDRESS" in env
        or ("KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env)
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    )


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Wait for the others; what is not given is JAX's own to find out. Before any computation.

    Args:
        coordinator: "host:port" of process 0.
        processes: how many there are.
        process: the number of this one.

    Raises:
        ConfigError: they do not find each other.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None) and not meant():
        return
    if coordinator is not None and (processes is None or process is None):
        raise ConfigError(
            f"--coordinator {coordinator} needs --processes and --process too: how many there "
            "are, and which of them this is, from 0."
        )
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"the processes did not find each other ({reason}); give --coordinator host:port, "
            "--processes and --process, the first alike in all of them."
        ) from error


def is_writer() -> bool:
    """Whether this process writes what all share: checkpoints' manifests, exports, the log."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """A host array that every process has whole, or an array on the devices, as `sharding` says."""
    shared = isinstance(x, jax.Array) and not x.is_fully_addressable
    if sharding.is_fully_addressable or shared:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def host(tree: PyTree) -> PyTree:
    """The arrays of `tree` as numpy, in every process; all processes must ask for them."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def own_rows(count: int) -> slice:
    """The rows of `count` that are this process's to work on; all processes' make up the whole."""
    n, i = jax.process_count(), jax.process_index()
    return slice(count * i // n, count * (i + 1) // n)


def gathered(value: Any) -> list[Any]:
    """What every process says, in order: anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def agreed(number: int) -> int:
    """The largest of what the processes say."""
    return max(gathered(number))
