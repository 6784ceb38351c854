"""WARC records as crawlers store them: each is a document or a line in quarantine, and no record costs another."""

import gzip
import json
import os
import zlib

import brotli
import pytest
import zstandard

from data_pipeline.pages.encodings import codec, decode_page
from tests.data_pipeline.source_factory import PAGE, read, source, warc_record

TEXT = "bears fruit & shade"
BODY = PAGE.encode()
RAW = zlib.compressobj(wbits=-15)
RAW_DEFLATED = RAW.compress(BODY) + RAW.flush()


def response(body, *headers, status="200 OK", kind="text/html; charset=utf-8", end="\r\n"):
    lines = [f"HTTP/1.1 {status}", *([f"Content-Type: {kind}"] if kind else []), *headers]
    return (end.join(lines) + 2 * end).encode() + body


def chunks(body, size=100):
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


READ = {
    "no such coding": response(BODY, "Content-Encoding: none"),
    "a charset for a coding": response(BODY, "Content-Encoding: utf-8"),
    "gzip": response(gzip.compress(BODY), "Content-Encoding: gzip"),
    "x-gzip, capitals": response(gzip.compress(BODY), "CONTENT-ENCODING: X-GZip"),
    "two members": response(gzip.compress(BODY[:50]) + gzip.compress(BODY[50:]), "Content-Encoding: gzip"),
    "gzip, undone already": response(BODY, "Content-Encoding: gzip"),
    "gzip, and no type": response(gzip.compress(BODY), "Content-Encoding: gzip", kind=None),
    "deflate of zlib": response(zlib.compress(BODY), "Content-Encoding: deflate"),
    "raw deflate": response(RAW_DEFLATED, "Content-Encoding: deflate"),
    "deflate, undone already": response(BODY, "Content-Encoding: deflate"),
    "brotli": response(brotli.compress(BODY), "Content-Encoding: br"),
    "brotli, undone already": response(BODY, "Content-Encoding: br"),
    "zstd": response(zstandard.compress(BODY), "Content-Encoding: zstd"),
    "gzip in gzip": response(gzip.compress(gzip.compress(BODY)), "Content-Encoding: gzip, gzip"),
    "gzip in deflate, two headers": response(
        gzip.compress(RAW_DEFLATED), "Content-Encoding: deflate", "Content-Encoding: gzip"
    ),
    "deflate of zlib, another coding named": response(zlib.compress(BODY), "Content-Encoding: gzip"),
    "raw deflate, another coding named": response(RAW_DEFLATED, "Content-Encoding: x-gzip"),
    "gzip, another coding named": response(gzip.compress(BODY), "Content-Encoding: deflate"),
    "UTF-16 without a mark, gzip undone already": response(
        BODY.decode().encode("utf-16-le"), "Content-Encoding: gzip", kind="text/html; charset=utf-16le"
    ),
    "gzip, not named": response(gzip.compress(BODY)),
    "zstd, another coding named": response(zstandard.compress(BODY), "Content-Encoding: identity"),
    "behind an interim response": b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + response(BODY),
    "chunks": response(chunks(BODY), "Transfer-Encoding: chunked"),
    "chunks, undone already": response(BODY, "Transfer-Encoding: chunked"),
    "chunks of gzip": response(chunks(gzip.compress(BODY)), "Transfer-Encoding: chunked", "Content-Encoding: gzip"),
    "lines ended by LF": response(BODY, "X-A: b", end="\n"),
    "a header over two lines": response(BODY, "X-A: b\r\n c: d"),
    "a type in capitals": response(BODY, kind="TEXT/HTML;Charset=UTF-8"),
    "no type": response(BODY, kind=None),
    "a type that is none": response(BODY, kind="html"),
    "a type twice": response(BODY, kind="text/html, text/html; charset=utf-8"),
    "a status without a space behind it": response(BODY, status="200OK"),
    "XHTML": response(BODY, kind="application/xhtml+xml"),
}
QUARANTINED = {
    "a picture": (response(b"\x89PNG\r\n\x1a\n", kind="image/png"), "media_type"),
    "bytes without a type": (response(b"\x00\x01\x02", kind=None), "media_type"),
    "not found": (response(BODY, status="404 Not Found"), "status"),
    "moved": (response(BODY, status="301"), "status"),
    "nothing": (response(b""), "empty"),
    "cut gzip": (response(gzip.compress(BODY)[:-30], "Content-Encoding: gzip"), "undecodable"),
    "broken chunks": (response(chunks(BODY)[:-60], "Transfer-Encoding: chunked"), "undecodable"),
    "an unknown coding": (response(bytes(range(256)), "Content-Encoding: compress"), "undecodable"),
    "brotli, gzip named": (response(brotli.compress(BODY), "Content-Encoding: gzip"), "undecodable"),
    "zstd without its beginning": (response(zstandard.compress(BODY)[8:], "Content-Encoding: zstd"), "undecodable"),
    "gzip behind an empty line": (response(b"\r\n" + gzip.compress(BODY), "Content-Encoding: gzip"), "undecodable"),
    "a refused charset": (response(b"words", kind="text/html; charset=iso-2022-kr"), "undecodable"),
    "no response": (b"words", "not_http"),
}


def write(path, records, packed):
    path.write_bytes(b"".join(gzip.compress(record) if packed else record for record in records))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_every_way_to_send_a_page_is_read_and_what_is_not_is_named(tmp_path, packed):
    """All in one file: a record that cannot be decoded costs itself alone."""
    entries = [item for pair in zip(READ.items(), [*QUARANTINED.items()] * 3, strict=False) for item in pair]
    bodies = [entry if isinstance(entry, bytes) else entry[0] for _, entry in entries]
    records = [warc_record("warcinfo", b"x"), *(warc_record("response", body) for body in bodies)]
    write(tmp_path / ("a.warc.gz" if packed else "a.warc"), records, packed)
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    found = {id.rpartition(":")[2]: text for id, (text, _) in documents.items()}
    reasons = {id.rpartition(":")[2]: reason for id, reason in quarantine.items()}
    for number, (name, entry) in enumerate(entries, 1):
        if isinstance(entry, bytes):
            assert TEXT in found.get(str(number), ""), (name, reasons.get(str(number)))
        else:
            assert reasons.get(str(number)) == entry[1], name
    assert len(found) + len(reasons) == len(entries)
    details = [json.loads(line)["detail"] for line in (tmp_path / "quarantine/00000.jsonl").open()]
    assert all("http://pears.example/" in detail for detail in details if "character" not in detail)


def test_statuses_and_kinds_of_records(tmp_path):
    records = [
        warc_record("response", response(BODY, status="404 Not Found")),
        warc_record("resource", b"Plain words."),
        warc_record("revisit", response(b"")),
        warc_record("request", b"GET / HTTP/1.1"),
        warc_record("conversion", b"More words."),
        warc_record("unheard-of", b""),
        warc_record("conversion", "Größe, Höhe und Breite der Bäume.".encode("cp1252")),
    ]
    write(tmp_path / "a.warc", records, packed=False)
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc", statuses=[200, 404]))
    assert [id.rpartition(":")[2] for id in documents] == ["1", "2", "4", "6"]
    assert documents["crawl/a.warc:6"][0] == "Größe, Höhe und Breite der Bäume."
    assert quarantine == {"crawl/a.warc:3": "record_type", "crawl/a.warc:5": "record_type"}


def test_a_damaged_member_costs_itself_alone(tmp_path):
    """Of five: the second is overwritten in its middle, the fourth has a wrong checksum, garbage lies before the
    fifth."""
    members = [
        gzip.compress(warc_record("conversion", f"Words {n} {os.urandom(300).hex()}".encode())) for n in range(5)
    ]
    broken, false = bytearray(members[1]), bytearray(members[3])
    broken[150:180] = b"\xff" * 30
    false[-6] ^= 1
    data = members[0] + broken + members[2] + false + b"\x1f\x8b\x08garbage" + members[4]
    (tmp_path / "a.warc.gz").write_bytes(data)
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    assert [text[:7] for text, _ in documents.values()] == ["Words 0", "Words 2", "Words 4"]
    lost = [len(members[0]), len(members[0] + members[1] + members[2])]
    assert quarantine == {f"crawl/a.warc.gz:byte {at}": "unreadable" for at in lost}


def test_a_file_that_begins_with_damage_is_read_behind_it(tmp_path):
    members = [gzip.compress(warc_record("conversion", f"Words {n}.".encode())) for n in range(3)]
    (tmp_path / "a.warc.gz").write_bytes(bytes(50) + b"".join(members)[50:])
    (tmp_path / "b.warc").write_bytes(bytes(50) + warc_record("conversion", b"Words."))
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    assert [text for text, _ in documents.values()] == ["Words 1.", "Words 2."]
    assert quarantine == {"crawl/a.warc.gz:byte 0": "unreadable", "crawl/b.warc:byte 0": "unreadable"}


def test_a_file_in_one_member_and_one_of_zstd_frames(tmp_path):
    records = [warc_record("conversion", f"Words {n}.".encode()) for n in range(3)]
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(b"".join(records)))
    (tmp_path / "b.warc.zst").write_bytes(b"".join(map(zstandard.compress, records)))
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc"))
    assert [text for text, _ in documents.values()] == 2 * ["Words 0.", "Words 1.", "Words 2."]
    assert not quarantine


@pytest.mark.parametrize("kind", ["response", "request"])
def test_a_file_that_expands_beyond_its_bound_is_named(tmp_path, kind):
    """Also where no document comes of it: bytes that are skipped count."""
    bodies = [b"Words.", response(bytes(3_000_000), kind="image/png"), b"More words."]
    records = [warc_record(name, body) for name, body in zip(["conversion", kind, "conversion"], bodies, strict=True)]
    write(tmp_path / "a.warc.gz", records, packed=True)
    bounds = {"max_document_bytes": 100_000, "max_expansion": 20}
    documents, quarantine = read(tmp_path, crawl=source(tmp_path, kind="warc", **bounds))
    assert [text for text, _ in documents.values()] == ["Words."]
    assert quarantine == {"crawl/a.warc.gz": "bomb"}


LABELS = {
    "iso-8859-1": ("“quoted” 5 €", "cp1252"),
    "US-ASCII": ("“quoted”", "cp1252"),
    "gb2312": ("朱镕基 \U00020087", "gb18030"),
    "ks_c_5601-1987": ("똠방각하", "cp949"),
    "Shift_JIS": ("①髙島屋", "cp932"),
    "big5": ("香港嘅", "big5hkscs"),
    "tis-620": ("“ไทย”", "cp874"),
    "x-mac-cyrillic": ("Москва", "mac_cyrillic"),
    "iso-8859-9": ("“İstanbul”", "cp1254"),
    "unicode": ("word", "utf-16-le"),
}


@pytest.mark.parametrize(("label", "text", "stored"), [(k, *v) for k, v in LABELS.items()], ids=LABELS)
def test_a_label_is_read_as_browsers_read_it(label, text, stored):
    assert decode_page(text.encode(stored), label) == text
    page = f'<!-- charset=utf-8 --><meta http-equiv="Content-Type" content="text/html; charset={label}">{text}'
    if stored != "utf-16-le":
        assert decode_page(page.encode(stored)) == page
        assert decode_page(page.replace('"', "'").encode(stored), "no-such-label").endswith(text)


def test_marks_come_before_labels_and_bad_bytes_cost_themselves_alone():
    for stored in ("utf-8-sig", "utf-16"):
        assert decode_page("Größe 大きさ".encode(stored), "iso-8859-1") == "Größe 大きさ"
    assert decode_page(b"a\x81\x93b", "windows-1252") == "a\x81\u201cb"
    assert decode_page("Größe\xff".encode("latin-1")[:-1] + b"\xff", "utf-8") == "Gr\ufffd\ufffde\ufffd"
    assert decode_page("<meta charset=utf-16>Größe".encode()) == "<meta charset=utf-16>Größe"
    assert decode_page("Größe".encode()) == "Größe"
    about = '<meta name="description" content="charset=big5"><meta content=\'text/html; charset=koi8-r\' http-equiv='
    assert decode_page(f"{about}Content-Type>Москва".encode("koi8-r")).endswith("Москва")
    assert decode_page(b'<?xml version="1.0" encoding="windows-1251"?><p>' + "Москва".encode("cp1251")).endswith(
        "Москва"
    )
    assert codec("zlib_codec") is None


def test_an_encoding_that_nothing_names_is_guessed():
    german = "<p>Ein kurzer Text über Äpfel und Birnen, die im Garten wachsen. </p>" * 3  # detected as UTF-8
    assert decode_page(german.encode("latin-1")) == german
    assert decode_page(german.encode() + b"\xff") == german + "\ufffd"
    assert decode_page("吾輩は猫である。名前はまだ無い。".encode("cp932")) == "吾輩は猫である。名前はまだ無い。"
