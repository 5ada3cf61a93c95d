"""How much memory a device can give."""

import os
import resource
from contextlib import suppress
from pathlib import Path

import jax


def capacity() -> int:
    """Bytes that one device can give: the accelerator's limit, or a share of the machine's RAM.

    Of that only what this process may have, where its container or `ulimit -v` says so.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits += [space] if space != resource.RLIM_INFINITY else []
    limits += cgroup_limits()
    return min(limits) // jax.local_device_count()


def cgroup_limits(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that this process's control groups allow, its own and every one above it.

    Containers, Slurm and systemd limit a group or one of its parents. Version 2 has one tree
    ("0::/path", memory.max), version 1 one of memory ("9:memory:/path", memory.limit_in_bytes; of
    no limit it says a number larger than any machine has). In a container the path may be the
    host's, and what is mounted is the container's own group: then that is all there is to see.
    """
    lines = membership.read_text().splitlines() if membership.is_file() else ["0::/"]
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        is_v1 = "memory" in controllers.split(",")
        if controllers and not is_v1:
            continue
        tree = root / "memory" if is_v1 else root
        name = "memory.limit_in_bytes" if is_v1 else "memory.max"
        place = tree / path.lstrip("/")
        groups = [group for group in (place, *place.parents) if group.is_relative_to(tree)]
        for group in groups:
            with suppress(OSError, ValueError):  # no such file; "max"
                limits.append(int((group / name).read_text()))
    return limits
