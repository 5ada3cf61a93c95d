"""The hub of models and data sets, on machines that cannot reach it.

Its client tries again for half a minute, with a line for each time, before it says that there is no
network. Whether there is one is a question of a second, asked once in a process.
"""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

SECONDS = 3.0  # for a connection to come about
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@contextmanager
def cached_where_unreachable() -> Iterator[None]:
    """While this lasts, the hub's client looks into its cache alone if the hub is out of reach."""
    if _reachable():
        yield
        return
    from huggingface_hub import constants

    switches = [constants, getattr(sys.modules.get("datasets"), "config", constants)]
    earlier = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, value in zip(switches, earlier, strict=True):
            switch.HF_HUB_OFFLINE = value


def reachable(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the hub's address takes a connection; a proxy is believed to lead there."""
    if any(env.get(name) for name in PROXIES):
        return True
    address = urlsplit(env.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return False
    return True


@cache
def _reachable() -> bool:
    return reachable()
