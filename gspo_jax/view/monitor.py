"""The live page of runs: a small server for this machine alone, from their files. No JAX.

    gspo-jax monitor RUN... [--port 8765] [--host 127.0.0.1]

It answers GET on a fixed table of paths, to requests that name this machine as their host; so a
page elsewhere can neither read it (no CORS, checked Host) nor make it do anything (nothing to do).
Served to other machines it wants a token that only its terminal has shown.
"""

import errno
import hashlib
import ipaddress
import json
import secrets
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from gspo_jax.errors import ConfigError
from gspo_jax.view.follow import Watch
from gspo_jax.view.snapshot import snapshot

ASSETS = Path(__file__).parents[1] / "assets" / "monitor"
FILES = {  # all that can be asked for, besides /data
    "/": ("index.html", "text/html; charset=utf-8"),
    "/monitor.js": ("monitor.js", "text/javascript; charset=utf-8"),
    "/monitor.css": ("monitor.css", "text/css; charset=utf-8"),
    "/uPlot.iife.min.js": ("uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uPlot.min.css": ("uPlot.min.css", "text/css; charset=utf-8"),
    "/uPlot.LICENSE": ("uPlot.LICENSE", "text/plain; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PORTS_TRIED = 20
DRAINED = 2**16  # bytes of a refused request's body


class Server(ThreadingHTTPServer):
    """Serves a Watch until `shutdown`; each request in a thread of its own.

    Args:
        token: to be shown by every request, in its address or as a cookie; "" for none, and then
            only requests to this machine's own names are answered.
    """

    daemon_threads = True

    def __init__(self, watch: Watch, host: str, port: int, *, token: str = ""):
        self.watch, self.token, self.lock = watch, token, Lock()
        self.files = {path: (ASSETS / name).read_bytes() for path, (name, _) in FILES.items()}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the network for our name

    @property
    def port(self) -> int:
        return self.socket.getsockname()[1]

    def data(self) -> bytes:
        """The runs as they stand, as JSON in ASCII."""
        with self.lock:
            found = snapshot(self.watch.look(), time.time())
        return json.dumps(found, allow_nan=False, separators=(",", ":")).encode("ascii")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line for what is our fault; a browser that left is nobody's."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"gspo-jax monitor: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "gspo-jax", ""
    timeout = 10  # seconds for a request to arrive

    @property
    def page(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._drain()
            self._say(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET is answered here.", Allow="GET")
            return False
        return True

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if refusal := self._refusal(query):
            self._say(*refusal)
        elif self.page.token and "token=" in query:
            # Into a cookie, and out of the address: that is seen, kept and passed on.
            cookie = f"{self._cookie()}={self.page.token}; HttpOnly; SameSite=Lax; Path=/"
            self._say(HTTPStatus.SEE_OTHER, "", Location="/", **{"Set-Cookie": cookie})
        elif path == "/data":
            self._send_data()
        elif path in FILES:
            self._send(HTTPStatus.OK, self.page.files[path], FILES[path][1])
        else:
            self._say(HTTPStatus.NOT_FOUND, "There is no such page; the monitor is at /.")

    def _send_data(self) -> None:
        body = self.page.data()
        tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", "application/json", ETag=tag)
        else:
            self._send(HTTPStatus.OK, body, "application/json", ETag=tag)

    def _refusal(self, query: str) -> tuple[HTTPStatus, str] | None:
        if self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site") and (
            self.headers.get("Sec-Fetch-Mode") != "navigate"
        ):
            return HTTPStatus.FORBIDDEN, "Asked for by another site."
        if not self.page.token:
            if is_local(self.headers.get("Host", "")):
                return None
            return HTTPStatus.MISDIRECTED_REQUEST, (
                "Answers only as localhost or 127.0.0.1; for other names start it with --host."
            )
        known = self.page.token.encode()
        if any(secrets.compare_digest(given.encode(), known) for given in self._given(query)):
            return None
        return HTTPStatus.FORBIDDEN, (
            "Open the address with ?token=... that gspo-jax monitor has printed."
        )

    def _given(self, query: str) -> list[str]:
        """The tokens that a request shows."""
        cookies = self.headers.get("Cookie", "").split(";")
        pairs = [("token", part) for part in query.split("&")]
        pairs += [(self._cookie(), part.strip()) for part in cookies]
        return [part.removeprefix(f"{n}=") for n, part in pairs if part.startswith(f"{n}=")]

    def _cookie(self) -> str:
        return f"gspo_monitor_{self.page.port}"  # cookies do not tell ports apart

    def _drain(self) -> None:
        """Read what a refused request brought, or the refusal would not arrive."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal():
            self.rfile.read(min(int(length[:9]), DRAINED))

    def _say(self, status: HTTPStatus, text: str, **headers: str) -> None:
        self._send(status, f"{text}\n".encode(), "text/plain; charset=utf-8", **headers)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Of malformed requests; without repeating any of what was sent."""
        self._say(HTTPStatus(code), HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def serve(
    runs: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    say: Callable[[str], None] = print,
    opened: Callable[[str], Any] | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        port: or the next free one; 0 for any.
        say: told the address, and what else the user must know.
        opened: called with the address once it answers, as `webbrowser.open`.

    Raises:
        ConfigError: no port is free, or the host is not this machine's.
        DataError: a run does not exist.
    """
    token = "" if is_loopback(host) else secrets.token_urlsafe(16)
    server = bind(Watch(runs), host, port, token=token)
    if port and server.port != port:
        say(f"port {port} is taken; this is {server.port} (--port chooses another).")
    if token:
        say(
            f"warning: --host {host} serves to other machines, unencrypted: whoever has the "
            "address with its token can read prompts, completions and settings. "
            f"An SSH tunnel is safer: ssh -L {server.port}:127.0.0.1:{server.port} MACHINE"
        )
    url = address(host, server.port, token)
    say(f"monitor: {url}   (Ctrl-C ends it; the runs do not mind)")
    try:
        if opened:
            opened(url)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        say("")
    finally:
        server.server_close()


def bind(watch: Watch, host: str, port: int, *, token: str = "") -> Server:
    """A server on the port, or on the next that is free."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: a port is 0 (any) to 65535.")
    candidates = range(port, min(port + PORTS_TRIED, 2**16))
    for candidate in candidates:
        try:
            return Server(watch, host, candidate, token=token)
        except PermissionError:
            raise ConfigError(f"--port {candidate}: not allowed here; take 1024 or more.") from None
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise ConfigError(
                    f"--host {host}: {error}; take 127.0.0.1, or 0.0.0.0 for all of this machine's."
                ) from None
    raise ConfigError(f"ports {port} to {candidates[-1]} are all taken; choose another by --port.")


def address(host: str, port: int, token: str = "") -> str:
    """What to type into a browser."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/{f'?token={token}' if token else ''}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(host: str) -> bool:
    """Whether a Host header names this machine by a name that nobody else's page can have.

    The port may be another: that of an SSH tunnel.
    """
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if not name:
        name, port = port, ""
    if port and not (port.isascii() and port.isdecimal() and len(port) <= 5):
        return False
    if name.startswith("[") and name.endswith("]"):
        return name == "[::1]"
    return ":" not in name and is_loopback(name.lower())
