"""Rows 49 to 53: what is shown, logged, tracked and kept to oneself."""

import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from page_cases import check_inert
from PIL import Image
from rich.console import Console

from faults.tools import metrics, one_line, python, tiny_run, write_rows
from gspo_jax.cli.commands import COMMANDS, explain, main
from gspo_jax.config.load import load_config
from gspo_jax.run import metrics as writer
from gspo_jax.run import trackers
from gspo_jax.run.metrics import RunLog
from gspo_jax.run.model_card import stated
from gspo_jax.text.inert import one_line as shown_on_one_line
from gspo_jax.train import train
from gspo_jax.view.report import dynamics, read_metrics, report

# ------------------------------------------------------------- 49: what a model may write

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "rich markup": "[bold red]x[/bold red][link=file:///etc/passwd]y[/link]",
    "unbalanced markup": "[/] [/bold] [",
    "title": "\x1b]0;owned\x07",
    "title without an end": "\x1b]0;owned",
    "clipboard": "\x1b]52;c;b3duZWQ=\x07",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\here\x1b]8;;\x1b\\",
    "clear": "\x1b[2J\x1b[H\x1b[3J",
    "colour": "\x1b[31mred\x1b[38;2;1;2;3mmore",
    "answer back": "\x1b[6n\x1b[c\x1bZ",
    "device string": "\x1bP1$r0m\x1b\\",
    "8-bit controls": "\x9b2J\x9d0;title\x9c",
    "half an escape": "\x1b",
    "bell and backspace": "\x07\x08\x08\x08",
    "carriage return": "right\rwrong",
    "vertical": "a\vb\fc\x85d\u2028e\u2029f",
    "right to left": "\u202egnihtyna\u202c \u2066x\u2069 \u200f",
    "invisible": "a\u200bb\ufeffc\u00add\u2060e",
    "private": "\ue000\U000f0000\U0010ffff",
    "tags": "".join(chr(0xE0000 + ord(c)) for c in "hidden"),
    "combining": "a" + "\u0301" * 5000,
    "wide": "字" * 5000,
    "NUL": "a\x00b",
    "megabyte": "A" * 1_000_000,
    "megabyte of escapes": "\x1b]0;" * 250_000,
    "format": "%s %n {0} {__class__}",
    "formula": "$\\frac{1}{$",
}


def plain(text):
    """Whether a terminal has nothing to obey in `text`."""
    return not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in text)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_row_49_text_of_a_model_is_inert_on_a_terminal_and_one_line_of_the_file(
    tmp_path, name, terminal
):
    text = HOSTILE[name]
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    rows = [{"prompt": text, "completion": text, "answer": text, "reward": 1.0}]
    with RunLog(tmp_path, of=1, console=console) as log:
        log.start()
        log.samples(1, rows)
        log.say(f"reward judge raised ValueError: {text[:2000]}")
    out = console.file.getvalue()
    assert "owned" not in out and "b3duZWQ" not in out
    for escape in (
        "\x1b]",
        "\x1bP",
        "\x1bZ",
        "\x1b[2J",
        "\x1b[3J",
        "\x1b[6n",
        "\x1b[c",
        "\x1b[31m",
    ):
        assert escape not in out, escape
    if not terminal:
        assert plain(out) and not any(c in out for c in "\u202e\u2066\u200f\u200b\ufeff\ue000")
    (line,) = (tmp_path / "samples.jsonl").read_bytes().splitlines()
    assert line.isascii() and json.loads(line)["completion"] == text  # all of it, and escaped


@pytest.mark.parametrize("name", HOSTILE)
def test_row_49_text_of_a_model_in_an_error_is_one_inert_line(name, monkeypatch, capsys):
    def fails(arguments):
        raise RuntimeError(f"could not read {HOSTILE[name]}")

    monkeypatch.setitem(COMMANDS, "train", (fails, ""))
    assert main(["train"]) == 1
    assert "could not read" in one_line(capsys.readouterr().err)
    assert explain(RuntimeError(HOSTILE[name]))[0] == 1


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>".replace("/", ""), "$\\frac{1}{$", "a$b"]
)
def test_row_49_the_picture_takes_no_name_for_a_formula(tmp_path, name):
    run = tmp_path / name
    run.mkdir()
    rows = [{"step": k, "reward": 0.5, HOSTILE["image"]: 1.0, "eval/$x$": 2} for k in (1, 2)]
    write_rows(run / "metrics.jsonl", rows)
    with Image.open(dynamics(run)) as image:
        assert image.width > 400


def test_row_49_text_of_a_model_is_inert_in_the_page_of_a_run(tmp_path):
    """All of them at once: as samples, warnings, settings, and as what the run says of itself."""
    run = tmp_path / "$x$<b>"
    run.mkdir()
    write_rows(run / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    texts = list(HOSTILE.values())
    said = [{"step": k, "prompt": t, "completion": t, "answer": t} for k, t in enumerate(texts)]
    write_rows(run / "samples.jsonl", said[-6:])
    (run / "warnings.log").write_text("\n".join(t[:10_000] for t in texts), errors="replace")
    (run / "config.yaml").write_text(json.dumps({"model": {"path": texts}, texts[0]: texts[1]}))
    (run / "env.json").write_text(json.dumps({"command": texts, "commit": texts[0]}))
    (run / "status.json").write_text(json.dumps({"state": texts[1], "of": texts[2]}))
    text = report([run]).read_text(encoding="utf-8")
    check_inert(text)
    assert len(text) < 1_000_000


def test_row_49_cutting_comes_before_looking():
    """A megabyte is not searched: the work is that of a line."""
    began = time.process_time()
    for _ in range(100):
        assert len(shown_on_one_line(HOSTILE["megabyte of escapes"], 80)) <= 80
    assert time.process_time() - began < 1


# ------------------------------------------------------------------------- 50: the network


@pytest.mark.faults
def test_row_50_a_run_listens_on_no_port(tiny_dir, tmp_path):
    """The page is a program of its own (test_live_page.py); nothing else listens or calls."""
    heard, listening = [], [True]

    def listen(event, args):
        if listening[0] and event in ("socket.bind", "socket.listen", "socket.connect"):
            heard.append((event, args[-1]))

    sys.addaudithook(listen)
    try:
        settings = tiny_run(tiny_dir, tmp_path, "run.steps=1")
        assert train(load_config(None, settings)).state == "finished"
    finally:
        listening[0] = False
    assert heard == []


# ------------------------------------------------------------------ 51: files that are torn


def row(step, **more):
    return {"step": step, "updates": 2 * step, "reward": 0.5, "entropy": 1.0, **more}


GARBAGE = {
    "torn": '{"step": 7, "rew',
    "zeros": "\0" * 10_000,
    "binary": "".join(map(chr, range(256))),
    "another kind": '[1]\n12\nnull\n"x"',
    "no step": '{"reward": 1}\n{"step": "7"}\n{"step": null}\n{"step": 7.0}\n{"step": true}',
    "impossible steps": '{"step": -1}\n{"step": 99999999999999999999}',
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "a number without end": '{"step": ' + "9" * 10_000 + "}",
    "a long line": '{"step": 7, "x": "' + "x" * 5_000_000,
    "not finite": '{"step": 7, "reward": NaN, "entropy": Infinity, "grad_norm": 1e999}',
    "huge numbers": '{"step": 7, "reward": 1'
    + "0" * 400
    + ', "entropy": 1e308, "grad_norm": -1e308}',
    "texts for numbers": '{"step": 7, "updates": "many", "reward": "x", "entropy": [1]}',
    "negative updates": '{"step": 7, "updates": -5, "completions/clipped_ratio": -1e9}',
    "odd lengths": '{"step": 7, "completions/max_length": NaN, "completions/mean_length": 1e99}',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_row_51_garbage_among_the_metrics_is_skipped(tmp_path, name):
    good = [row(k) for k in range(1, 6)]
    text = "".join(json.dumps(r) + "\n" for r in good)
    (tmp_path / "metrics.jsonl").write_text(f"{text}{GARBAGE[name]}\n{json.dumps(row(9))}\n")
    rows = {r["step"]: r for r in read_metrics(tmp_path)}
    assert set(rows) - {7} == {1, 2, 3, 4, 5, 9}
    assert all(rows[r["step"]] == r for r in good)
    with Image.open(dynamics(tmp_path)) as image:
        assert image.width > 1000


@pytest.mark.faults
def test_row_51_a_run_whose_metrics_are_torn_goes_on_where_it_was(tiny_dir, tmp_path):
    settings = tiny_run(tiny_dir, tmp_path, "run.save_every=1")
    run = train(load_config(None, [*settings, "run.steps=2"])).run_dir
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "rew\x00\xff\n[1]\n' + b"[" * 100_000)
    train(load_config(None, settings))
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("rotated", [False, True])
def test_row_51_metrics_that_are_deleted_or_rotated_away_begin_anew(tmp_path, rotated):
    with RunLog(tmp_path, of=4, console=Console(file=io.StringIO())) as log:
        log.start()
        log.step(1, {"reward": 0.5})
        path = tmp_path / "metrics.jsonl"
        path.rename(tmp_path / "metrics.jsonl.1") if rotated else path.unlink()
        log.step(2, {"reward": 0.25})
        log.step(3, {"reward": 0.75})
    assert [r["step"] for r in metrics(tmp_path)] == [2, 3]
    assert (tmp_path / "metrics.jsonl.1").exists() == rotated


@pytest.mark.faults
def test_row_51_a_run_whose_metrics_are_gone_finishes_and_exports(tiny_dir, tmp_path, monkeypatch):
    """Deleted after the last step: nothing is left to draw, and the run is a success."""
    settings = tiny_run(tiny_dir, tmp_path, "run.steps=1")
    monkeypatch.setattr(writer.jsonl, "append", lambda file, record: None)
    result = train(load_config(None, settings))
    assert result.state == "finished" and (result.run_dir / "export" / "config.json").exists()


READER = """
import json, resource, sys, time
from pathlib import Path
from gspo_jax.view import report
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 2**10
report.draw([{"step": 1, "reward": 0.5}], Path(sys.argv[1]) / "x.png")
before, began = peak(), time.process_time()
report.dynamics(Path(sys.argv[1]))
rows = report.read_metrics(Path(sys.argv[1]), most=1000)
print(json.dumps([len(rows), rows[0]["step"], rows[-1]["step"], peak() - before,
                  time.process_time() - began]))
"""


def many_rows(path, count):
    with path.open("w") as file:
        for k in range(1, count + 1):
            measured = {"eval/greedy": 0.5} if k % 1000 == 0 else {}
            file.write(
                json.dumps(row(k, **{f"metric_{i}": k / 7 for i in range(20)}) | measured) + "\n"
            )


@pytest.mark.faults
@pytest.mark.parametrize("count", [30_000, 10**6])
def test_row_51_a_million_steps_are_drawn_in_bounded_memory(tmp_path, count):
    """Rows of half a kilobyte; the reader holds some thousand of them."""
    many_rows(tmp_path / "metrics.jsonl", count)
    done = python(READER, tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    held, first, last, grown, seconds = json.loads(done.stdout)
    assert 500 <= held <= 2002 and (first, last) == (1, count)
    assert grown < 60, grown  # MB
    assert seconds < 30 + count / 10_000  # of this process alone: at least 10,000 rows a second


# -------------------------------------------------------------------------- 52: the tracker

TRACKED = """
import io, os, sys, time
from pathlib import Path
from rich.console import Console
from gspo_jax.run.metrics import RunLog
console = Console(file=io.StringIO(), width=200)
how = {"config": "run: {seed: 3}", "report_to": ["wandb"], "console": console}
with RunLog(Path(sys.argv[1]), of=3, **how) as log:
    log.start()
    for step in (1, 2, 3):
        log.step(step, {"reward": 0.5})
    log.status("finished")
print(console.file.getvalue())
"""


def fake_wandb(monkeypatch, **functions):
    module = SimpleNamespace(Settings=lambda **_: None, Table=SimpleNamespace, **functions)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)


def fake_run(**functions):
    return SimpleNamespace(step=0, offline=False, url="", **functions)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["import", "log"])  # the others are in tests/run/test_trackers.py
def test_row_52_a_tracker_that_fails_is_one_warning_and_the_run_unaffected(
    tiny_dir, tmp_path, monkeypatch, capsys, fault
):
    def fail(*_, **__):
        raise ConnectionError(f"no route to host\n{'x' * 10_000}")

    fake_wandb(monkeypatch, init=lambda **_: fake_run(log=fail, finish=lambda: None))
    if fault == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    settings = tiny_run(tiny_dir, tmp_path, "run.report_to=[wandb]", "run.steps=2")
    assert main(["train", *settings]) == 0
    assert capsys.readouterr().out.count("wandb is left out from here on") == 1
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2]


def test_row_52_an_upload_that_never_ends_is_left_to_itself(tmp_path, monkeypatch):
    gone = threading.Event()
    run = fake_run(log=lambda *_, **__: None, finish=gone.wait)
    fake_wandb(monkeypatch, init=lambda **_: run)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.1)
    console = Console(file=io.StringIO(), width=200)
    with RunLog(tmp_path, of=1, report_to=["wandb"], console=console) as log:
        log.start()
        log.step(1, {"reward": 0.5})
    gone.set()
    assert "wandb is left out from here on (still busy 0.1 s after" in console.file.getvalue()


@pytest.mark.parametrize("outage", ["no key", pytest.param("no network", marks=pytest.mark.faults)])
def test_row_52_the_real_tracker_without_a_key_or_a_network(tmp_path, outage):
    """No server listens at the address; wandb itself gives up after half a minute."""
    real = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    if outage == "no network":
        real["WANDB_API_KEY"] = "0123456789abcdef" * 2 + "01234567"
    env = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | real
    env["PYTHONPATH"] = os.pathsep.join([str(Path(writer.__file__).parents[2])])
    done = python(TRACKED, tmp_path / "run", env=env, stdin=-3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wandb is left out from here on") == 1
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


# --------------------------------------------------------------------------- 53: secrets

SECRETS = {
    "HF_TOKEN": "hf_" + "Ab3" * 11,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "JUDGE_API_KEY": "judge-key-0f1e2d3c4b5a",
    "MY_PASSWORD": "correct-horse-battery",
    "PRIVATE_NAME": "whoever-reads-this-4711",  # no secret by its name: it is used through ${...}
}
LITERAL = {  # that somebody typed
    "a password in a URL": ("https://me:hunter2hunter2@host/x", "hunter2hunter2"),
    "a hub token": ("hf_" + "Zz9" * 11, "hf_" + "Zz9" * 11),
    "an API key": ("sk-proj-" + "q1W2" * 8, "sk-proj-" + "q1W2" * 8),
}


@pytest.fixture
def telling_dir(tiny_dir, tmp_path):
    """A model whose template looks at variables, so that a setting can carry any text."""
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "telling"))
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text() + "{#- #}{% if a or b or c or d %}{% endif %}")
    return directory


def written(*places):
    """All bytes of all files, by name."""
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.faults
def test_row_53_no_secret_reaches_a_file_or_the_terminal(telling_dir, tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    typed = {key: text for key, (text, _) in zip("bcd", LITERAL.values(), strict=True)}
    arguments = {"a": "${oc.env:PRIVATE_NAME}", **typed}
    setting = "model.template_args={" + ", ".join(f"{k}: '{v}'" for k, v in arguments.items()) + "}"
    place = tmp_path / "runs"
    place.mkdir()
    (place / SECRETS["PRIVATE_NAME"]).symlink_to(telling_dir)
    options = ["run.steps=2", "run.save_every=1", setting]
    options += ["run.report_to=[wandb,tensorboard]"]
    options += [f"model.path={place}/${{oc.env:PRIVATE_NAME}}"]
    options += ["eval.split=train", "eval.samples=0", "run.log_completions=1"]
    line = ["train", *tiny_run(telling_dir, place, *options)]
    # As a shell would have filled in a variable that the user typed.
    monkeypatch.setattr(sys, "argv", ["gspo-jax", *line, f"x={SECRETS['JUDGE_API_KEY']}"])
    assert main(line) == 0
    run = place / "run"
    assert main(["export", str(run), str(place / "out")]) == 0
    assert main(["train", *line[1:], "run.steps=3"]) == 0  # a resumed run knows itself again
    kept = written(run, place / "out")
    assert {Path(name).name for name in kept} > {"config.yaml", "env.json", "README.md"}
    assert any("tfevents" in name for name in kept) and any(".table.json" in name for name in kept)
    out, err = capfd.readouterr()
    kept |= {"standard output": out.encode(), "standard error": err.encode()}
    for secret in [*SECRETS.values(), *(secret for _, secret in LITERAL.values())]:
        found = [name for name, content in kept.items() if secret.encode() in content]
        assert found == [], (secret, found)
    assert "${oc.env:PRIVATE_NAME}" in (run / "config.yaml").read_text()
    assert load_config(run / "config.yaml").run.name == "run"  # still YAML, and still a config


def test_row_53_no_secret_reaches_an_error(monkeypatch, capsys, tmp_path):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for where in (f"https://me:{SECRETS['MY_PASSWORD']}@host/model", LITERAL["a hub token"][0]):
        assert main(["train", f"model.path=/nowhere/{where}", f"run.dir={tmp_path}"]) == 3
        line = one_line(capsys.readouterr().err)
        assert "(removed)" in line and SECRETS["MY_PASSWORD"] not in line and where not in line


def test_row_53_the_card_of_a_source_lends_no_more_than_a_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntoken: hf_secret\n---\nhf_secret")
    assert stated(tmp_path) == {"license": "mit"}
