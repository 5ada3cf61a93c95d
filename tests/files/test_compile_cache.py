"""Where compiled programs are kept where the user says nothing."""

import os

import pytest
from faults.tools import ROOT, python

from gspo_jax.files.compile_cache import PLACE, default_place, keep_compiled


def test_what_the_user_says_stays(tmp_path):
    for said in ("", "/elsewhere"):
        env = {"HOME": str(tmp_path), PLACE: said}
        keep_compiled(env)
        assert env == {"HOME": str(tmp_path), PLACE: said}
    env = {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_MAX_SIZE": "7"}
    keep_compiled(env)
    assert env[PLACE].startswith(str(tmp_path / ".cache" / "gspo_jax" / "compiled"))
    assert env["JAX_COMPILATION_CACHE_MAX_SIZE"] == "7"


@pytest.mark.parametrize("home", [None, "relative", "a file"])
def test_without_a_folder_that_can_be_written_nothing_is_kept(tmp_path, home):
    (tmp_path / "a file").touch()
    env = {} if home is None else {"HOME": home if home == "relative" else str(tmp_path / home)}
    before = dict(env)
    keep_compiled(env)
    assert env == before and default_place(env) is None


def test_a_second_start_of_a_command_compiles_nothing_again(tmp_path):
    """What the first left is read, not written anew."""
    code = """
        import os
        from gspo_jax.files.compile_cache import keep_compiled
        keep_compiled(os.environ)
        import jax
        found = []
        jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
        jax.jit(lambda x: x @ x.T)(jax.numpy.ones((9, 9))).block_until_ready()
        print(found.count("/jax/compilation_cache/cache_hits"))
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "XDG"))}
    env |= {"HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env["PYTHONPATH"] = str(ROOT)
    first, second = (int(python(code, env=env).stdout) for _ in range(2))
    assert first == 0 and second > 0
