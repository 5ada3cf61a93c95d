"""A hub that cannot be reached is not asked again and again."""

import socket

import pytest
from huggingface_hub import constants

from gspo_jax.files import hub


def test_what_takes_a_connection_is_reachable_and_what_refuses_one_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub.reachable({"HF_ENDPOINT": f"http://127.0.0.1:{port}"})
    closed = {"HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    assert not hub.reachable(closed)
    assert hub.reachable(closed | {"HTTPS_PROXY": "http://proxy:3128"})  # which may lead there


@pytest.mark.parametrize("is_there", [True, False])
def test_out_of_reach_the_client_looks_into_its_cache_alone(monkeypatch, is_there):
    import datasets

    monkeypatch.setattr(hub, "_reachable", lambda: is_there)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), hub.cached_where_unreachable():
        assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is not is_there
        raise KeyError
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False
