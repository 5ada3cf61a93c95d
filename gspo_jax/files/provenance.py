"""What a run's numbers depend on besides its settings: versions, machine, command."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gspo_jax.text.inert import redact

PACKAGES = ("gspo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
VARIABLES = (  # that change what a run computes; no others are recorded
    "CUDA_VISIBLE_DEVICES",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)


def environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """What a run's numbers may depend on besides its configuration: versions, machine, command."""
    return {
        "command": [redact(text) for text in sys.argv],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "devices": list(devices),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the package is imported from; "+changes" where files differ from it."""
    try:
        if _git("ls-files", Path(__file__).name) != Path(__file__).name:
            return None  # installed into something that happens to be a repository
        return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--short", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
