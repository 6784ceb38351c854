"""What the audit page's server answers, and to whom it does not."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.audit.answers import AnswersFile
from data_pipeline.audit.app import PIECE, Audit
from data_pipeline.audit.samples import Samples
from data_pipeline.audit.server import FILES, LONGEST_BODY, AuditServer, is_loopback
from tests.data_pipeline.audit_factory import make_samples


class Client:
    """A page of the server's own origin, unless told otherwise."""

    def __init__(self, server: AuditServer):
        self.server = server
        self.place = f"127.0.0.1:{server.server_address[1]}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> tuple[int, dict, bytes]:
        """Headers are given with _ for -; None leaves one out."""
        own = {"Host": self.place, "X-Audit-Token": self.server.audit.token}
        if method == "POST":
            own |= {"Origin": f"http://{self.place}", "Content-Type": "application/json"}
            own |= {"Content-Length": str(len(body or b""))}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(self.place, timeout=10)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in own.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        found = response.status, dict(response.headers), response.read()
        connection.close()
        return found

    def get(self, path: str) -> dict:
        return json.loads(self.ask("GET", path)[2])

    def answer(self, sample: str, verdict: object = "keep", **headers: str | None) -> tuple[int, dict]:
        body = json.dumps({"sample": sample, "verdict": verdict, "seconds": 1.5}).encode()
        status, _, found = self.ask("POST", "/api/answers", body, **headers)
        return status, json.loads(found)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    servers = []

    def make(texts: list[str] | None = None, *, auditor: str = "ann", token: str | None = None, **more) -> Client:
        path = tmp_path / "s.jsonl"
        samples = Samples.load(path if path.exists() else make_samples(path, texts))
        audit = Audit(samples, AnswersFile(tmp_path / "a.jsonl"), auditor, **more)
        servers.append(server := AuditServer(audit, "127.0.0.1", 0, token))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return Client(server)

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def ids(client: Client) -> list[str]:
    return [sample.id for sample in client.server.audit.samples.entries]


def test_a_session_goes_on_at_the_first_open_document(serve):
    client = serve()
    first, second, *_ = ids(client)
    assert client.get("/api/session")["next"] == 0
    status, found = client.answer(first)
    assert (status, found["next"], found["answered"]) == (200, 1, 1)
    client.answer(second, "drop")
    again = serve()  # another process, or one after a kill
    assert {key: again.get("/api/session")[key] for key in ("next", "answered")} == {"next": 2, "answered": 2}
    assert serve(auditor="bob").get("/api/session")["next"] == 0


def test_the_verdict_is_hidden_until_the_answer_or_a_look(serve):
    client = serve()
    assert client.get("/api/document?position=0")["filter"] is None
    assert '"verdict": "drop"' not in json.dumps(client.get("/api/document?position=0"))
    client.answer(ids(client)[0])
    assert client.get("/api/document?position=0")["filter"]["verdict"] == "drop"
    assert client.get("/api/document?position=1&reveal=1")["filter"]["verdict"] == "keep"
    client.answer(ids(client)[1])
    client.answer(ids(client)[0], "drop")
    given = {answer.sample: answer.blind for answer in AnswersFile(client.server.audit.answers.path).all()}
    assert given == {ids(client)[0]: False, ids(client)[1]: False}
    shown = serve(show_verdict=True)
    assert shown.get("/api/document?position=2")["filter"]["low"] == 2.0


def test_long_texts_come_in_pieces(serve):
    text = "".join(chr(0x4E00 + place % 5000) for place in range(2 * PIECE + 5))
    client = serve([text])
    pieces, start = [], 0
    while start < len(text):
        found = client.get(f"/api/document?position=0&start={start}")
        pieces.append(found["text"])
        start = found["end"]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == PIECE


def test_many_answers_at_once_are_all_kept(serve):
    one, two = serve([f"text {number}" for number in range(60)]), None
    two = serve(auditor="bob")
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(client.answer, sample) for sample in ids(one) for client in (one, two)]
    assert {future.result()[0] for future in found} == {200}
    file = AnswersFile(one.server.audit.answers.path)
    assert len(file.of("ann")) == len(file.of("bob")) == 60
    assert not file.problems()


@pytest.mark.parametrize("path", [*FILES, "/api/session", "/api/summary", "/nothing"])
def test_every_response_is_locked_down(serve, path):
    _, headers, _ = serve().ask("GET", path)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8765"}, 403),
        ({"Host": "192.168.0.7:8765"}, 403),
        ({"Host": None}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"X_Audit_Token": None}, 401),
        ({"X_Audit_Token": "x" * 32}, 401),
        ({"X_Audit_Token": "\xe9"}, 401),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-5"}, 411),
        ({"Content_Length": str(LONGEST_BODY + 1)}, 413),
        ({"Content_Length": "9" * 30}, 413),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_post_from_elsewhere_or_of_another_form_is_refused(serve, headers, status):
    client = serve()
    refused, found = client.answer(ids(client)[0], **headers)
    assert refused == status
    assert found["error"]
    assert not client.server.audit.answers.path.exists()
    assert client.answer(ids(client)[0])[0] == 200


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:1", "LOCALHOST"])
def test_a_tunnel_may_change_the_port(serve, host):
    client = serve()
    assert client.answer(ids(client)[0], Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 60_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"sample": "nobody", "verdict": "keep"}', 404, "no such sample"),
        (b'{"sample": ["a"], "verdict": "keep"}', 404, "no such sample"),
        (b'{"sample": "ID", "verdict": "maybe"}', 400, "none of keep, drop, unsure"),
        (b'{"sample": "ID", "verdict": ["keep"]}', 400, "none of keep, drop, unsure"),
        (b'{"sample": "ID", "verdict": "keep", "seconds": NaN}', 400, "seconds"),
        (b'{"sample": "ID", "verdict": "keep", "seconds": true}', 400, "seconds"),
        (b'{"sample": "ID", "verdict": "keep", "note": 5}', 400, "note"),
    ],
)
def test_bad_answers_are_named(serve, body, status, complaint):
    client = serve()
    body = body.replace(b"ID", ids(client)[0].encode())
    refused, _, found = client.ask("POST", "/api/answers", body)
    assert refused == status
    assert complaint in json.loads(found)["error"]
    assert not client.server.audit.answers.path.exists()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/document?position=6", 404),
        ("/api/document?position=-1", 400),
        ("/api/document?position=0&start=99999999", 404),
        ("/../../etc/passwd", 404),
        ("/page/style.css", 404),
        ("//evil.example/", 404),
    ],
)
def test_paths_that_lead_nowhere(serve, path, status):
    assert serve().ask("GET", path)[0] == status


def test_reading_needs_the_session_too(serve):
    client = serve()
    for path in ("/api/document?position=0", "/api/summary"):
        assert client.ask("GET", path, X_Audit_Token=None)[0] == 401
        assert client.ask("GET", path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors")[0] == 403


def test_a_token_in_the_url_guards_the_page(serve):
    client = serve(token="a-secret-token")
    assert client.server.url.endswith("/?token=a-secret-token")
    for path in ("/", "/summary", "/api/session"):
        assert client.ask("GET", path)[0] == 403
        assert client.ask("GET", f"{path}?token=a-secret-tokem")[0] == 403
        assert client.ask("GET", f"{path}?token=a-secret-token")[0] == 200


def test_other_hosts_than_loopback_get_a_token(tmp_path):
    audit = Audit(Samples.load(make_samples(tmp_path / "s.jsonl")), AnswersFile(tmp_path / "a.jsonl"), "ann")
    server = AuditServer(audit, "0.0.0.0", 0, None)
    try:
        assert len(server.token) >= 32
        assert server.knows("10.1.2.3:80")
        assert not server.knows("evil.example")
    finally:
        server.server_close()
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_an_answer_that_cannot_be_saved_is_an_error(serve):
    client = serve()
    client.server.audit.answers.path = client.server.audit.answers.path.parent  # a folder
    status, found = client.answer(ids(client)[0])
    assert status >= 500
    assert found["error"]


def test_connections_are_bounded_and_silent_ones_give_way(serve, monkeypatch):
    """Five connections that say nothing, where three may be open: the page answers, and the first two are closed."""
    monkeypatch.setattr("data_pipeline.audit.server.MOST_CONNECTIONS", 3)
    client = serve()
    silent = [socket.create_connection(client.server.server_address[:2], timeout=10) for _ in range(5)]
    assert client.get("/api/session")["answered"] == 0
    assert silent[0].recv(1) == silent[1].recv(1) == b""
    assert len(client.server._connections) <= 3
    for connection in silent:
        connection.close()


def test_a_note_that_is_no_text_gets_an_answer(serve):
    client = serve()
    body = json.dumps({"sample": ids(client)[0], "verdict": "keep", "seconds": 1, "note": "a\ud800"}).encode()
    status, _, found = client.ask("POST", "/api/answers", body)
    assert status == 400
    assert "character 1 is an unpaired surrogate" in json.loads(found)["error"]


RAW = {
    "a URL that does not parse": b"GET //[ HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "a query that does not parse": b"GET /api/document?position=%ff&start=%zz&&&= HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "100 000 fields": b"GET /?" + b"a&" * 30_000 + b" HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "a line of a megabyte": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n",
    "10 000 headers": b"GET / HTTP/1.1\r\nHost: {host}\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: evil\r\n\r\n",
    "a host that does not parse": b"GET / HTTP/1.1\r\nHost: [::\r\n\r\n",
    "headers that are no text": b"GET / HTTP/1.1\r\nHost: {host}\r\nX-Audit-Token: \xff\xfe\r\nOrigin: \xff\r\n\r\n",
    "zeros": bytes(1000) + b"\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "a future version": b"GET / HTTP/9.9\r\nHost: {host}\r\n\r\n",
    "no version": b"GET /\r\n",
    "another method": b"PATCH / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    "a request inside another": b"GET /nothing HTTP/1.1\r\nHost: {host}\r\nContent-Length: 30\r\n\r\n"
    b"GET / HTTP/1.1\r\nHost: evil\r\n\r\n",
}


def test_bytes_that_are_no_request_of_a_page(serve, capfd):
    client = serve()
    for name, request in RAW.items():
        with socket.create_connection(client.server.server_address[:2], timeout=10) as connection:
            answer = b""
            with contextlib.suppress(OSError):  # the server has closed it with the rest unread
                connection.sendall(request.replace(b"{host}", client.place.encode()))
                connection.shutdown(socket.SHUT_WR)
                while piece := connection.recv(1 << 16):
                    answer += piece
        assert not answer or answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ", b"<!DOCTYPE", b'{"error": ')), name
        assert b"Traceback" not in answer, name
        assert "audit: " not in capfd.readouterr().err, name
        assert client.get("/api/session")["answered"] == 0, name


HOSTILE_BODIES = [
    b"",
    b"[" * 60_000,
    b'{"a":' * 12_000,
    b"\xff\xfe",
    b"null",
    b"9" * 60_000,
    b'{"sample": {}, "verdict": []}',
]


def test_bodies_that_are_no_answer(serve, capfd):
    client = serve()
    own = {"sample": ids(client)[0], "verdict": "keep", "seconds": 1e999, "note": ["a"]}
    for body in [*HOSTILE_BODIES, json.dumps(own).encode()]:
        status, _, found = client.ask("POST", "/api/answers", body)
        assert 400 <= status < 500
        assert "\n" not in json.loads(found)["error"]
    assert not capfd.readouterr().err
    assert client.get("/api/session")["answered"] == 0
