"""Rows 1 to 9: whenever a run dies, whatever happens to its files, a whole checkpoint is found."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from faults import saves
from faults.tools import environment, metrics, one_line, tiny_run
from gspo_jax.cli.commands import main
from gspo_jax.errors import StorageError
from gspo_jax.files import integrity
from gspo_jax.run import checkpoint, resume

CHILD = Path(saves.__file__)


def start_child(directory, how, keep, before=()):
    command = [*before, sys.executable, CHILD, directory, how, keep]
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after(child, word, seconds):
    """SIGKILL that long after the child's first line with this word; all that it has printed."""
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith(word):
            break
    time.sleep(seconds)
    child.kill()
    lines += child.stdout.readlines()
    assert child.wait() == -9, "".join(lines)  # killed, not fallen over before
    return [line.split() for line in lines]


def newest_is_whole(directory):
    """The step of the newest checkpoint, after every leaf of it was found to be that step's."""
    step = checkpoint.steps(directory)[-1]
    state, meta = checkpoint.restore(directory, step, saves.state_at(0))
    assert saves.is_state_at(state, step) and meta == {"step": step}
    return step


def kill_while_saving(directory, how, times, seed):
    """Kill a child that saves, again and again; what a restart has to clean away, each time."""
    rng, left = random.Random(seed), []
    for _ in range(times):
        lines = kill_after(start_child(directory, how, 2), "safe", rng.uniform(0, 0.3))
        safe = [int(step) for word, step in lines if word == "safe"]
        assert newest_is_whole(directory) >= safe[-1]
        assert len(checkpoint.steps(directory)) <= 3  # two, and one that was about to go
        left.append([p.name for p in directory.iterdir() if not p.name.isdigit()])
    return left


@pytest.mark.faults
@pytest.mark.parametrize("how", ["sync", "async"])
def test_row_01_a_kill_while_saving_leaves_the_newest_finished_step_whole(tmp_path, how):
    kill_while_saving(tmp_path, how, times=2, seed=0)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["sync", "async"])
def test_row_01_and_03_25_kills_at_random_times_leave_nothing_torn_and_nothing_behind(
    tmp_path, how
):
    left = kill_while_saving(tmp_path, how, times=25, seed=1)
    hit = sum(bool(names) for names in left)
    print(f"{how}: 25 kills, {hit} of them within a save or a removal, 25 newest steps whole")
    assert hit >= 5  # else the kills were not where they were meant to be
    assert max(map(len, left)) <= 3  # each restart clears what was there before


def kill_while_removing(directory, times, seed):
    rng, torn = random.Random(seed), 0
    for _ in range(times):
        child = start_child(directory, "slow-removal", 1)
        lines = kill_after(child, "removing", rng.uniform(0, 0.12))
        begun = [int(line[1]) for line in lines if line[0] == "begins"]
        assert newest_is_whole(directory) >= begun[-1] - 1
        for name in checkpoint.names(directory):  # what is listed is whole, the old step too
            integrity.verify(directory / name)
        torn += any(p.name.endswith(".removed") for p in directory.iterdir())
    return torn


def first_two(directory):
    for step in (1, 2):
        checkpoint.save(directory, step, saves.state_at(step), {"step": step}, keep=2)


@pytest.mark.faults
def test_row_02_a_step_whose_deletion_was_killed_is_never_listed(tmp_path):
    first_two(tmp_path)
    assert kill_while_removing(tmp_path, times=2, seed=0) >= 1


@pytest.mark.faults
def test_row_02_20_kills_within_a_rotation(tmp_path):
    first_two(tmp_path)
    torn = kill_while_removing(tmp_path, times=20, seed=1)
    print(f"20 kills in rotation, {torn} with a deletion half done, 0 listed")
    assert torn >= 10


def run_main(capsys, settings, *more):
    """Exit code, standard output and standard error of one training command."""
    code = main(["train", *settings, *more])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


@pytest.mark.faults
def test_row_03_leftovers_are_ignored_reported_and_cleaned(tiny_dir, tmp_path, capsys):
    settings = tiny_run(tiny_dir, tmp_path, "run.save_every=1")
    assert run_main(capsys, settings, "run.steps=1")[0] == 0
    root = tmp_path / "run" / "checkpoints"
    left = (
        ".2.writing",
        ".2.writing.orbax-checkpoint-tmp",
        ".0.removed",
        "9.orbax-checkpoint-tmp-0",
    )
    for name in left:
        shutil.copytree(root / "1", root / name)
    assert checkpoint.names(root) == ["1"]
    code, out, _ = run_main(capsys, settings, "run.steps=2")
    assert code == 0
    assert "Removed what an interrupted save left: .0.removed, .2.writing, " in out
    assert sorted(p.name for p in root.iterdir()) == ["1", "2"]


# ---------------------------------------------------------------------- row 4: power loss


def order_of_calls(monkeypatch, action):
    """("fsync" | "rename", path ...) of this process while `action` runs, in order."""
    calls, fsync, rename = [], os.fsync, os.rename

    def note_fsync(descriptor):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(source, target, **options):
        calls.append(("rename", os.path.abspath(source), os.path.abspath(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    action()
    return calls


def assert_order(calls, root):
    """Data and names on the disk, then the rename, then the directory that has the new name."""
    root = root.resolve()
    final = ("rename", str(root / ".1.writing"), str(root / "1"))
    at = calls.index(final)
    synced = {call[1] for call in calls[:at] if call[0] == "fsync"}
    inside = [path.relative_to(root / "1") for path in (root / "1").rglob("*")]
    wanted = {str(root / ".1.writing" / path) for path in inside} | {str(root / ".1.writing")}
    assert len(inside) > 8 and wanted <= synced, sorted(wanted - synced)
    assert ("fsync", str(root)) in calls[at:]


def test_row_04_files_then_rename_then_directory(tmp_path, monkeypatch):
    def action():
        checkpoint.save(tmp_path, 1, saves.state_at(1), {"step": 1})

    assert_order(order_of_calls(monkeypatch, action), tmp_path)


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_row_04_the_same_as_the_kernel_sees_it(tmp_path):
    trace, root = tmp_path / "trace", tmp_path / "checkpoints"
    before = ["strace", "-f", "-y", "-o", trace, "-e", "trace=fsync,fdatasync,rename,renameat"]
    child = start_child(root, "sync", 2, before)
    for line in child.stdout:
        if line.startswith("safe 1"):
            break
    child.kill()
    child.wait()
    calls = []
    for line in trace.read_text().splitlines():
        if found := re.search(r"f(?:data)?sync\(\d+<(.*?)>", line):
            calls.append(("fsync", found[1]))
        elif found := re.search(r'rename(?:at)?\((?:.*?)"(.*?)", (?:.*?)"(.*?)"', line):
            calls.append(("rename", found[1], found[2]))
    assert_order(calls, root)


# ------------------------------------------------------------- rows 5 to 7: files that change


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, small: every element of the state after step n is n."""
    root = tmp_path_factory.mktemp("saved")
    pending = checkpoint.Pending(1, {"tokens": np.arange(50)}, {"stats": []})
    state = {"w": jax.random.normal(jax.random.key(0), (32, 64)), "step": np.int32(5)}
    state = jax.tree.map(jax.numpy.asarray, state)
    checkpoint.save(root, 4, state, {"step": 4})
    checkpoint.save(root, 5, state, {"step": 5}, pending=pending)
    assert checkpoint.names(root) == ["4", "5+1"]
    return root


@pytest.fixture
def root(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def detected(root, name):
    """What is said of the newest checkpoint, in one line; the one before it is taken instead."""
    with pytest.raises(StorageError) as error:
        integrity.verify(root / "5+1")
    text = str(error.value)
    assert name in text and "\n" not in text and len(text) < 400, text
    said = []
    found = resume.find("auto", root, said.append)
    assert found.path == root / "4" and found.stale == ("5+1",)
    assert said == [f"warning: {text} Checkpoint 4 is taken instead."]


@pytest.mark.faults
def test_row_05_any_flipped_bit_is_found_in_200_trials(root):
    rng, files = random.Random(5), files_of(root / "5+1")
    sizes = [path.stat().st_size for path in files]
    hit = set()
    for _ in range(200):
        (path,) = rng.choices(files, weights=sizes)
        content = path.read_bytes()
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        detected(root, str(path.relative_to(root / "5+1")))
        path.write_bytes(content)
        hit.add(path)
    integrity.verify(root / "5+1")
    assert len(hit) > 3


@pytest.mark.faults
def test_row_05_with_no_whole_checkpoint_the_run_ends_with_exit_6(tiny_dir, tmp_path, capsys):
    settings = tiny_run(tiny_dir, tmp_path, "run.save_every=1", "run.steps=2")
    assert run_main(capsys, settings)[0] == 0
    root = tmp_path / "run" / "checkpoints"
    for path in files_of(root):
        if path.parent.name == "d" and "process" in str(path):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, _, err = run_main(capsys, settings, "run.steps=3")
    assert code == 6 and "no checkpoint is whole" in one_line(err)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 6
    assert "no checkpoint is whole" in one_line(capsys.readouterr().err)
    changed = {p.name for p, content in before.items() if p.read_bytes() != content}
    assert changed <= {"lock"}


@pytest.mark.parametrize("harm", ["truncate", "empty", "zero", "delete"])
def test_row_06_a_shard_that_is_cut_zeroed_or_gone_is_named(root, harm):
    for path in files_of(root / "5+1"):
        name, content = str(path.relative_to(root / "5+1")), path.read_bytes()
        if harm == "delete":
            path.unlink()
        elif harm == "zero":
            path.write_bytes(bytes(512)[: len(content)] + content[512:])
        else:
            path.write_bytes(content[: 0 if harm == "empty" else len(content) - 1])
        detected(root, name)
        path.write_bytes(content)
    integrity.verify(root / "5+1")


@pytest.mark.parametrize("file", ["manifest.json", "meta.json", "pending.json", "state/_METADATA"])
def test_row_07_json_that_is_damaged_is_one_line_and_a_fallback(root, file):
    path = root / "5+1" / file
    content = path.read_bytes()
    for harm in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        content.replace(b"{", b"[", 1),
        content.replace(b'"', b"'"),
        content + b" ",  # valid JSON of the same content, but not what was written
        json.dumps({"format": 1, "files": {}}).encode(),
        json.dumps({"format": 1, "files": 3, "sha256": "0"}).encode(),
    ):
        path.write_bytes(harm)
        detected(root, file)
    path.write_bytes(content)
    integrity.verify(root / "5+1")


# ------------------------------------------------------------ rows 8 and 9: which is resumed


@pytest.mark.faults
def test_row_08_the_newest_is_bad_and_the_one_before_it_is_resumed(tiny_dir, tmp_path, capsys):
    """The run ends as if nothing had happened, and the bad checkpoint is replaced by a good one."""
    settings = tiny_run(tiny_dir, tmp_path, "run.save_every=1", "run.keep=9", "run.steps=3")
    assert run_main(capsys, settings)[0] == 0
    wanted, root = metrics(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    bad = max(files_of(root / "3"), key=lambda path: path.stat().st_size)
    bad.write_bytes(bytes(len(bad.read_bytes())))
    code, out, _ = run_main(capsys, settings)
    assert code == 0
    assert "checkpoints/3: state/" in out and "Checkpoint 2 is taken instead." in out
    assert "Resumed after step 2 of 3." in out
    assert checkpoint.names(root) == ["1", "2", "3"]
    for name in checkpoint.names(root):
        integrity.verify(root / name)
    rows = metrics(tmp_path / "run")
    assert [row["completions/digest"] for row in rows] == [
        row["completions/digest"] for row in wanted
    ]
    assert [row["loss_by_update"] for row in rows] == [row["loss_by_update"] for row in wanted]


@pytest.mark.faults
def test_row_09_without_a_checkpoint_a_run_starts_fresh_and_says_so(tiny_dir, tmp_path, capsys):
    settings = tiny_run(tiny_dir, tmp_path, "run.steps=1")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, out, _ = run_main(capsys, settings)
    assert code == 0 and "No checkpoint in" in out and "starting from the beginning." in out


@pytest.mark.parametrize("how", [["--resume", "{}/9"], ["run.resume={}/9"], ["run.resume={}"]])
def test_row_09_a_checkpoint_that_is_asked_for_and_missing_is_exit_6(
    tiny_dir, tmp_path, capsys, how
):
    settings = tiny_run(tiny_dir, tmp_path, "run.steps=1")
    code, _, err = run_main(capsys, settings, *(text.format(tmp_path) for text in how))
    assert code == 6 and "not a checkpoint. Give auto, never, or" in one_line(err)
