"""The audit page's web server: http.server on loopback, serving only `Audit`.

Protection against other pages in the same browser: every request must name this machine in Host (DNS rebinding), may
not come from another site, and needs the session's token in a header, which only a page of this origin can read; a POST
also needs a matching Origin. Documents are sent as JSON and never as markup.
"""

import contextlib
import hmac
import ipaddress
import json
import secrets
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from data_pipeline.audit.app import Audit, Refused
from data_pipeline.errors import InputError

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {"/": "judge.html", "/summary": "summary.html"} | {
    f"/{name}": name for name in ("style.css", "common.js", "text.js", "judge.js", "summary.js", "icon.svg")
}
LONGEST_BODY = 64 * 1024
MOST_CONNECTIONS = 64  # concurrent connections, a thread each
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class AuditServer(ThreadingHTTPServer):
    """Serves `audit` on host and port. token: required in the page's URL; None requires none, on loopback only.

    Above MOST_CONNECTIONS, the longest idle connection is closed; if none is idle, the new one.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, audit: Audit, host: str, port: int, token: str | None):
        """Raises InputError naming the setting when host and port cannot be bound."""
        self.audit = audit
        self._connections: dict[socket.socket, bool] = {}  # connection -> is busy; oldest request first
        self._lock = threading.Lock()
        self.host = host.strip("[]")
        self.token = token or (None if is_loopback(host) else secrets.token_urlsafe(24))
        if ":" in self.host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((self.host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"host={host} port={port}: cannot listen there: {reason}") from None

    def process_request(self, request: socket.socket, client_address) -> None:
        with self._lock:
            full = len(self._connections) >= MOST_CONNECTIONS
            oldest = next((c for c, answering in self._connections.items() if not answering), None)
            if full and oldest is not None:
                del self._connections[oldest]
                with contextlib.suppress(OSError):  # the client closed it first
                    oldest.shutdown(socket.SHUT_RDWR)  # ends the connection's thread
            if not full or oldest is not None:
                self._connections[request] = False
                return super().process_request(request, client_address)
        return self.shutdown_request(request)

    def shutdown_request(self, request: socket.socket) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def mark(self, request: socket.socket, *, answering: bool) -> None:
        """Marks a connection as busy with a request, or as idle."""
        with self._lock:
            if request in self._connections:
                del self._connections[request]
                self._connections[request] = answering

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        if self.host in ("0.0.0.0", "::"):
            name = socket.gethostname()
        query = f"?token={self.token}" if self.token else ""
        return f"http://{name}:{self.server_address[1]}/{query}"

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine. Ports are not compared, because an ssh tunnel may change them. A
        page that rebinds its DNS name to this address still sends its own name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in (self.host.lower(), "localhost") or is_loopback(name):
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())

    def handle_error(self, request, client_address) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"audit: {type(error).__name__}: {error}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "audit"
    sys_version = ""
    timeout = 60
    server: AuditServer

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_POST(self) -> None:
        self._serve(self._post)

    def log_message(self, format: str, *values) -> None:
        """Does nothing: no log line per request."""

    def _serve(self, respond) -> None:
        self.server.mark(self.connection, answering=True)
        try:
            self._answer(respond)
        finally:
            self.server.mark(self.connection, answering=False)

    def _answer(self, respond) -> None:
        try:
            self._check_origin()
            respond(urlsplit(self.path))
        except Refused as refused:
            self.close_connection = True  # else an unread body would be parsed as the next request
            self._json({"error": str(refused)}, refused.status)
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self.close_connection = True
            self._json({"error": f"{error.filename or ''}: {error.strerror or error}"}, 500)

    def _check_origin(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refused(403, f"Host {', '.join(hosts)!r} is not this server")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            # A link from another site may open the page, but request nothing else.
            if self.command == "GET" and self.headers.get("Sec-Fetch-Mode") == "navigate":
                return
            raise Refused(403, "a request from another site")
        if (origin := self.headers.get("Origin")) is not None and not self._is_own(origin):
            raise Refused(403, f"Origin {origin!r} is not this server")

    def _is_own(self, origin: str) -> bool:
        scheme, _, place = origin.partition("://")
        return scheme in ("http", "https") and place == self.headers["Host"]

    def _get(self, url) -> None:
        query = parse_qs(url.query)
        if url.path in FILES:
            if FILES[url.path].endswith(".html"):
                self._check_url_token(query)
            return self._file(PAGE / FILES[url.path])
        if url.path == "/api/session":
            self._check_url_token(query)
            return self._json(self.server.audit.session())
        self._check_token()
        if url.path == "/api/document":
            position, start = _number(query, "position"), _number(query, "start")
            return self._json(self.server.audit.document(position, start, query.get("reveal") == ["1"]))
        if url.path == "/api/summary":
            return self._json(self.server.audit.summary())
        raise Refused(404, f"{url.path}: there is nothing here")

    def _post(self, url) -> None:
        if url.path != "/api/answers":
            raise Refused(404, f"{url.path}: there is nothing here")
        if self.headers.get("Origin") is None:
            raise Refused(403, "a POST needs its Origin")
        self._check_token()
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "an answer is application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refused(411, "a POST needs its Content-Length")
        if len(length) > 9 or int(length) > LONGEST_BODY:
            raise Refused(413, f"{length} bytes are more than an answer's {LONGEST_BODY}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "not JSON") from None
        self._json(self.server.audit.answer(body))

    def _check_url_token(self, query: dict[str, list[str]]) -> None:
        wanted, given = self.server.token, query.get("token", [""])[0]
        if wanted and not hmac.compare_digest(wanted.encode(), given.encode("utf-8", "replace")):
            raise Refused(403, "the URL lacks its token: open the one that was printed at start")

    def _check_token(self) -> None:
        given = self.headers.get("X-Audit-Token", "")
        if not hmac.compare_digest(self.server.audit.token.encode(), given.encode("utf-8", "replace")):
            raise Refused(401, "this page's session is over: reload it")

    def _file(self, path: Path) -> None:
        self._send(path.read_bytes(), f"{TYPES[path.suffix]}; charset=utf-8", 200)

    def _json(self, data: dict, status: int = 200) -> None:
        self._send(json.dumps(data).encode(), "application/json; charset=utf-8", status)

    def _send(self, data: bytes, kind: str, status: int) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


def _number(query: dict[str, list[str]], name: str) -> int:
    text = query.get(name, ["0"])[0]
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise Refused(400, f"{name}={text!r} is no number")
    return int(text)
