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
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import PyTree

from gspo_jax.errors import NO_DEVICES, ConfigError
from gspo_jax.text.console import overdue

HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as dead
WAIT = 300.0  # seconds for all processes to be here
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")

Say = Callable[[str], None]


def meant(
    env: Mapping[str, str] = os.environ,
    *,
    typed: bool = False,
    hosts: Path = Path("/etc/hosts"),
) -> str:
    """The variable by which a launcher says that this process is one of several; "" if alone.

    Asked of srun's job step, Open MPI, an indexed Kubernetes job, TPU pods, and of
    JAX_COORDINATOR_ADDRESS. Alone is what was started in an allocation without srun; what was
    `typed` into the shell of `srun --pty`, whose step has tasks of which only the shell is left;
    and a pod of an indexed job that other pods cannot find, because it has no subdomain: a trial.
    """
    in_shell = typed and any(name.startswith("SLURM_PTY_") for name in env)
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    for name in counts[in_shell:]:
        if int(env.get(name) or 1) > 1:
            return name
    if "JAX_COORDINATOR_ADDRESS" in env:
        return "JAX_COORDINATOR_ADDRESS"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env and _is_named(hosts):
        return "JOB_COMPLETION_INDEX"
    return "TPU_WORKER_HOSTNAMES" if "," in env.get("TPU_WORKER_HOSTNAMES", "") else ""


def _is_named(hosts: Path) -> bool:
    """Whether the pod has a name in the cluster: Kubernetes then writes it into /etc/hosts."""
    with suppress(OSError):
        lines = hosts.read_text().splitlines()
        return any(".svc." in line.partition("#")[0] for line in lines)
    return False


def check_backend() -> None:
    """See that JAX has devices, and computes as the library does.

    Raises:
        ConfigError: it has none, or 64-bit types are switched on.
    """
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            "JAX_ENABLE_X64 is on, and a run computes in float32 and bfloat16; unset it (in "
            "Python: jax.config.update('jax_enable_x64', False))."
        )
    try:
        jax.devices()
    except Exception as error:  # with JAX_PLATFORMS=cuda and no GPU an assertion without a text
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        where = os.environ.get("JAX_PLATFORMS")
        where = f" for JAX_PLATFORMS={where}" if where else ""
        raise ConfigError(f"JAX finds no device{where} ({reason}); {NO_DEVICES}.") from error


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    say: Say = print,
) -> None:
    """Wait for the others; what is not given is JAX's own to find out. Before any computation.

    Args:
        coordinator: "host:port" of process 0.
        processes: how many there are.
        process: the number of this one.
        say: takes a line for the user: what is waited for. After WAIT seconds another one, and the
            process ends with exit code 2; JAX would abort it.

    Raises:
        ConfigError: they do not find each other; or from `check_backend`.
    """
    given = (coordinator, processes, process)
    by = "--coordinator" if given != (None, None, None) else meant(typed=os.isatty(0))
    if not by:
        check_backend()
        return
    if coordinator is not None and (processes is None or process is None):
        raise ConfigError(
            f"--coordinator {coordinator} needs --processes and --process too: how many there "
            "are, and which of them this is, from 0."
        )
    first = next((rank for rank in (process, *map(os.environ.get, RANKS)) if rank is not None), 0)
    told = waited_for(by, coordinator, processes)
    if int(first) == 0:
        say(f"waiting for {told}.")

    def end() -> None:
        say(f"after {WAIT:g} seconds not all are here: {told}.")
        os._exit(ConfigError.exit_code)

    try:
        with overdue(WAIT, end):
            jax.distributed.initialize(
                *given,
                heartbeat_timeout_seconds=HEARTBEAT,
                initialization_timeout=int(WAIT) + 60,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"the processes did not find each other ({reason}); give --coordinator host:port, "
            "--processes and --process, the first alike in all of them."
        ) from error
    check_backend()


def waited_for(
    by: str,
    coordinator: str | None,
    processes: int | None,
    env: Mapping[str, str] = os.environ,
) -> str:
    """Who is meant to come, where, why that is believed, and what to do if nobody is."""
    count = processes if processes is not None else env.get(by, "")
    count = f"{count} processes" if str(count).isdecimal() and "INDEX" not in by else "processes"
    place = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    alone = "leave --coordinator out" if by.startswith("-") else f"start it with env -u {by}"
    return f"{count}{f' at {place}' if place else ''}, because of {by}; alone? Then {alone}"


def is_writer() -> bool:
    """Whether this process writes what all share: checkpoints' manifests, exports, the log."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def place(x: Any, sharding: Sharding) -> jax.Array:
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
