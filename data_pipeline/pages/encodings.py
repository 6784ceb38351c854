"""Decodes a page's bytes as browsers do, by the WHATWG Encoding Standard."""

import codecs
import re

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF16_LE, "utf-16-le"))
# The standard's decoders accept more than Python's codecs of the same name: gbk means gb18030, euc-kr and shift_jis
# include Microsoft's extensions. Keys: names that resiliparse maps labels to.
WIDER = {"gbk": "gb18030", "euc_kr": "cp949", "shift_jis": "cp932", "big5": "big5hkscs", "iso8859-11": "cp874"}
UNMAPPED = {"x-mac-cyrillic": "mac_cyrillic", "x-mac-ukrainian": "mac_cyrillic"}  # labels that resiliparse does not map
REPLACED = {"replacement", "iso-2022-kr", "csiso2022kr", "hz-gb-2312", "iso-2022-cn", "iso-2022-cn-ext"}
DETECTED = 1 << 20  # bytes that decide between UTF-8 and windows-1252
PRESCAN = 1024  # bytes searched for an XML declaration or meta element with the encoding
COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
META = re.compile(rb"<meta[\s/][^>]*", re.IGNORECASE)
CONTENT = re.compile(rb"\bcontent\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s>]*)", re.IGNORECASE)
CONTENT_TYPE = re.compile(rb"http-equiv\s*=\s*[\"']?\s*content-type", re.IGNORECASE)
CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:()+-]+)", re.IGNORECASE)
XML = re.compile(rb"\A\s*<\?xml\s[^>]*?encoding\s*=\s*[\"']([\w.:()+-]+)", re.IGNORECASE)


def decode_page(data: bytes | bytearray, label: str | None = None, *, markup: bool = True) -> str:
    """`data` as text. The encoding is, in this order, the byte-order mark's, `label` (the HTTP header's charset), with
    `markup` the meta element's or XML declaration's, UTF-8 if all bytes are valid, or guessed. Undecodable bytes become
    U+FFFD; with a label that browsers refuse to decode, the whole text does."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return _decode(data[len(mark) :], name)
    for found in (label, _named_in(data) if markup else None):
        if found and (name := codec(found)):
            return "\ufffd" if name == "replacement" else _decode(data, name)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _decode(data, _guess(bytes(data)))


def codec(label: str) -> str | None:
    """The Python codec of an encoding's label; "replacement" for one that browsers refuse; None for an unknown one."""
    label = label.strip().lower()
    if label in REPLACED:
        return "replacement"
    name = UNMAPPED.get(label) or map_encoding_to_html5(label, fallback_utf8=False)
    return WIDER.get(name, name)


def _named_in(data: bytes) -> str | None:
    """The label in the page's meta element or XML declaration; UTF-8 for UTF-16, wrong where ASCII is readable."""
    head = bytes(data[:PRESCAN])
    match = XML.search(head)
    for tag in META.findall(COMMENT.sub(b"", head)):
        content, rest = CONTENT.search(tag), CONTENT.sub(b" ", tag)
        named = CHARSET.search(rest) or (content and CONTENT_TYPE.search(rest) and CHARSET.search(content[0]))
        if named:
            match = named
            break
    label = match and match[1].decode("ascii", "replace")
    return "utf-8" if label and label.lower().startswith("utf-16") else label


def _guess(data: bytes) -> str:
    """The detected encoding of a page; the browsers' windows-1252 if that is UTF-8 with fewer valid characters beyond
    ASCII than invalid bytes."""
    name = codec(detect_encoding(data)) or "utf-8"
    if name != "utf-8":
        return name
    head = data[:DETECTED].decode("utf-8", "replace")
    return "cp1252" if 2 * head.count("\ufffd") > len(head) - len(head.encode("ascii", "ignore")) else name


def _decode(data: bytes, name: str) -> str:
    return data.decode(name, "whatwg" if name.startswith("cp") else "replace")


def _control_or_replacement(error: UnicodeError) -> tuple[str, int]:
    """Windows' code pages leave some bytes of 0x80..0x9F undefined; the standard reads them as C1 controls."""
    byte = error.object[error.start]
    single = error.end - error.start == 1 and 0x80 <= byte <= 0x9F and error.encoding.lower() not in ("cp932", "cp949")
    return (chr(byte) if single else "\ufffd"), error.end


codecs.register_error("whatwg", _control_or_replacement)
