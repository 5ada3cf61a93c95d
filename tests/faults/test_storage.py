"""Rows 45 to 48: disks that are full or closed, two runs in one place, exports that are killed."""

import errno
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from faults.tools import ROOT, environment, one_line, python, status, tiny_run
from gspo_jax.cli.commands import main
from gspo_jax.errors import StorageError
from gspo_jax.files.whole import check_place
from gspo_jax.models import Qwen, QwenConfig, load_model, save_model
from gspo_jax.run import metrics as writer
from gspo_jax.run.metrics import RunLog

# ------------------------------------------------------------------------- 45: a full disk

# A mount of its own, for one process: also for people who are not root, where the kernel lets them.
MOUNT = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o "$0" tmpfs "$1" && shift && exec "$@"']


def mounts():
    with tempfile.TemporaryDirectory() as place:
        try:
            done = subprocess.run([*MOUNT, "size=1m", place, "true"], capture_output=True)
        except FileNotFoundError:
            return False
        return done.returncode == 0


needs_mount = pytest.mark.skipif(not mounts(), reason="this system mounts nothing for users")
LEFTOVER = re.compile(r"tmp|\.part|\.writing|\.removed|\.old")


@pytest.fixture
def on_a_full_disk(tiny_dir, tmp_path):
    """What full_disk.py told, and its errors by the command that said them."""

    def run(mode):
        place = tmp_path / "place"
        place.mkdir()
        script = str(ROOT / "tests" / "faults" / "full_disk.py")
        done = subprocess.run(
            [*MOUNT, "size=24m", str(place), sys.executable, script, mode, str(tiny_dir)],
            env=environment(FULL_DISK_PLACE=str(place)),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = re.split(r"^== (\w+)\n", done.stderr, flags=re.MULTILINE)[1:]
        told = json.loads(done.stdout.rpartition("TOLD ")[2])
        for name, part in told.items():
            if name not in ("metrics", "status"):
                assert [x for x in part["left"] if LEFTOVER.search(x)] == [], name
        return told, dict(zip(said[::2], said[1::2], strict=True)), done.stdout

    return run


@pytest.mark.faults
@needs_mount
def test_row_45_a_checkpoint_on_a_full_disk_is_one_line_and_the_older_ones_go_on(on_a_full_disk):
    told, said, out = on_a_full_disk("checkpoint")
    assert told["full"]["code"] == 6
    # Filled while the third step is scored: the second may still be being written by then.
    line = one_line(said["full"])
    failed = re.search(r"checkpoints/([23]): .* could not be written .*; free some space", line)
    assert failed, said["full"]
    kept = {name.split("/")[2] for name in told["full"]["left"] if "/checkpoints/" in name}
    assert kept == {str(step) for step in range(1, int(failed[1]))}
    assert told["again"]["code"] == 0 and f"Resumed after step {max(kept)} of 4." in out
    assert told["metrics"] == [1, 2, 3, 4] and told["status"]["state"] == "finished"


@pytest.mark.faults
@needs_mount
def test_row_45_metrics_on_a_full_disk_cost_lines_and_not_the_run(on_a_full_disk):
    told, _, out = on_a_full_disk("metrics")
    assert told["full"]["code"] == 0 and told["status"]["state"] == "finished"
    assert told["metrics"][:1] == [1] and told["metrics"][-2:] == [5, 6]
    assert 3 <= len(told["metrics"]) < 6  # the second may still fit into the first one's page
    said = " ".join(out.split())
    assert said.count("metrics.jsonl is missing lines (No space left on device)") == 1


@pytest.mark.faults
@needs_mount
def test_row_45_an_export_on_a_full_disk_leaves_nothing_or_the_former_one(on_a_full_disk):
    told, said, _ = on_a_full_disk("export")
    assert told["full"]["code"] == told["replaced"]["code"] == 6
    assert "out cannot be written: No space left on device" in one_line(said["full"])
    assert not any(name.startswith("out") for name in told["full"]["left"])
    before, after = ({x for x in told[k]["left"] if "export" in x} for k in ("train", "replaced"))
    assert before == after and "run/export/model.safetensors" in after
    assert told["again"]["code"] == 0 and "out/model.safetensors" in told["again"]["left"]


@pytest.mark.faults
@needs_mount
def test_row_45_a_disk_that_is_full_at_the_start_is_one_line(on_a_full_disk):
    told, said, _ = on_a_full_disk("start")
    assert told["full"]["code"] == 6 and "No space left on device" in one_line(said["full"])


@pytest.mark.faults
def test_row_45_a_picture_that_cannot_be_drawn_is_a_warning(
    tiny_dir, tmp_path, monkeypatch, capsys
):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["train", *tiny_run(tiny_dir, tmp_path, "run.steps=1")]) == 0
    assert status(tmp_path / "run")["state"] == "finished"
    said = " ".join(capsys.readouterr().out.split())
    assert "dynamics.png: cannot be written (No space left on device)." in said
    assert list((tmp_path / "run" / "plots").iterdir()) == []


# ------------------------------------------------- 46: a place that cannot be written

PLACES = """
import json, os, sys
from pathlib import Path
from gspo_jax.errors import StorageError
from gspo_jax.files.whole import check_place, lock
root = Path(sys.argv[1])
if "AS_NOBODY" in os.environ:  # modes do not stop root
    os.setgid(65534), os.setuid(65534)
for name in sys.argv[2:]:
    for function in (check_place, lock):
        try:
            function(root / name)
            said = "nothing"
        except StorageError as error:
            said = str(error)
        print(json.dumps([name, function.__name__, said]))
"""


def test_row_46_a_place_that_cannot_be_written_is_told_before_anything_is_done():
    """By --dry-run's check, and by the run's own claim: the same line, exit code 6."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "readonly").mkdir(mode=0o555)
        (root / "closed").mkdir(mode=0o700 if os.getuid() == 0 else 0)
        (root / "used").mkdir()
        (root / "used" / "lock").touch(mode=0o000)
        (root / "file").write_text("")
        (root / "link").symlink_to(root / "nowhere")
        (root / "loop").symlink_to("loop")
        wanted = {
            "readonly": "no permission in",
            "readonly/run": "no permission in",
            "closed/deep/run": "no permission in",
            "used": "ermission",
            "file": "is a file",
            "file/run": "is a file",
            "link": "is a link to nothing",
            "link/run": "is a link to nothing",
            "loop/run": "symbolic links",
        }
        before = sorted(root.rglob("*"))
        nobody = {"AS_NOBODY": "1"} if os.getuid() == 0 else {}
        done = python(PLACES, root, *wanted, env=environment(**nobody))
        (root / "closed").chmod(0o700)
        assert done.returncode == 0, done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(told) == 2 * len(wanted)
        for name, function, said in told:
            assert wanted[name] in said and "set run.dir elsewhere" in said, (name, function, said)
        assert sorted(root.rglob("*")) == before
        assert "link/run" in wanted and not (root / "nowhere").exists()


@needs_mount
def test_row_46_a_read_only_file_system_is_told_before_anything_is_done(tmp_path):
    command = [*MOUNT, "ro", str(tmp_path), sys.executable, "-c", PLACES, str(tmp_path), "run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 2 and all("cannot be written (no permission in" in x[2] for x in told)


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "ENOTCONN"])
def test_row_46_a_stale_mount_is_told_before_anything_is_done(tmp_path, monkeypatch, name):
    """What the kernel says of a directory whose server is gone."""
    number, real = getattr(errno, name), os.stat

    def gone(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path / "mount")):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    (tmp_path / "mount").mkdir()
    monkeypatch.setattr(writer.os, "stat", gone)
    monkeypatch.setattr(writer.os.path, "isdir", lambda path: False)
    with pytest.raises(StorageError, match=re.escape(f"({os.strerror(number)}); set run.dir")):
        check_place(tmp_path / "mount")


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_row_46_the_command_line_says_so_and_exits_with_6(tiny_dir, tmp_path, capsys, extra):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "link"):
        settings = tiny_run(tiny_dir, tmp_path, f"run.dir={tmp_path / place}")
        assert main(["train", *settings, *extra]) == 6
        assert "cannot be written" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------- 47: two runs in one place

CLAIM = """
import sys, time
from pathlib import Path
from gspo_jax.errors import StorageError
from gspo_jax.files.whole import lock
print("ready", flush=True)
sys.stdin.readline()
try:
    held = lock(Path(sys.argv[1]))
    print("mine", flush=True)
    sys.stdin.readline()
except StorageError as error:
    print(error, flush=True)
"""


def claimant(place):
    command = [sys.executable, "-c", CLAIM, str(place)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())


def say(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_row_47_of_runs_that_start_together_one_has_the_directory(tmp_path):
    processes = [claimant(tmp_path / "run") for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        say(process)
    told = {process.pid: process.stdout.readline() for process in processes}
    (winner,) = (pid for pid, said in told.items() if said == "mine\n")
    for pid, said in told.items():
        assert pid == winner or "is in use by another run" in said
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.faults
def test_row_47_a_second_run_is_refused_and_the_claim_of_a_killed_one_is_recovered(
    tiny_dir, tmp_path, capsys
):
    first = claimant(tmp_path / "run")
    assert first.stdout.readline() == "ready\n"
    say(first)
    assert first.stdout.readline() == "mine\n"
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    settings = tiny_run(tiny_dir, tmp_path, "run.steps=1")
    for extra in ([], ["--dry-run"]):
        assert main(["train", *settings, *extra]) == 6
        line = one_line(capsys.readouterr().err)
        assert f"in use by another run (process {first.pid} on" in line
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    first.kill()
    first.communicate()
    assert f"process {first.pid}" in (tmp_path / "run" / "lock").read_text()  # stale
    assert main(["train", *settings]) == 0
    assert status(tmp_path / "run")["state"] == "finished"
    RunLog(tmp_path / "run", of=1).close()  # given back


# --------------------------------------------------------------- 48: exports that are killed

EXPORT = """
import os, sys
from pathlib import Path
from gspo_jax.models import load_model, save_model
os.umask(0o022)
source, out, replaced = sys.argv[1:]
model = load_model(source)
for number in range(10_000):
    print(number, flush=True)
    save_model(model, Path(out) / str(number), like=source, card="A card.")
    save_model(model, replaced, like=source, card=f"Card {number}.", replace=True)
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory, tiny_dir):
    """A model of 8 MB, so that writing it takes a while."""
    shape = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "qwen2"}
    config = QwenConfig.from_hf({"vocab_size": 296, "tie_word_embeddings": True} | shape)
    path = tmp_path_factory.mktemp("models") / "larger"
    save_model(Qwen(config, rngs=nnx.Rngs(3)), path, like=tiny_dir)
    return path


def kill_an_export(source, place, rng):
    """Start exporting, kill it some time in the second or third one; returns how many it began."""
    place.mkdir()
    command = [sys.executable, "-c", EXPORT, str(source), str(place), str(place / "replaced")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout.readline() == "0\n"
    assert process.stdout.readline() == "1\n"
    try:
        process.wait(rng.uniform(0, 0.3))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    return 2 + len(rest.splitlines())


def whole(directory, weights):
    """Whether a directory has every file, the weights of its source, and the modes of umask 022."""
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()}
    assert modes == dict.fromkeys(modes, 0o644) and "README.md" in modes, modes
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    found = nnx.to_flat_state(nnx.state(load_model(directory)))
    assert len(found) == len(weights)
    return all(np.array_equal(weights[path], value[...]) for path, value in found)


def exports_are_whole(source, tmp_path, kills, seed):
    """`kills` times; how often an export was under way when it was killed."""
    weights = {p: np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(load_model(source)))}
    rng, interrupted = random.Random(seed), 0
    for trial in range(kills):
        place = tmp_path / str(trial)
        begun = kill_an_export(source, place, rng)
        there = {p.name for p in place.iterdir() if p.name.isdigit()}
        assert there in ({str(n) for n in range(begun)}, {str(n) for n in range(begun - 1)})
        for name in there:
            assert whole(place / name, weights)
        hidden = {p.name for p in place.iterdir()} - there - {"replaced"}
        assert all(re.match(r"\.(\d+|replaced)\.(partial|old)-", name) for name in hidden), hidden
        interrupted += bool(hidden)
        # The one that was replaced over and over: there, or aside under the name of the old one.
        aside = [name for name in hidden if name.startswith(".replaced.old-")]
        assert whole(
            place / (aside[0] if not (place / "replaced").exists() else "replaced"), weights
        )
    return interrupted


@pytest.mark.faults
def test_row_48_an_export_that_is_killed_is_absent_or_complete(larger, tmp_path):
    exports_are_whole(larger, tmp_path, kills=2, seed=0)


@pytest.mark.faults
def test_row_48_exports_killed_at_25_random_times(larger, tmp_path):
    interrupted = exports_are_whole(larger, tmp_path, kills=25, seed=1)
    print(f"{interrupted} of 25 were under way")
    assert interrupted >= 15
