"""Rows 49 to 51: the live page and hostile text, the network, and files that are torn."""

import http.client
import json
import os
import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser

import pytest
from monitor_cases import lines, make_run, row

from faults.test_logs import GARBAGE, HOSTILE, many_rows
from faults.tools import python
from gspo_jax.view.follow import Follower, Watch
from gspo_jax.view.monitor import bind, serve
from gspo_jax.view.snapshot import MOST_TEXT, snapshot

OVERRIDES = "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F]))


@pytest.fixture
def hostile(tmp_path):
    """A run whose every text is somebody's attempt, its name and its settings among them."""
    samples = [
        {"step": 1, "prompt": [{"role": text[:99], "content": text}], "completion": text}
        | {"answer": text, "reward": 1.0, "advantage": 0.5}
        for text in HOSTILE.values()
    ]
    return make_run(
        tmp_path / "<img src=x onerror=document.title='owned'>",
        [row(k, **{f"rewards/{HOSTILE['image']}/errors": 1}) for k in (1, 2)],
        samples=samples[:16],
        warnings="".join(f"{json.dumps(text[:500])[1:-1]}\n" for text in HOSTILE.values()),
        config=json.dumps({"run": {"seed": HOSTILE["script"]}}),
    )


@pytest.fixture
def server(hostile):
    made = bind(Watch([hostile]), "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def texts(value):
    if isinstance(value, dict):
        return [t for key, item in value.items() for t in [key, *texts(item)]]
    if isinstance(value, list):
        return [t for item in value for t in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("name", HOSTILE)
def test_row_49_text_of_a_model_reaches_the_page_as_a_plain_inert_string(tmp_path, name):
    text = HOSTILE[name]
    sample = {"step": 1, "prompt": text, "completion": text, "answer": text}
    run = make_run(tmp_path / "run", [row(1)], samples=[sample], warnings=text)
    made = bind(Watch([run]), "127.0.0.1", 0)
    body = made.data()
    made.server_close()
    assert body.isascii() and len(body) < 100_000
    found = texts(json.loads(body))
    assert all(c.isprintable() or c == "\n" for t in found for c in t)
    assert not any(c in t for t in found for c in OVERRIDES)
    assert "owned" not in body.decode() and "b3duZWQ" not in body.decode()
    if "<" in text:
        assert text in json.loads(body)["runs"][0]["samples"][0]["completion"]  # shown, not eaten
    if len(text) > MOST_TEXT:
        assert "more characters)" in body.decode()


def test_row_49_the_policy_would_stop_what_slips_through(server):
    _, headers, page = ask(server, "/")
    policy = dict(p.split(" ", 1) for p in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == "'none'"
    assert b"demo" not in page  # nothing of a run is in the page itself


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.faults
@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is on the PATH")
def test_row_49_in_a_browser_all_of_it_is_text(server, tmp_path):
    """The page as Chromium has it after some seconds: nothing of the texts became an element."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    url = f"http://127.0.0.1:{server.port}/"
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    elements = Elements()
    elements.feed(done.stdout)
    tags = [tag for tag, _ in elements.found]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and title[1].startswith("2/100 "), done.stderr[-2000:]
    assert tags.count("canvas") == 3 and tags.count("pre") >= 32
    assert tags.count("script") == 2 and not {"img", "iframe", "object", "style"} & set(tags)
    assert not [name for _, named in elements.found for name in named if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in done.stdout


class Elements(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# ----------------------------------------------------------------------------- 50: the network


def test_row_50_the_page_is_served_to_this_machine_alone(hostile):
    """By default: the socket itself is bound to 127.0.0.1, whatever a firewall may let in."""
    made = bind(Watch([hostile]), "127.0.0.1", 0)
    assert made.socket.getsockname()[0] == "127.0.0.1"
    made.server_close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "192.168.0.7", ""])
def test_row_50_a_rebound_name_reads_nothing(server, host):
    for path in ("/", "/data", "/monitor.js"):
        status, _, body = ask(server, path, Host=host)
        assert status == 421 and len(body) < 200


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS"])
def test_row_50_another_origin_can_neither_write_nor_read(server, method):
    origin = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert ask(server, "/data", method, **origin)[0] == 405
    status, headers, body = ask(server, "/data", **origin)
    assert status == 403 and b"runs" not in body
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/config.yaml", "/data/../status.json", "/config.yaml"]
)
def test_row_50_no_path_leads_to_a_file(server, path):
    assert ask(server, path)[0] == 404


def test_row_50_to_the_network_only_with_a_warning_and_a_token(hostile):
    lines = []

    def stop(url):
        lines.append(url)
        raise KeyboardInterrupt

    serve([hostile], host="0.0.0.0", port=0, say=lines.append, opened=stop)
    assert "warning: --host 0.0.0.0" in lines[0] and re.search(r"\?token=[\w-]{20,}", lines[1])
    made = bind(Watch([hostile]), "127.0.0.1", 0, token="secret")
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        assert [ask(made, path)[0] for path in ("/", "/data", "/?token=x")] == [403] * 3
        assert ask(made, "/?token=secret")[0] == 303
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


# ------------------------------------------------------------------ 51: files that are torn


def steps(follower):
    follower.advance(time.monotonic() + 30.0)
    return {found["step"] for found in follower.rows}


@pytest.mark.parametrize("name", GARBAGE)
def test_row_51_the_monitor_skips_garbage_that_comes_while_it_looks(tmp_path, name):
    run = make_run(tmp_path / "run", [row(1), row(2)])
    follower = Follower(run)
    assert steps(follower) == {1, 2}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{GARBAGE[name]}\n{lines([row(9)])}")
    assert steps(follower) - {7} == {1, 2, 9}
    json.dumps(snapshot([follower], time.time()), allow_nan=False)


@pytest.mark.parametrize("rotated", [False, True])
def test_row_51_the_monitor_follows_a_file_that_is_rotated_or_deleted(tmp_path, rotated):
    run = make_run(tmp_path / "run", [row(1), row(2)])
    follower = Follower(run)
    assert steps(follower) == {1, 2}
    path = run / "metrics.jsonl"
    path.rename(run / "metrics.jsonl.1") if rotated else path.unlink()
    assert steps(follower) == set()
    path.write_text(lines([row(3), row(4), row(5)]))
    assert steps(follower) == {3, 4, 5}


READER = """
import json, sys, time
from pathlib import Path
from gspo_jax.view.follow import Follower
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 2**10
before, began = peak(), time.process_time()
follower = Follower(Path(sys.argv[1]))
while not follower.recent or follower.behind:
    follower.advance(time.monotonic() + 1)
rows = follower.rows
print(json.dumps([len(rows), rows[0]["step"], rows[-1]["step"], peak() - before,
                  time.process_time() - began]))
"""


@pytest.mark.parametrize("count", [5000, pytest.param(10**6, marks=pytest.mark.faults)])
def test_row_51_the_monitor_follows_a_million_steps_in_bounded_memory(tmp_path, count):
    """Of rows of half a kilobyte it holds some thousand, and of those a few numbers."""
    many_rows(tmp_path / "metrics.jsonl", count)
    done = python(READER, tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    held, first, last, grown, seconds = json.loads(done.stdout)
    assert 500 <= held <= 2002 and (first, last) == (1, count)
    assert grown < 20, grown  # MB
    assert seconds < 30 + count / 5000  # of this process alone
