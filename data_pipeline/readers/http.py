"""HTTP responses as crawlers store them: original headers, with a body that may already be decoded.

A coding named in the headers (chunked, gzip, ...) is decoded if the body begins accordingly. If the body is text, the
crawler has already decoded it; if it is neither, it is undecodable. A body that begins with the magic number of gzip or
zstd is decoded whatever the header names.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from zstandard import ZstdDecompressor, ZstdError

LONGEST_HEAD = 1 << 16  # bytes of a response's headers
HEAD_END = re.compile(rb"\r?\n\r?\n|\Z")
FOLDED = re.compile(rb"\r?\n[ \t]+")  # a header continued on the next line
STATUS = re.compile(rb"HTTP/\S*[ \t]+(\d{3})")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
LINE_END = re.compile(rb"\r?\n")
CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s;\"']+)", re.IGNORECASE)
# Beginnings that browsers sniff as HTML when the response has no type.
MARKUP = re.compile(
    rb"\s*<(?:!doctype html|!--|\?xml|"
    rb"(?:html|head|title|meta|body|script|style|iframe|h1|div|font|table|a|b|br|p)[\s>])",
    re.IGNORECASE,
)
BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
NO_TYPES = ("*/*", "unknown/unknown", "application/unknown")  # types for which browsers sniff the body
PAGES = ("text/html", "application/xhtml+xml")
LISTS = ("content-encoding", "transfer-encoding")  # headers whose repetitions make one list (RFC 9110, 5.3)
MEMBER = b"\x1f\x8b"  # magic number of a gzip member
FRAME = b"\x28\xb5\x2f\xfd"  # and of a zstd frame
GZIP, ZLIB, RAW = 31, 15, -15  # zlib's wbits
PIECE = 1 << 20  # compressed bytes per step, for libraries without an output limit
SNIFFED = 1024  # bytes of a body used for sniffing


class Undecodable(ValueError):
    """A body with damaged transfer or content coding."""


class TooLarge(ValueError):
    """A body that decodes to more bytes than allowed."""


@dataclass(frozen=True)
class Response:
    """`headers`: {lower-case name: first value; of LISTS, all values}; `body`: as stored, not decoded."""

    status: int
    headers: dict[str, str]
    body: bytearray

    @property
    def media_type(self) -> str:
        """Content-Type in lower case, without parameters; empty where there is none."""
        return media_type(self.headers.get("content-type", ""))

    @property
    def charset(self) -> str | None:
        return charset(self.headers.get("content-type", ""))

    def content(self, most: int) -> bytes | bytearray:
        """The body, with transfer and content codings decoded. Raises Undecodable, and TooLarge above `most` bytes."""
        data = self.body
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            data = _without_chunks(data)
        for coding in reversed(self.headers.get("content-encoding", "").lower().split(",")):
            if coding.strip():
                data = self._without_coding(coding.strip(), data, most)
        for magic, decode in MAGIC.items():
            if data.startswith(magic) and self.media_type in ("", *PAGES, "text/plain"):
                data = decode(data, most)
        if len(data) > most:
            raise TooLarge
        return data

    def _without_coding(self, name: str, data: bytes | bytearray, most: int) -> bytes | bytearray:
        """`data` decoded as its bytes say, and only then as `name` says; unchanged if it is text already."""
        for magic, decode in MAGIC.items():
            if data.startswith(magic):
                return decode(data, most)
        is_text = not is_binary(data) or (self.charset or "").lower().startswith("utf-16")
        zlib_header = len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2]) % 31 == 0
        try:
            if name in DEFLATED and (zlib_header or not is_text):  # zlib format, or raw deflate, as some servers send
                return _inflate(data, most, ZLIB if zlib_header else RAW)
            if name == "br" and not is_text:
                return _brotli(data, most)
        except Undecodable as error:
            if not is_text:
                raise Undecodable(f"Content-Encoding {name}: {error}") from None
        if not is_text:
            raise Undecodable(f"Content-Encoding {name}: the body is neither that nor text")
        return data


def parse_response(message: bytearray) -> Response | None:
    """Parses a message with CRLF or LF line ends; None if it is no response. The body is `message` itself, from which
    the headers are deleted, and interim responses (100 Continue, 103 Early Hints) before them."""
    while (status := STATUS.match(message)) and status[1].startswith(b"1"):
        end = HEAD_END.search(message, 0, LONGEST_HEAD).end()
        if not STATUS.match(message, end):
            break
        del status  # as below
        del message[:end]
    if not status:
        return None
    end = HEAD_END.search(message, 0, LONGEST_HEAD)
    headers: dict[str, str] = {}
    head = FOLDED.sub(b" ", message[status.end() : end.start()])
    for line in head.decode("latin-1").split("\n")[1:]:
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if colon and name in LISTS and name in headers:
            headers[name] += f", {value.strip()}"
        elif colon:
            headers.setdefault(name, value.strip())
    code, length = int(status[1]), end.end()
    del status, end  # a match object references `message`, which then cannot be resized
    del message[:length]
    return Response(code, headers, message)


def media_type(value: str) -> str:
    """The media type in a Content-Type: lower case, without parameters; empty where there is none."""
    found = re.split("[;,]", value)[0].strip().lower()
    return "" if "/" not in found or found in NO_TYPES else found


def charset(value: str) -> str | None:
    """The charset in a Content-Type, or None."""
    match = CHARSET.search(value)
    return match and match[1]


def sniff(data: bytes) -> str:
    """The media type of a body without one: HTML, plain text, or empty for anything else."""
    if MARKUP.match(data.removeprefix(b"\xef\xbb\xbf")[:SNIFFED]):
        return "text/html"
    return "" if is_binary(data) else "text/plain"


def is_binary(data: bytes) -> bool:
    """Whether the beginning of `data` has bytes that do not occur in text; UTF-16 with a byte-order mark is text."""
    return not data.startswith((b"\xff\xfe", b"\xfe\xff")) and bool(BINARY.search(data, 0, SNIFFED))


def _without_chunks(data: bytes) -> bytes:
    """A chunked body joined; a body that does not begin with a complete chunk is returned unchanged."""
    pieces, at = [], 0
    while size := CHUNK.match(data, at):
        end = size.end() + int(size[1], 16)
        if end == size.end():
            return b"".join(pieces)  # the last chunk; trailers are ignored
        line_end = LINE_END.match(data, end)
        if not line_end:
            break
        pieces.append(data[size.end() : end])
        at = line_end.end()
    if not pieces:
        return data
    if at == len(data):  # only the final empty chunk is missing
        return b"".join(pieces)
    raise Undecodable(f"chunked coding, damaged at byte {at} of {len(data)}")


def _inflate(data: bytes, most: int, wbits: int) -> bytes:
    """The decompressed members of `data`. Raises TooLarge above `most` bytes, Undecodable for damaged data."""
    pieces, size = [], 0
    while True:
        member = zlib.decompressobj(wbits)
        try:
            pieces.append(member.decompress(data, most + 1 - size))
        except zlib.error as error:
            raise Undecodable(str(error)) from None
        if (size := size + len(pieces[-1])) > most:
            raise TooLarge
        if not member.eof:
            raise Undecodable("the body ends inside its compressed data")
        data = member.unused_data
        if wbits != GZIP or not data.startswith(MEMBER):
            return b"".join(pieces)


def _gzip(data: bytes, most: int) -> bytes:
    return _inflate(data, most, GZIP)


def _zstd(data: bytes, most: int) -> bytes:
    pieces, size = [], 0
    try:
        with ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            while piece := reader.read(PIECE):
                pieces.append(piece)
                if (size := size + len(piece)) > most:
                    raise TooLarge
    except ZstdError as error:
        raise Undecodable(str(error)) from None
    return b"".join(pieces)


def _brotli(data: bytes, most: int) -> bytes:
    try:
        import brotli
    except ImportError:
        raise Undecodable("Content-Encoding br needs the package brotli: pip install brotli") from None
    decoder, pieces, size = brotli.Decompressor(), [], 0
    try:
        pieces.append(decoder.process(data, output_buffer_limit=most + 1))
        while (size := size + len(pieces[-1])) <= most and not decoder.is_finished():
            if decoder.can_accept_more_data():
                raise Undecodable("the body ends inside its compressed data")
            pieces.append(decoder.process(b"", output_buffer_limit=most + 1 - size))
    except brotli.error as error:
        raise Undecodable(str(error)) from None
    if size > most:
        raise TooLarge
    return b"".join(pieces)


MAGIC: dict[bytes, Callable[[bytes, int], bytes]] = {MEMBER: _gzip, FRAME: _zstd}
DEFLATED = ("deflate", "gzip", "x-gzip")  # names of codings in which a body may be deflate without gzip's header
