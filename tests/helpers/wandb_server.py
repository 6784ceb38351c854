"""As much of a wandb server as the real client needs to push runs: who asks, which projects and runs there are, rows of
a run's history by their place, views."""

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "e", "name": "us"}


class WandbServer:
    """rows: run id -> its rows in order. has_rows: set when the first have come. views: those that were saved, each as
    the variables of its mutation."""

    def __init__(self, projects: tuple[str, ...] = ()):
        self.projects = list(projects)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.has_rows = threading.Event()
        self.views: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Its address."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Rows are written to the places that the client names."""
        for name, chunk in files.items():
            if name == "wandb-history.jsonl":
                self.rows[run][chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
                self.has_rows.set()

    def answer(self, question: str, asked: dict[str, Any]) -> dict[str, Any]:
        match question:
            case "Viewer":
                teams = {"edges": [{"node": {"name": "us"}}]}
                return {"viewer": {"id": "u", "entity": "us", "username": "me", "flags": "{}", "teams": teams}}
            case "GetDefaultEntity":
                return {"viewer": {"id": "u", "entity": "us"}}
            case "GetProjects":
                page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                return {"models": {"pageInfo": page, "edges": [{"node": _project(name)} for name in self.projects]}}
            case "RunResumeStatus":
                return {"model": {"id": "m", "name": asked["project"], "entity": ENTITY, "bucket": self._bucket(asked)}}
            case "UpsertBucket":
                project = {"id": "p", "name": asked["project"], "entity": ENTITY}
                inserted = asked["name"] not in self.rows
                self.rows.setdefault(asked["name"], [])
                bucket = self._bucket(asked) | {"description": "", "sweepName": None, "project": project}
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "CreateRunFiles":
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
            case "UpsertView2":
                self.views.append(asked)
                return {"upsertView": {"view": {"id": "v", "name": asked["name"]}, "inserted": True}}
        return {}

    def _bucket(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        if (rows := self.rows.get(asked["name"])) is None:
            return None
        empty = {"summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}', "displayName": "run"}
        counts = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "historyLineCount": len(rows)}
        tail = json.dumps([json.dumps(row) for row in rows[-1:]])
        return {"id": "b", "name": asked["name"], "historyTail": tail} | empty | counts


def _project(name: str) -> dict[str, Any]:
    made = {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
    return {"__typename": "Project", "id": "p", "name": name, "entityName": "us"} | made


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            found: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                asked = json.loads(content)
                question = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
                found = {"data": server.answer(question, asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(content).get("files", {}))
            answer = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_GET = do_POST

    return Handler
