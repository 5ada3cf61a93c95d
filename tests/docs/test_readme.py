"""The README does what it says: its snippets run, and its map is the tree."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_architecture import ORDER

from gspo_jax.cli.commands import main

ROOT = Path(__file__).parents[2]
HIDDEN = {"__init__", "__main__"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.long
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


def test_the_map_names_every_room_and_every_file_beside_the_rooms():
    """In the order that tests/test_architecture.py holds."""
    section = README.split("gspo_jax/\n")[1].split("configs/ ")[0]
    rooms = re.findall(r"^  (\w+)/ ", section, re.MULTILINE)
    files = re.findall(r"\b(\w+)\.py\b", section)
    parts = [Path(path).parts[1:] for path in tracked("gspo_jax/*.py")]
    assert sorted(rooms) == sorted({path[0] for path in parts if len(path) > 1})
    assert sorted(files) == sorted({path[0][:-3] for path in parts if len(path) == 1} - HIDDEN)
    assert rooms == [name for name in ORDER if name in rooms]


def test_the_headline_equation_is_defined_once():
    """A reader who greps for it lands on it."""
    hits = subprocess.run(
        ["git", "grep", "-n", "^def gspo(", "--", "gspo_jax"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [hit.split(":")[0] for hit in hits] == ["gspo_jax/algo/losses.py"]
