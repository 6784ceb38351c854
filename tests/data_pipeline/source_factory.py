"""Pages and records to make sources of, and what a task of the pipeline reads of sources."""

import json

from pydantic import TypeAdapter

from data_pipeline.readers import ReadSources
from data_pipeline.sources import AnySource

PAGE = """<!DOCTYPE html><html><head><title>Head</title><script>var hidden = 1;</script></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav><main><h1>Pears</h1>
<p>The pear tree in the <b>garden</b> bears fruit &amp; shade, every year, to those who sit under it.</p>
<pre>def eat(pear):
    return None</pre><ul><li>sweet</li><li>sour</li></ul></main>
<footer>Imprint and cookies</footer></body></html>"""


def warc_record(kind, body, uri="http://pears.example/"):
    form = "application/http; msgtype=response" if kind == "response" else "text/plain"
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {uri}\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: {form}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(body, content_type):
    return b"HTTP/1.1 200 OK\r\nContent-Type: " + content_type.encode() + b"\r\n\r\n" + body


def source(path, **options):
    return TypeAdapter(AnySource).validate_python({"path": str(path), **options})


def read(tmp_path, **sources):
    """Documents {id: (text, metadata)} and quarantine {id: reason} of one task."""
    step = ReadSources(sources, tmp_path / "quarantine")
    documents = {document.id: (document.text, document.metadata) for document in step.run()}
    records = [
        json.loads(line)
        for path in (tmp_path / "quarantine").glob("*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    assert all(set(record) == {"id", "source", "bytes", "reason", "detail"} for record in records)
    return documents, {record["id"]: record["reason"] for record in records}
