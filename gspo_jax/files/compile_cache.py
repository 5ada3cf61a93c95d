"""Where XLA's compiled programs are kept from one start to the next.

    ~/.cache/gspo_jax/compiled/PROCESSOR      unless JAX_COMPILATION_CACHE_DIR says where, or is ""
    5 GB, the programs not used for longest leaving first

JAX asks the environment for it when it is imported, so commands say it there before.
"""

import hashlib
import os
import platform
from collections.abc import Mapping, MutableMapping
from itertools import takewhile
from pathlib import Path

from gspo_jax.errors import StorageError
from gspo_jax.files.whole import check_parents

PLACE = "JAX_COMPILATION_CACHE_DIR"
DEFAULTS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(5 * 10**9),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def keep_compiled(env: MutableMapping[str, str]) -> None:
    """Tell JAX to keep what it compiles, unless `env` says something about it already.

    Where the user has no folder that can be written, nothing is kept.
    """
    if PLACE not in env and (place := default_place(env)) is not None:
        env.update({PLACE: str(place)} | {name: env.get(name, x) for name, x in DEFAULTS.items()})


def default_place(env: Mapping[str, str]) -> Path | None:
    """The user's cache for processors like this one; None where it cannot be written.

    Programs for a CPU use all that it has, and homes are shared by machines that differ.
    """
    home = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME", ""), ".cache")
    place = Path(home) / "gspo_jax" / "compiled" / _processor()
    try:
        check_parents(place)
    except StorageError:
        return None
    return place if place.is_absolute() else None


def _processor() -> str:
    """A name for what this machine's processor can do."""
    try:
        with open("/proc/cpuinfo") as file:  # of hundreds of cores the first will do
            lines = list(takewhile(str.strip, file))
    except OSError:
        return platform.machine()
    said = [x for x in lines if x.startswith(("model name", "flags", "Features"))]
    digest = hashlib.sha256("".join(said).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"
