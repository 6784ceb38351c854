"""Measures what the bounds of docs/bounds.md cost where no test does: python -m tests.helpers.bounds (Linux).

Prints a row each: bytes by which the peak of memory grew, and seconds (readers: of wall time; others: of CPU time).
"""

import functools
import gzip
import json
import multiprocessing
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.audit.server import AuditServer
from data_pipeline.errors import InputError
from data_pipeline.files import read_object
from data_pipeline.redaction import lines_of
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.index import build_index
from data_pipeline.shards.remote import Remote
from data_pipeline.stream.score_filter import ScoreFilter
from tests.data_pipeline.source_factory import warc_record
from tests.helpers.peaks import costs_of_reading
from tests.test_hostile_files import TARS

MB = 1_000_000
RECORDS = {  # name -> (file, its content, settings of its source)
    "response of 1 GB of zeros in gzip": (
        "a.warc",
        lambda: warc_record("response", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + zeros(1000)),
        {"kind": "warc"},
    ),
    "record with 100 MB of headers": (
        "a.warc",
        lambda: warc_record("conversion", b"w", "name: some value\r\n" * (100 * MB // 18)),
        {"kind": "warc"},
    ),
    "100 MB of beginnings of records": (
        "a.warc",
        lambda: b"WARC/1.0\r\nno header\r\n" * (100 * MB // 21),
        {"kind": "warc"},
    ),
    "Parquet row group of 480 MB, max_row_group_bytes=400000000": (
        "a.parquet",
        lambda: rows(60, 8 * MB),
        {"kind": "parquet", "max_row_group_bytes": 400 * MB},
    ),
}


def zeros(megabytes: int) -> bytes:
    """A gzip file of zeros, in members of 100 MB."""
    return gzip.compress(bytes(100 * MB), 1) * (megabytes // 100)


def rows(count: int, size: int) -> bytes:
    import pyarrow
    from pyarrow import parquet

    texts = [bytes([65 + number % 26]) * size for number in range(count)]
    parquet.write_table(
        pyarrow.table({"text": texts}), sink := pyarrow.BufferOutputStream(), compression="zstd", use_dictionary=False
    )
    return sink.getvalue().to_pybytes()


def records(folder: Path) -> None:
    cases = []
    for number, (name, content, options) in enumerate(RECORDS.values()):
        for size, data in (("small", b"{}"), ("large", content())):
            (place := folder / str(number) / size).mkdir(parents=True)
            (place / name).write_bytes(data)
        cases.append((folder / str(number) / "small", folder / str(number) / "large", options))
    for (name, _), cost, (_, large, _) in zip(RECORDS.items(), costs_of_reading(*cases), cases, strict=True):
        reasons = [json.loads(line)["reason"] for file in (large / "quarantine").glob("*") for line in file.open()]
        show(name, f"{cost.documents} documents, {len(reasons)} x {sorted(set(reasons))}", cost.grown, cost.seconds)


def other(folder: Path) -> None:
    for name, content in TARS.items():
        if "metadata" in name or "headers" in name or "names" in name:
            (folder / "a.tar").write_bytes(content)
            measured(f"shard: {name}", functools.partial(build_index, folder / "a.tar", 2))
    (folder / "f.yaml").write_text("bands:\n" + "".join(f"  k{n:010d}: [0, 1]\n" for n in range(250 * 1024 // 23)))
    measured("filter of 250 KiB", lambda: ScoreFilter.load(str(folder / "f.yaml")))
    (folder / "a.json").write_bytes(b"[" * 100_000)
    measured("JSON of 100 000 brackets", lambda: read_object(folder / "a.json"))
    measured("100 000 problems of 100 kB", lambda: lines_of("x" * 100_000 for _ in range(100_000)))
    with Served(endless) as url:
        remote = functools.partial(Remote, url, Cache(folder / "cache", 100 * MB), attempts=1)
        measured(
            "download without end, of 10 MB in the manifest", lambda: remote().fetch("a.tar", size=10 * MB, sha256="0")
        )
    measured("audit: 2000 silent connections", functools.partial(silent_connections, 2000))


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


class Served:
    """A web server on loopback whose answers `answer` writes; its URL."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]):
        names = {"do_GET": lambda handler: answer(handler), "log_message": lambda *_: None}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (BaseHTTPRequestHandler,), names))
        self.server.handle_error = lambda *_: None

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_) -> None:
        self.server.shutdown()


def silent_connections(count: int) -> None:
    server = AuditServer(None, "127.0.0.1", 0, None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    held = [socket.create_connection(server.server_address[:2]) for _ in range(count)]
    asked = socket.create_connection(server.server_address[:2])
    asked.sendall(b"GET /style.css HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert asked.recv(100).startswith(b"HTTP/1.1 200")
    assert threading.active_count() < 100
    assert len(held) == count


def measured(name: str, work: Callable[[], object]) -> None:
    """Prints what `work` costs in a process of its own, and how it is refused."""
    pipe, there = multiprocessing.Pipe()

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, began, said = memory("VmRSS"), time.process_time(), "taken"
        try:
            work()
        except (InputError, ValueError, OSError) as error:
            said = f"{type(error).__name__}: {str(error)[:80]}"
        there.send((said, memory("VmHWM") - before, time.process_time() - began))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    show(name, *pipe.recv())
    process.join()


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def show(name: str, result: str, grown: int, seconds: float) -> None:
    print(f"{name:62} {grown / MB:8.1f} MB {seconds:7.2f} s  {result}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        records(Path(place))
        other(Path(place))
