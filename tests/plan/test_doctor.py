"""The doctor tells what is here, finds what is wrong, names a remedy, and shows no secret."""

import io

import pytest
from rich.console import Console

from gspo_jax.plan import doctor
from gspo_jax.plan.doctor import (
    Finding,
    compile_cache,
    devices,
    disk,
    extras,
    hub,
    known_bad,
    unmet,
)

HERE = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


def said(monkeypatch, findings):
    console = Console(file=io.StringIO(), width=120)
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    return doctor.doctor(console), console.file.getvalue()


def test_this_installation_is_told_on_one_screen(tmp_path):
    found = doctor.examine({"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"})
    told = {finding.topic: finding.text for finding in found}
    topics = "python packages devices attention memory disk compile cache hub optional variables"
    assert " ".join(told) == topics
    assert "jaxlib" in told["packages"] and "CPU cores" in told["devices"]
    assert told["attention"] == "our own, through XLA" and "GB" in told["memory"]
    assert told["variables"] == "JAX_PLATFORMS=cpu"
    assert not [f for f in found if f.remedy and f.topic not in ("packages", "disk")]


def test_the_exit_code_says_whether_something_is_wrong(monkeypatch):
    code, out = said(monkeypatch, [Finding("disk", "1 TB free")])
    assert code == 0 and "Nothing is wrong." in out
    code, out = said(monkeypatch, [Finding("disk", "full", "set run.dir"), Finding("hub", "x")])
    assert code == 2 and "→ set run.dir" in out and "1 to mend." in out


@pytest.mark.parametrize(
    ("versions", "told", "remedy"),
    [
        ({"jax": "0.11.2", "jaxlib": "0.11.2"}, "does not work with flax 0.12.8", "flax>=0.12.9"),
        ({"jax-cuda12-plugin": "0.9.2"}, "is not for jaxlib 0.10.2", "jax[cuda12]==0.10.2"),
    ],
)
def test_known_bad_combinations_have_a_remedy(versions, told, remedy):
    (found,) = known_bad(HERE | versions)
    assert told in found.text and remedy in found.remedy
    assert known_bad(HERE) == [] and known_bad(HERE | {"jax-cuda12-plugin": "0.10.2"}) == []


def test_packages_that_do_not_fit_each_other_are_named(monkeypatch):
    needs = {"jax": ["jaxlib<=0.10.2,>=0.10.1", "absent>=1; extra == 'x'", "unknown>=3"]}
    monkeypatch.setattr(doctor, "requires", needs.get)
    monkeypatch.setattr(doctor, "CORE", ("jax", "jaxlib", "flax"))
    assert unmet(HERE) == []
    (found,) = unmet(HERE | {"jaxlib": "0.9.0"})
    assert found.text == "jax 0.10.2 wants jaxlib<=0.10.2,>=0.10.1, not 0.9.0."
    (found,) = unmet({"jax": "0.10.2", "jaxlib": "0.10.2"})
    assert (found.text, found.remedy) == ("flax is missing.", "pip install flax")


def test_a_gpu_that_jax_does_not_see_is_told_unless_that_is_meant(monkeypatch):
    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    (found,) = devices({}, {})
    assert "is not used" in found.text and "cuda12" in found.remedy
    assert "driver" in devices({}, {"jax-cuda12-plugin": "1"})[0].remedy
    assert devices({"JAX_PLATFORMS": "cpu"}, {})[0].remedy == ""


def test_devices_that_cannot_be_had_are_a_finding(monkeypatch):
    import jax

    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(jax, "devices", fail)
    (found,) = devices({}, {})
    assert "Unable to initialize backend 'cuda')" in found.text and found.remedy


@pytest.mark.parametrize("by_file", [False, True])
def test_a_token_is_present_or_not_and_never_shown(tmp_path, monkeypatch, by_file):
    env = {"HF_HOME": str(tmp_path)}
    assert "token none" in hub(env)[0].text
    token = "hf_" + "Ab3" * 11
    if by_file:
        (tmp_path / "token").write_text(token)
    else:
        env["HF_TOKEN"] = token
    (found,) = hub(env)
    assert "token present" in found.text and token not in found.text
    _, out = said(monkeypatch, [Finding("variables", f"XLA_FLAGS={token}")])
    assert token not in out


def test_settings_of_the_hub_are_told(tmp_path):
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "https://mirror.example"}
    (found,) = hub(env)
    assert "offline" in found.text and "https://mirror.example" in found.text


def test_places_that_cannot_be_written_have_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "HF_HOME" in hub({"HF_HOME": str(tmp_path)})[1].remedy
    assert "JAX_COMPILATION_CACHE_DIR" in compile_cache({"JAX_COMPILATION_CACHE_DIR": "/x"}).remedy


def test_a_compile_cache_is_told(tmp_path):
    assert "none" in compile_cache({}).text
    assert "none" in compile_cache({"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}).text
    for env, place in (
        ({"HOME": str(tmp_path)}, tmp_path / ".cache" / "gspo_jax" / "compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "new")}, tmp_path / "new"),
    ):
        found = compile_cache(env)
        assert found.text.startswith(str(place)) and "0.0 GB" in found.text and not found.remedy
    assert compile_cache({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"}).remedy == ""


def test_little_disk_is_told(tmp_path, monkeypatch):
    assert disk(tmp_path).topic == "disk"
    monkeypatch.setattr(doctor, "LITTLE_DISK", float("inf"))
    assert "run.dir" in disk(tmp_path).remedy


def test_extras_are_told_with_what_they_are_for():
    assert extras({"torch": "2.13"}).text.endswith("torch 2.13")
    assert "no wandb (run.report_to=[wandb])" in extras({}).text
