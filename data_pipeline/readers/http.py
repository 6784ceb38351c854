"""HTTP responses as crawlers store them: headers that were kept, bodies that may have been decoded already.

A header that says how the body was sent (chunked, gzip, ...) is believed where the body bears it out. A body that does
not begin as its header says was decoded by the crawler, and is taken as it is.
"""

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from zstandard import ZstdDecompressor, ZstdError

LONGEST_HEAD = 1 << 16  # bytes of a response's headers
HEAD_END = re.compile(rb"\r?\n\r?\n|\Z")
FOLDED = re.compile(rb"\r?\n[ \t]+")  # a header that goes on in the next line
STATUS = re.compile(rb"HTTP/\S*[ \t]+(\d{3})")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
LINE_END = re.compile(rb"\r?\n")
CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s;\"']+)", re.IGNORECASE)
# What a browser's sniffer takes for a page where no type is given.
MARKUP = re.compile(
    rb"\s*<(?:!doctype html|!--|\?xml|"
    rb"(?:html|head|title|meta|body|script|style|iframe|h1|div|font|table|a|b|br|p)[\s>])",
    re.IGNORECASE,
)
BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
NO_TYPES = ("*/*", "unknown/unknown", "application/unknown")  # for which a browser looks at the body
MEMBER = b"\x1f\x8b"  # a member of gzip begins
GZIP, ZLIB, RAW = 31, 15, -15  # zlib's wbits
PIECE = 1 << 20  # bytes decompressed at once where the library cannot bound what it gives
SNIFFED = 1024  # bytes of a body that tell what it is


class Undecodable(ValueError):
    """A body that is broken in the way in which it was sent."""


class TooLarge(ValueError):
    """A body that decodes to more bytes than asked for."""


@dataclass(frozen=True)
class Response:
    """`headers`: by lower-case name, the first of each; `body`: as it was stored."""

    status: int
    headers: dict[str, str]
    body: bytearray

    @property
    def media_type(self) -> str:
        """Lower case, without parameters; empty where there is none."""
        return media_type(self.headers.get("content-type", ""))

    @property
    def charset(self) -> str | None:
        return charset(self.headers.get("content-type", ""))

    def content(self, most: int) -> bytes | bytearray:
        """The body without transfer and content codings. Raises Undecodable, and TooLarge beyond `most` bytes."""
        data = self.body
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            data = _without_chunks(data)
        for coding in reversed(self.headers.get("content-encoding", "").lower().split(",")):
            if decode := CODINGS.get(coding.strip()):
                data = decode(data, most)
            elif coding.strip() and is_binary(data):
                raise Undecodable(f"Content-Encoding {coding.strip()} is not known, and the body is no text")
        if len(data) > most:
            raise TooLarge
        return data


def parse_response(message: bytearray) -> Response | None:
    """The response of a message whose lines end in CRLF or in LF alone; None for what is no response. Its body is
    `message` itself, without the headers."""
    if not (status := STATUS.match(message)):
        return None
    end = HEAD_END.search(message, 0, LONGEST_HEAD)
    headers: dict[str, str] = {}
    head = FOLDED.sub(b" ", message[status.end() : end.start()])
    for line in head.decode("latin-1").split("\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    code, length = int(status[1]), end.end()
    del status, end  # a match holds the buffer, which could not shrink
    del message[:length]
    return Response(code, headers, message)


def media_type(value: str) -> str:
    """The type that a Content-Type names: lower case, without parameters; empty where it names none."""
    found = re.split("[;,]", value)[0].strip().lower()
    return "" if "/" not in found or found in NO_TYPES else found


def charset(value: str) -> str | None:
    """The charset that a Content-Type names."""
    match = CHARSET.search(value)
    return match and match[1]


def sniff(data: bytes) -> str:
    """The media type of a body that came without one: a page, text, or empty for what is neither."""
    if MARKUP.match(data.removeprefix(b"\xef\xbb\xbf")[:SNIFFED]):
        return "text/html"
    return "" if is_binary(data) else "text/plain"


def is_binary(data: bytes) -> bool:
    """Whether the beginning of `data` holds bytes that no text has; UTF-16 with its mark is text."""
    return not data.startswith((b"\xff\xfe", b"\xfe\xff")) and bool(BINARY.search(data, 0, SNIFFED))


def _without_chunks(data: bytes) -> bytes:
    """A chunked body put together; one that does not begin with a whole chunk is as it was."""
    pieces, at = [], 0
    while size := CHUNK.match(data, at):
        end = size.end() + int(size[1], 16)
        if end == size.end():
            return b"".join(pieces)  # trailers and the end
        line_end = LINE_END.match(data, end)
        if not line_end:
            break
        pieces.append(data[size.end() : end])
        at = line_end.end()
    if not pieces:
        return data
    if at == len(data):  # all chunks but the last, empty one
        return b"".join(pieces)
    raise Undecodable(f"chunked, and broken at byte {at} of {len(data)}")


def _inflate(data: bytes, most: int, wbits: int) -> bytes:
    """What the members of `data` hold. Raises TooLarge beyond `most` bytes, Undecodable for what is broken."""
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
    return _inflate(data, most, GZIP) if data.startswith(MEMBER) else data


def _deflate(data: bytes, most: int) -> bytes:
    """zlib's format as the standard says, or the raw one that servers send."""
    zlib_header = len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2]) % 31 == 0
    try:
        return _inflate(data, most, ZLIB if zlib_header else RAW)
    except Undecodable:
        if is_binary(data):
            raise
        return data


def _zstd(data: bytes, most: int) -> bytes:
    if not data.startswith(b"\x28\xb5\x2f\xfd"):
        return data
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
    """Brotli has no mark at its beginning: what is text before it is decoded was decoded already."""
    if not is_binary(data):
        return data
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


CODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zstd": _zstd,
    "br": _brotli,
}
