"""Trackers: what reaches them, what never does, and that none can harm a run."""

import io
import json
import re
import struct
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from wandb.proto import wandb_internal_pb2

from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.run import trackers
from gspo_jax.run.metrics import RunLog
from gspo_jax.run.trackers import spread, table

KEY = "0123456789abcdef" * 2 + "01234567"
CONFIG = "run: {seed: 3}\nmodel: {path: '${oc.env:MODELS}/x'}\n"
EVIL = "![a](http://evil/x) <img src=//evil> | [b](//c) `d` **e**\n# f <script>g</script> http://h"
ROWS = [
    {"prompt": [{"role": "user", "content": "2+2?"}], "completion": EVIL, "reward": 1.0},
    {"prompt": "3+3?", "completion": "6", "reward": None, "advantage": -0.25},
]


def quiet():
    return Console(file=io.StringIO(), width=300)


def tracked(directory, names, steps, *, after=None, rows=(), console=None, config=CONFIG):
    """A run of these steps that goes on after `after`; reward is step / 8."""
    log = RunLog(directory, of=9, config=config, report_to=names, console=console or quiet())
    with log:
        log.start(after)
        for step in steps:
            log.step(step, {"reward": step / 8, "clip": [0.25, 0.5], "digest": "a1", "kl": None})
            log.samples(step, list(rows), show=False)
        log.status("finished")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------ what is passed on


def test_lists_are_spread_and_nothing_is_made_of_null():
    line = {"step": 3, "a": 0.5, "b": [1, None, 2], "c": None, "d": "text"}
    assert dict(spread(line)) == {"a": 0.5, "b/0": 1, "b/2": 2, "d": "text"}


def test_a_table_has_the_texts_first_and_a_chat_as_text(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    row = {"prompt": f"my key is {KEY}", "completion": "x" * 20_000}
    columns, cells = table(7, [*ROWS, row])
    assert columns == ["step", "prompt", "completion", "reward", "advantage"]
    assert cells[0] == [7, "user: 2+2?", EVIL, 1.0, None]
    assert cells[2][1] == "my key is (removed)" and len(cells[2][2]) == 10_000


def test_a_package_that_is_missing_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.report_to=\[tensorboard\]: not installed; pip "):
        RunLog(tmp_path / "run", of=1, report_to=["tensorboard"])
    with pytest.raises(ConfigError, match=r"pip install wandb\.$"):
        trackers.check_installed(["wandb"])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ tensorboard


def shown(directory):
    """What TensorBoard's own reader makes of the event files: name -> [(step, value)]."""
    found = EventAccumulator(str(directory / "tensorboard")).Reload()
    scalars = {
        name: [(point.step, point.value) for point in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }
    texts = {
        name: [(p.step, p.tensor_proto.string_val[0].decode()) for p in found.Tensors(name)]
        for name in found.Tags()["tensors"]
    }
    return scalars, texts


def test_tensorboard_reads_scalars_lists_config_and_samples(tmp_path):
    tracked(tmp_path, ["tensorboard"], [0, 1, 2], rows=ROWS)
    scalars, texts = shown(tmp_path)
    assert scalars == {
        "reward": [(0, 0.0), (1, 0.125), (2, 0.25)],
        "clip/0": [(0, 0.25), (1, 0.25), (2, 0.25)],
        "clip/1": [(0, 0.5), (1, 0.5), (2, 0.5)],
    }
    assert texts["config"] == [(0, "".join(f"    {line}\n" for line in CONFIG.splitlines()))]
    assert [step for step, _ in texts["completions"]] == [0, 1, 2]


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_what_a_model_wrote_is_text_in_tensorboard_and_loads_nothing(tmp_path):
    tracked(tmp_path, ["tensorboard"], [1], rows=ROWS)
    ((_, text),) = shown(tmp_path)[1]["completions"]
    page = Tags(markdown_to_safe_html(text))
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert EVIL.replace("\n", "⏎") in page.text and "-0.25" in page.text


def test_a_resumed_run_has_each_step_once_in_tensorboard_the_later_value(tmp_path):
    tracked(tmp_path, ["tensorboard"], [1, 2, 3, 4], rows=ROWS)
    log = RunLog(tmp_path, of=5, report_to=["tensorboard"], console=quiet())
    with log:
        log.start(2)
        log.step(2, {"reward": 0.25, "eval/greedy": 0.5})  # its evaluation came later
        log.step(3, {"reward": 9.0})
        log.step(3, {"reward": 9.0, "eval/greedy": 0.75})
    scalars, texts = shown(tmp_path)
    assert scalars["reward"] == [(1, 0.125), (2, 0.25), (3, 9.0)]
    assert scalars["eval/greedy"] == [(2, 0.5), (3, 0.75)]
    assert scalars["clip/0"] == [(1, 0.25), (2, 0.25)]
    assert {step for step, _ in texts["completions"]} >= {1, 2}


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_added_later_hears_what_was_before(tmp_path, monkeypatch, tracker):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked(tmp_path, [], [0, 1, 2, 3])
    tracked(tmp_path, [tracker], [3, 4], after=2)
    found = [step for step, _ in shown(tmp_path)[0]["reward"]] if tracker == "tensorboard" else []
    assert (found or [row["_step"] for row in history(tmp_path)]) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------ wandb


def records(path):
    """The records of wandb's own file: protocol buffers in LevelDB's log format."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if len(part := data[at + 7 : at + 7 + size]) < size or not kind:
            return  # not yet written
        whole += part
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            yield record


def offline(directory):
    """All of wandb's records; its service, a process, writes the last ones when it gets to it."""
    found = []
    for path in sorted(directory.glob("wandb/off*/*.wandb")):
        until = time.monotonic() + 60
        while not (rows := list(records(path))) or rows[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < until, f"{path} has no end"
            time.sleep(0.05)
        found += rows
    return found


def history(directory):
    rows = []
    for record in offline(directory):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


@pytest.fixture
def offline_run(tmp_path, monkeypatch):
    """A run with the real wandb offline, resumed once, with secrets all around."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["train", "x=https://me:hunter2hunter2@host/y"])
    console = quiet()
    config = f"run: {{seed: 3}}\njudge: {KEY}\n"
    tracked(tmp_path, ["wandb"], [0, 1, 2], rows=ROWS, console=console, config=config)
    tracked(tmp_path, ["wandb"], [2, 3], after=1, rows=ROWS, console=console, config=config)
    return tmp_path, console.file.getvalue()


def test_wandb_offline_has_each_step_once_the_config_and_tables(offline_run):
    directory, told = offline_run
    rows = history(directory)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["reward"] == 0.125 and rows[1]["clip/1"] == 0.5 and "kl" not in rows[1]
    found = [record.run for record in offline(directory) if record.HasField("run")]
    kept = json.loads((directory / "wandb.json").read_text())
    assert {run.run_id for run in found} == {kept["id"]} and kept["step"] == 3
    config = {u.key: json.loads(u.value_json) for u in found[0].config.update}
    assert config["run"] == {"seed": 3} and config["judge"] == "(removed)"
    assert found[0].display_name == directory.name and found[0].project == "gspo_jax"
    tables = [json.loads(path.read_text()) for path in directory.glob("wandb/off*/**/*.table.json")]
    assert len(tables) == 4
    assert tables[0]["columns"] == ["step", "prompt", "completion", "reward", "advantage"]
    assert tables[0]["data"][0][1:3] == ["user: 2+2?", EVIL]
    assert f"wandb: offline; wandb sync {directory}/wandb/offline-* sends it." in told


def test_no_secret_reaches_a_file_of_a_tracker(offline_run):
    directory, _ = offline_run
    tracked(directory, ["tensorboard"], [4], after=3, rows=ROWS)
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any("wandb/offline" in str(path) for path in files)
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
        assert b"hunter2" not in path.read_bytes(), path


# ---------------------------------------------------------------------------------- outages


def fake_wandb(monkeypatch, **functions):
    run = SimpleNamespace(step=0, offline=False, url="", log=lambda *_, **__: None)
    run.finish = lambda: None
    vars(run).update({k: v for k, v in functions.items() if k != "init"})
    init = functions.get("init", lambda **_: run)
    module = SimpleNamespace(Settings=lambda **_: None, Table=SimpleNamespace, init=init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)


@pytest.mark.parametrize("fault", ["import", "init", "log", "exit", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_never_an_error(tmp_path, monkeypatch, fault):
    def fail(*_, **__):
        faults.append(1)
        raise (SystemExit if fault == "exit" else RuntimeError)(f"no network\nand more {KEY}")

    faults = []
    fake_wandb(monkeypatch, **{"log" if fault == "exit" else fault: fail})
    if fault == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    console = quiet()
    tracked(tmp_path, ["wandb"], [1, 2], rows=ROWS, console=console)
    assert console.file.getvalue().count("wandb is left out from here on") == 1
    assert len(faults) == (fault != "import")
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_a_tracker_that_hangs_holds_no_step_up_and_the_end_not_for_long(
    tmp_path, monkeypatch, fault
):
    gone = threading.Event()
    fake_wandb(monkeypatch, **{fault: lambda *_, **__: gone.wait()})
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(trackers, "WAITING", 5)
    console = quiet()
    tracked(tmp_path, ["wandb"], range(1, 4 if fault == "finish" else 20), console=console)
    told = console.file.getvalue()
    gone.set()
    assert told.count("wandb is left out from here on") == 1
    assert ("still busy 0.1 s after" in told) == (fault == "finish")
    assert ("it does not answer" in told) == (fault != "finish")


def test_a_full_disk_costs_tensorboard_and_nothing_else(tmp_path, monkeypatch):
    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers.TensorBoard, "_write", full)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    console = quiet()
    tracked(tmp_path, ["tensorboard", "wandb"], [1, 2], console=console)
    assert console.file.getvalue().count("warning") == 1
    assert "tensorboard is left out from here on ([Errno 28] No space" in console.file.getvalue()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


# ---------------------------------------------------------------------------------- the page


def test_the_page_of_trackers_is_about_settings_that_exist_and_its_example_runs(
    tmp_path, monkeypatch, capsys
):
    page = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text(encoding="utf-8")
    for line in re.findall(r"gspo-jax train configs/demo\.yaml (.*)$", page, re.M):
        assert set(load_config(None, line.split()).run.report_to) <= set(trackers.TRACKERS)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len([line for line in code.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    tracked(tmp_path / "runs" / "demo-seed0", [], [1, 2])
    exec(compile(code, "trackers.md", "exec"), {})
    assert capsys.readouterr().out == "1 {'reward': 0.125}\n2 {'reward': 0.25}\n"
