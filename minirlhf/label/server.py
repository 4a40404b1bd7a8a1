"""The labeling page over HTTP, for browsers on this machine alone.

Six routes and nothing else; no path of a request reaches the disk. What is asked for must name this server as its Host
(against DNS rebinding), come from its own page (Origin) and know the token of the start address. Requests that are not
understood are the client's fault: no answer is a 5xx, but for a full disk.
"""

import contextlib
import hmac
import json
import secrets
import socket
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from minirlhf.label.store import MAX_MS, Item, Rankings, check_ranks

MAX_BODY = 1 << 20  # bytes
DRAINED = 64 << 20  # bytes of a refused body that are read, so that the refusal arrives
MAX_THREADS = 32
SECONDS = 5.0  # of silence before a connection is given up
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


class Server(ThreadingHTTPServer):
    """Bounded threads, and what the handler needs."""

    daemon_threads = True

    def __init__(self, host: str, port: int, rankings: Rankings) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MAX_THREADS)
        super().__init__((host, port), Handler)
        self.rankings = rankings
        self.token = secrets.token_hex(16)
        self.cookie = f"label_{self.server_port}"  # cookies do not tell ports apart
        name = f"[{host}]" if ":" in host else host
        self.hosts = {f"{h}:{self.server_port}" for h in (name, "127.0.0.1", "localhost")}
        self.url = f"http://{name}:{self.server_port}/?token={self.token}"
        folder = resources.files("minirlhf.label")
        self.pages = {route: ((folder / file).read_bytes(), kind) for route, (file, kind) in PAGES.items()}

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread, once one is free."""
        self._free.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """And the next may have it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no errors."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = SECONDS
    server_version, sys_version = "minirlhf", ""

    def do_GET(self) -> None:
        """A page, or the next task."""
        self._respond(self._get)

    def do_POST(self) -> None:
        """A judgement."""
        self._respond(self._post)

    def _respond(self, route: Any) -> None:
        path, _, query = self.path.partition("?")
        try:
            fields = urllib.parse.parse_qs(query, errors="replace")
            self._admit(fields)
            self._send(200, *route(path, fields))
        except Refused as e:
            self.send_error(e.code, str(e))

    # ---- who may ask ----

    def _admit(self, fields: dict[str, list[str]]) -> None:
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refused(403, "wrong Host")
        if origins and origins != [f"http://{hosts[0]}"]:
            raise Refused(403, "wrong Origin")
        given = [*fields.get("token", []), *self.headers.get_all("X-Token", []), *self._cookies()]
        token = self.server.token.encode()
        if not any(hmac.compare_digest(one.encode(errors="replace"), token) for one in given):
            raise Refused(403, "wrong token; open the address that the program printed")

    def _cookies(self) -> list[str]:
        """Ours, whatever other pages of this machine have set beside it."""
        parts = ";".join(self.headers.get_all("Cookie", [])).split(";")
        named = (part.strip().partition("=") for part in parts)
        return [value for name, _, value in named if name == self.server.cookie]

    # ---- what is asked ----

    def _get(self, path: str, fields: dict[str, list[str]]) -> tuple[bytes, str]:
        if path in self.server.pages:
            return self.server.pages[path]
        if path != "/api/task":
            raise Refused(404, "no such page")
        rankings = self.server.rankings
        if "task" not in fields:
            return self._json(self._task(rankings.next()))
        if fields["task"][-1] not in rankings.items:
            raise Refused(404, "no such task")
        return self._json(self._task(rankings.items[fields["task"][-1]]))

    def _task(self, item: Item | None) -> dict[str, Any]:
        rankings = self.server.rankings
        label = rankings.latest.get(item.id, {}) if item else {}
        return {
            "task": item.id if item else None,
            "prompt": item.task.prompt if item else "",
            "responses": item.task.responses if item else [],
            "shown": item.shown if item else [],
            "ranks": label.get("ranks"),
            "flags": label.get("flags", []),
            "previous": rankings.before(item),
            "annotator": rankings.annotator,
            "done": rankings.done,
            "total": len(rankings.items),
        }

    def _post(self, path: str, fields: dict[str, list[str]]) -> tuple[bytes, str]:
        if path != "/api/rank":
            raise Refused(404, "no such page")
        body = self._body()
        try:
            label = json.loads(body.decode())
            item = self.server.rankings.items[label["task"]]
            ranks = check_ranks(label["ranks"], len(item.task.responses))
            ms, flags = label.get("ms", 0), label.get("flags", [])
            if type(ms) is not int or not 0 <= ms < MAX_MS or flags not in ([], ["flag"]):
                raise ValueError("ms must be milliseconds, flags [] or ['flag']")
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"malformed: {e}") from e
        except (KeyError, TypeError, AttributeError) as e:
            raise Refused(400, "malformed: an object with a known task and its ranks is needed") from e
        try:
            rev = self.server.rankings.save(item, ranks, ms=ms, flags=flags)
        except OSError as e:
            print(f"error: {self.server.rankings.path}: {e.strerror or e}", file=sys.stderr)  # noqa: T201
            raise Refused(507, "not saved: the disk refused it") from e
        return self._json({"task": item.id, "rev": rev, "done": self.server.rankings.done})

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise Refused(400, "malformed: one Content-Length is needed")
        if not (lengths[0].isascii() and lengths[0].isdigit()):
            raise Refused(400, "malformed: Content-Length is no number")
        if len(lengths[0]) > 18 or int(lengths[0]) > MAX_BODY:
            raise Refused(413, f"over {MAX_BODY} bytes")
        try:
            body = self.rfile.read(int(lengths[0]))
        except TimeoutError as e:
            raise Refused(400, "malformed: the body did not come") from e
        if len(body) < int(lengths[0]):
            raise Refused(400, "malformed: the body is shorter than its Content-Length")
        return body

    # ---- how it is answered ----

    def _json(self, value: dict[str, Any]) -> tuple[bytes, str]:
        return json.dumps(value, ensure_ascii=False).encode(), "application/json"

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if kind == "text/html":
            cookie = f"{self.server.cookie}={self.server.token}"
            self.send_header("Set-Cookie", f"{cookie}; HttpOnly; SameSite=Strict; Path=/")
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One line of text. Unknown methods and versions are the client's fault. A body that nobody read is thrown
        away, for a connection closed on unread data loses the answer."""
        code = {501: 404, 505: 400}.get(code, code)
        self._send(code, f"{message or code}\n".encode(errors="replace"), "text/plain")
        if self.command == "GET":
            return
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            left = DRAINED
            while left > 0 and (part := self.connection.recv(1 << 16)):
                left -= len(part)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        """Nothing: addresses hold the token."""
