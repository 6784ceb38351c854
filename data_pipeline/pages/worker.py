"""The extraction process: requests on stdin, answers on stdout (messages.py), until stdin ends.

Memory limit: MOST_GROWTH x max_document_bytes of growth.
"""

import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from resiliparse.extract.html2text import extract_plain_text

from data_pipeline.pages.encodings import decode_page
from data_pipeline.pages.messages import ANSWER, HEADER, REFUSED, TEXT
from data_pipeline.pages.structure import structure_problem

MOST_GROWTH = 4  # x max_document_bytes; the reader process holds one copy of the page more, two while it reads the page
ROOM = 64 << 20  # bytes of growth allowed in addition, for small max_document_bytes
PAGE_BYTES = resource.getpagesize()


def extract(data: bytes, label: str | None, most_bytes: int) -> tuple[int, str]:
    """(TEXT, main content) of a page, or (REFUSED, reason and detail). Navigation, scripts, forms and footers are
    removed; preformatted text, lists and line breaks stay."""
    html = decode_page(data, label)
    size = len(data)
    del data
    if not html.strip("\ufffd \t\r\n"):
        return REFUSED, f"undecodable\nno character of {size} bytes can be read as {label or 'its encoding'}"
    if problem := structure_problem(html, most_bytes):
        return REFUSED, "\n".join(problem)
    text = extract_plain_text(html, main_content=True, preserve_formatting=True, list_bullets=True, alt_texts=False)
    if not (text := text.strip()):
        return REFUSED, f"empty\na page without content, {size} bytes"
    return TEXT, text + "\n"


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until the end of `requests`."""
    base = _memory()
    while header := requests.read(HEADER.size):
        label_bytes, page_bytes, most_bytes = HEADER.unpack(header)
        label = requests.read(label_bytes).decode() or None
        _bound_memory(base, MOST_GROWTH * most_bytes + ROOM)
        try:
            kind, answer = extract(requests.read(page_bytes), label, most_bytes)
        except MemoryError:
            detail = f"more than {MOST_GROWTH} x max_document_bytes={most_bytes} of memory for {page_bytes} bytes"
            kind, answer = REFUSED, f"too_costly\n{detail}"
        except Exception as error:  # from the extractor, on unexpected markup
            kind, answer = REFUSED, f"reader_error\n{type(error).__name__}: {' '.join(str(error).split())}"
        payload = answer.encode("utf-8", "replace")
        answers.write(ANSWER.pack(kind, len(payload)))
        answers.write(payload)
        answers.flush()


def _memory() -> int:
    """Bytes of address space of this process; 0 where unknown."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[0]) * PAGE_BYTES if path.exists() else 0


def _bound_memory(base: int, growth: int) -> None:
    if base:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = base + growth
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which closes stdin
    serve(sys.stdin.buffer, sys.stdout.buffer)
