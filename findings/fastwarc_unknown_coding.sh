#!/usr/bin/env bash
# fastwarc 2.0.1: one response that says `Content-Encoding: none` (or utf-8, or gzip over a body that the crawler has
# decoded already) makes every later record of the archive unreadable, also for a caller who catches the error.
#
# Guessed: parse_http raises for that record, and the iterator goes on at the next one.
# Seen: parse_http raises OSError("Unsupported Transfer-Encoding: none"), and the next step of the iterator raises
# OSError("No reader set"); three whole records give one page. With parse_http=True in the iterator it is the same.
#   none   read 1 of 3: OSError('Unsupported Transfer-Encoding: none'), then OSError('No reader set')
#   gzip   read 1 of 3: OSError('Gzip decompression error: data error'), then the same again
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fastwarc==2.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io

from fastwarc.warc import ArchiveIterator, WarcRecordType


def record(number, header=""):
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{header}\r\n<p>page {number}</p>".encode()
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/{number}\r\n"
        "WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n"
    )
    return head.encode() + http + b"\r\n\r\n"


changed = False
for coding in ("none", "gzip"):
    archive = record(1) + record(2, f"Content-Encoding: {coding}\r\n") + record(3)
    pages, errors = [], []
    try:
        for entry in ArchiveIterator(io.BytesIO(archive), record_types=WarcRecordType.response, parse_http=False):
            try:
                entry.parse_http(auto_decode="all")
                pages.append(entry.reader.read())
            except OSError as error:
                errors.append(error)
    except OSError as error:
        errors.append(error)
    print(f"{coding:6} read {len(pages)} of 3: {', then '.join(map(repr, errors))}")
    changed |= len(pages) != 1 or len(errors) != 2
raise SystemExit(changed)
PYTHON
