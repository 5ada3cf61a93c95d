"""The page's server answers this machine's browsers alone, with a fixed table of pages."""

import hashlib
import http.client
import json
import re
import socket
import threading
from contextlib import contextmanager

import pytest
from monitor_cases import append, make_run, measured, row

from gspo_jax.errors import ConfigError
from gspo_jax.view.follow import Watch
from gspo_jax.view.monitor import ASSETS, FILES, Server, address, bind, is_local, is_loopback, serve


@contextmanager
def serving(*runs, token=""):
    server = bind(Watch(list(runs)), "127.0.0.1", 0, token=token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo", [row(1), row(2, **measured(0.5))])


@pytest.fixture(scope="module")
def server(run):
    with serving(run) as made:
        yield made


def ask(server, path="/data", method="GET", body=None, **headers):
    """Status, headers and body; `host` and the like as keywords."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body=body, headers=named)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


# ------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("path", FILES)
def test_every_page_comes_with_its_kind_and_a_policy(server, path):
    status, headers, body = ask(server, path)
    assert status == 200 and body == (ASSETS / FILES[path][0]).read_bytes()
    assert headers["Content-Type"] == FILES[path][1]
    policy = headers["Content-Security-Policy"]
    for part in (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
    ):
        assert part in policy.split("; ")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_page_asks_for_nothing_but_what_is_served():
    text = (ASSETS / "index.html").read_text()
    asked = set(re.findall(r'(?:src|href)="(/[^"]*)"', text))
    assert asked and asked < set(FILES)
    script = (ASSETS / "monitor.js").read_text()
    assert set(re.findall(r'fetch\("([^"]*)"', script)) == {"/data"}
    assert "http" not in re.sub(r"//.*", "", text + script)
    assert not re.search(r"<script[^>]*>[^<]|<style|\sstyle=|\son\w+=", text)


@pytest.mark.parametrize(
    "word",
    [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
        "setHTML",
        "DOMParser",
        "createContextualFragment",
        "javascript:",
    ],
)
def test_the_page_has_no_way_to_take_text_for_markup_or_code(word):
    for path in ASSETS.glob("*.js"):
        assert word not in path.read_text(), path.name


def test_the_chart_library_is_as_its_author_released_it():
    """uPlot 1.6.32 from the npm registry, with its licence."""
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in ASSETS.glob("uPlot*")}
    assert found == {
        "uPlot.LICENSE": "8f989229699b4fe2",
        "uPlot.iife.min.js": "4408ace91a18b488",
        "uPlot.min.css": "df630c6a8d6f8eea",
    }


def test_all_that_lies_in_the_folder_is_served_and_nothing_else_is():
    assert {path.name for path in ASSETS.iterdir()} == {name for name, _ in FILES.values()}


# ------------------------------------------------------------------------------------- data


def test_data_is_json_of_the_runs_and_follows_them(tmp_path):
    run = make_run(tmp_path / "demo", [row(1)])
    with serving(run) as server:
        status, headers, body = ask(server)
        (found,) = json.loads(body)["runs"]
        assert status == 200 and headers["Content-Type"] == "application/json"
        assert (found["name"], found["step"], found["of"]) == ("demo", 1, 100)
        append(run, row(2, reward=0.75))
        (found,) = json.loads(ask(server)[2])["runs"]
        assert found["step"] == 2 and found["y"]["reward"] == [0.251, 0.75]


def test_what_has_not_changed_is_not_sent_again(server):
    _, headers, body = ask(server)
    status, again, nothing = ask(server, If_None_Match=headers["ETag"])
    assert body and (status, again["ETag"], nothing) == (304, headers["ETag"], b"")


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST:8765", "[::1]:8765", "127.0.0.1:1"]
)
def test_this_machine_may_call_itself_by_its_own_names(server, host):
    assert ask(server, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil",
        "",
        "192.168.0.7:8765",
        "0.0.0.0",
        "[::]",
        "127.0.0.1:x",
        "::1",
        "[::1]evil",
        ":8765",
        "a:b:80",
    ],
)
def test_a_name_that_somebody_else_may_own_is_refused(server, host):
    """DNS rebinding: a page of evil.example, whose name now leads to 127.0.0.1."""
    status, _, body = ask(server, Host=host)
    assert status == 421 and b"runs" not in body
    assert not is_local(host)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"])
def test_nothing_but_get_is_answered(server, method):
    for path in ("/", "/data", "/nowhere"):
        status, headers, body = ask(
            server, path, method, body=b"x" * 5000, Origin="http://evil.example"
        )
        assert status == 405 and headers["Allow"] == "GET" and b"runs" not in body
    assert ask(server, method="HEAD")[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/monitor.js/../../monitor.py",
        "/assets/monitor/index.html",
        "/data/",
        "/data/../config.yaml",
        "/index.html",
        "/%00",
        "//etc/passwd",
        "/monitor.js%00.html",
        "/\\..\\..\\x",
    ],
)
def test_no_path_leads_anywhere_else(server, path):
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize(("mode", "status"), [("cors", 403), ("no-cors", 403), ("navigate", 200)])
def test_another_site_may_link_to_the_page_but_not_read_it(server, mode, status):
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Origin": "http://evil.example"}
        found, answered, _ = ask(server, **headers)
        assert found == status
        assert not [name for name in answered if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "request_line", [b"<script>alert(1)</script>", b"GET / HTTP/9.9", b"GET /" + b"a" * 70_000]
)
def test_a_malformed_request_gets_no_echo(server, request_line):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(request_line + b" x x\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert 0 < len(answer) < 2000
    assert b"script>" not in answer and b"aaaa" not in answer


# ------------------------------------------------------------------------------------- token


def test_served_to_a_network_every_request_must_know_the_token(run):
    with serving(run, token="right") as server:
        for path in ("/", "/data", "/monitor.js", "/nowhere", "/?token=", "/?token=wrong"):
            status, headers, body = ask(server, path, Host="box.example:8765")
            assert status == 403 and b"token" in body and "Set-Cookie" not in headers
        status, headers, _ = ask(server, "/?token=right", Host="box.example:8765")
        assert (status, headers["Location"]) == (303, "/")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
        name, value = cookie.split(";")[0].split("=")
        assert name == f"gspo_monitor_{server.port}"
        assert ask(server, Cookie=f"other=1; {name}={value}", Host="box.example")[0] == 200
        for wrong in (f"{name}=wrong", f"x{name}={value}", f"{name}", f"{name}=", "é=é"):
            assert ask(server, Cookie=wrong.encode(), Host="box.example")[0] == 403


def said(host, runs):
    """What `serve` tells before it is stopped."""
    lines = []

    def stop(url):
        lines.append(url)
        raise KeyboardInterrupt

    serve(runs, host=host, port=0, say=lines.append, opened=stop)
    return "\n".join(lines)


def test_the_network_comes_with_a_warning_and_a_new_token_each_time(run):
    one, two = said("0.0.0.0", [run]), said("0.0.0.0", [run])
    assert "warning: --host 0.0.0.0 serves to other machines" in one and "ssh -L" in one
    tokens = [re.search(r"token=([\w-]{20,})", text)[1] for text in (one, two)]
    assert tokens[0] != tokens[1]
    alone = said("127.0.0.1", [run])
    assert "warning" not in alone and "token" not in alone
    assert re.search(r"^http://127\.0\.0\.1:\d+/$", alone, re.MULTILINE)


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("box", False),
        ("", False),
    ],
)
def test_only_loopback_addresses_are_this_machine_alone(host, alone):
    assert is_loopback(host) == alone


# -------------------------------------------------------------------------------------- port


def test_a_port_that_is_taken_gives_the_next_and_says_so(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        lines = []

        def stop(url):
            raise KeyboardInterrupt

        serve([run], port=port, say=lines.append, opened=stop)
    found = int(re.search(r":(\d+)/", lines[1])[1])
    assert port < found <= port + 20
    assert lines[0] == f"port {port} is taken; this is {found} (--port chooses another)."


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "--port 65536: a port is 0"),
        ("127.0.0.1", -1, "--port -1: a port is 0"),
        ("203.0.113.7", 0, "--host 203.0.113.7: .*take 127.0.0.1"),  # nobody's, by RFC 5737
    ],
)
def test_what_cannot_be_served_is_one_line(run, host, port, message):
    with pytest.raises(ConfigError, match=message):
        bind(Watch([run]), host, port)


def test_addresses_can_be_typed():
    assert address("127.0.0.1", 8765) == "http://127.0.0.1:8765/"
    assert address("::1", 8765, "t") == "http://[::1]:8765/?token=t"
    assert address("0.0.0.0", 80).startswith(f"http://{socket.gethostname()}:80/")


def test_several_browsers_are_answered_at_once(server):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8 and isinstance(server, Server)
