"""The README does what it says: its snippets run, and its map is the tree."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from gspo_jax.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_run_as_written(code, tmp_path, monkeypatch, tiny_dir):
    """Only the hub's model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("Qwen/Qwen3-0.6B", str(tiny_dir)), "README.md", "exec"), {})


@pytest.mark.parametrize("line", [x for s in snippets("bash") for x in s.strip().splitlines()])
def test_commands_are_accepted_as_written(line, tmp_path, monkeypatch, capsys, tiny_dir):
    """Dry, in a directory that has the README's own files; the hub's model is a tiny one, and the
    demo has fewer problems."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "problems.jsonl").write_text(snippets("json")[0])
    judge = next(code for code in snippets("python") if "judge.py" in code)
    (tmp_path / "judge.py").write_text(judge)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line.replace("Qwen/Qwen3-0.6B", str(tiny_dir)))
    assert program == "gspo-jax"
    fewer = ["task.options.sizes={train: 40}"] if "configs/demo.yaml" in arguments else []
    assert main([*arguments, *fewer, *([] if "--dry-run" in arguments else ["--dry-run"])]) == 0
    assert "responses" in capsys.readouterr().out


def tracked(*patterns):
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_map_names_every_module_once_and_nothing_else():
    section = README.split("## The map")[1].split("\n## ")[0]
    named = re.findall(r"^\s*(\S+\.py)\s{2,}\S", section, re.MULTILINE)
    modules = {path.removeprefix("gspo_jax/") for path in tracked("gspo_jax/*.py")}
    modules = {path for path in modules if not path.endswith("__init__.py")}
    assert sorted(named) == sorted(modules)


def test_the_headline_equation_is_defined_once():
    """A reader who greps for it lands on it."""
    hits = subprocess.run(
        ["git", "grep", "-n", "^def gspo(", "--", "gspo_jax"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [hit.split(":")[0] for hit in hits] == ["gspo_jax/losses.py"]
