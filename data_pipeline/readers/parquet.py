"""Parquet files, read by pyarrow, an optional dependency because of its size."""

import importlib.util
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.readers.base import Bomb, Items, Quarantined, too_large, too_slow
from data_pipeline.readers.limit import TooSlow, cpu_seconds
from data_pipeline.readers.lines import LONGEST_KEY, from_record
from data_pipeline.sources import Parquet

ROWS = 64  # rows per batch, if their values together cannot exceed max_document_bytes; else fewer
SHOWN = 20  # columns in a message
ROW_BYTES = 128  # least bytes that a row counts towards max_expansion: a small file may hold 2**31 empty rows
PAGE_HEADER = 64  # bytes read of a page header, whose first three fields take at most 18
TRAILER, MAGIC = 8, b"PAR1"  # bytes at a file's end: the footer's length, 4 bytes, and the magic number


def require_pyarrow(name: str) -> None:
    """Raises InputError saying how to install pyarrow where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"sources.{name}.kind=parquet needs the extra parquet: pip install -e '.[parquet]'")


def read_parquet(file: BinaryIO, source: Parquet, size: int) -> Items:
    """A document per row of a file of `size` bytes; reads only the needed columns. A file without a text column of text
    type, or with a footer above `max_document_bytes`, is quarantined whole, a row that is not UTF-8 alone. Raises Bomb
    when the rows' bytes exceed both `max_expansion` * `size` and `max_document_bytes`."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    if (footer := _footer_bytes(file, size)) > source.max_document_bytes:
        yield too_large("footer", footer, source)
        return
    try:
        with cpu_seconds(source.max_seconds):
            # Reads page by page, not a whole column chunk.
            table = ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            schema = table.schema_arrow
        if problem := _schema_problem(schema, source):
            yield Quarantined("", "wrong_schema", problem)
            return
        columns = [source.text_key]
        if source.id_key in {*schema.names} - {*columns} and _holds_names(schema.field(source.id_key).type):
            columns.append(source.id_key)
        most, given, number = max(size * source.max_expansion, source.max_document_bytes), 0, 0
        after = 0  # number of the last row of the row group before
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            number, after = after, after + rows
            parts = _parts(table, group, columns)
            if (needed := sum(part.total_uncompressed_size for part in parts)) > source.max_row_group_bytes:
                detail = f"{rows} rows, {needed} bytes uncompressed, max_row_group_bytes={source.max_row_group_bytes}"
                yield Quarantined(f"row group {group}", "too_large", detail, needed)
                continue
            largest = max(_largest_value(file, part) for part in parts)
            at_once = max(1, min(ROWS, source.max_document_bytes // max(largest, 1)))
            for batch in _batches(table, group, columns, at_once, source):
                if isinstance(batch, Quarantined):
                    yield batch
                    break
                for record in _records(batch):
                    number += 1
                    given += max(sum(len(value) for value in record.values() if value is not None), ROW_BYTES)
                    if given > most:
                        raise Bomb(
                            f"rows of {given} bytes in a file of {size}: expands beyond max_expansion="
                            f"{source.max_expansion}, max_document_bytes={source.max_document_bytes}"
                        )
                    text = record[source.text_key]
                    try:
                        record[source.text_key] = None if text is None else str(text, "utf-8")
                    except UnicodeDecodeError:
                        yield Quarantined(str(number), "undecodable", f"{source.text_key} is no UTF-8", len(text))
                        continue
                    if (name := record.get(source.id_key)) and source.id_key in columns[1:]:
                        record[source.id_key] = str(name[: 4 * LONGEST_KEY + 4], "utf-8", "replace")
                    yield from_record(record, str(number), source)
    except ArrowException as error:
        yield Quarantined("", "unreadable", " ".join(str(error).split()))
    except TooSlow:
        yield too_slow("", "the footer's columns", source, size)


def _batches(table, group: int, columns: list[str], at_once: int, source: Parquet) -> Iterator:
    """The record batches of a row group, of `at_once` rows. If one takes too long, a Quarantined is the last item."""
    batches = table.iter_batches(batch_size=at_once, row_groups=[group], columns=columns)
    while True:
        try:
            with cpu_seconds(source.max_seconds):
                batch = next(batches, None)
        except TooSlow:
            yield too_slow(f"row group {group}", f"{at_once} rows", source)
            return
        if batch is None:
            return
        yield batch.select(columns)


def parquet_keys(file: BinaryIO) -> list[str]:
    """The names of a file's columns. Raises ArrowException."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file, pre_buffer=False).schema_arrow.names


def _schema_problem(schema, source: Parquet) -> str | None:
    if source.text_key not in schema.names:
        return f"no column {source.text_key!r}; there are {', '.join(schema.names[:SHOWN])}"
    if not _holds_text(kind := schema.field(source.text_key).type):
        return f"column {source.text_key!r} is {kind} and no text"
    return None


def _holds_text(kind) -> bool:
    """Whether an Arrow type is string or binary, in any layout, also as dictionary or extension type."""
    kind = _storage(kind)
    return _is_any(kind, "string large_string string_view binary large_binary binary_view fixed_size_binary")


def _holds_names(kind) -> bool:
    """Whether an Arrow type is string or integer, in any layout, also as dictionary or extension type."""
    return _is_any(_storage(kind), "string large_string string_view integer")


def _is_any(kind, names: str) -> bool:
    from pyarrow import types

    return any(getattr(types, f"is_{name}")(kind) for name in names.split())


def _storage(kind):
    """The type of the values of an extension type or dictionary."""
    from pyarrow import BaseExtensionType, types

    while isinstance(kind, BaseExtensionType) or types.is_dictionary(kind):
        kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind.value_type
    return kind


def _parts(table, group: int, columns: list[str]) -> list:
    """The footer's metadata of what pyarrow reads for these columns of a row group: `text.en` as well for `text`."""
    found = (table.metadata.row_group(group).column(number) for number in range(table.metadata.num_columns))
    below = tuple(f"{name}." for name in columns)
    return [part for part in found if part.path_in_schema in columns or part.path_in_schema.startswith(below)]


def _largest_value(file: BinaryIO, part) -> int:
    """Upper bound, in bytes, of a value of a column chunk. A dictionary value can be repeated by every row; the
    dictionary's uncompressed size is only in its page header, since the footer counts it once and compressed."""
    if not part.has_dictionary_page:
        return part.total_uncompressed_size
    at = file.tell()
    file.seek(part.dictionary_page_offset)
    header = file.read(PAGE_HEADER)
    file.seek(at)
    return max(part.total_uncompressed_size, _uncompressed_page_size(header))


def _uncompressed_page_size(header: bytes) -> int:
    """Field 2 of a page's header (Thrift's compact protocol): after each field's byte 0x15, a zigzag varint."""
    values, at = [], 0
    while len(values) < 2 and at < len(header) and header[at] == 0x15:
        value = shift = 0
        at += 1
        while at < len(header):
            value |= (header[at] & 0x7F) << shift
            shift += 7
            at += 1
            if header[at - 1] < 0x80:
                break
        values.append((value >> 1) ^ -(value & 1))
    return values[1] if len(values) == 2 else 0


def _footer_bytes(file: BinaryIO, size: int) -> int:
    """The footer's length; 0 if the file's end states none, which pyarrow reports."""
    file.seek(max(size - TRAILER, 0))
    trailer = file.read(TRAILER)
    file.seek(0)
    length = int.from_bytes(trailer[:4], "little")
    return length if trailer[4:] == MAGIC and length < size else 0


def _records(batch) -> Iterator[dict]:
    """The rows of a batch, as bytes: Arrow's conversion to str would fail for the whole batch if one row is not
    UTF-8."""
    from pyarrow import BaseExtensionType, DictionaryArray, large_binary, string

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        while isinstance(column.type, BaseExtensionType) or isinstance(column, DictionaryArray):
            column = column.dictionary_decode() if isinstance(column, DictionaryArray) else column.storage
        columns[name] = (column if _holds_text(column.type) else column.cast(string())).cast(large_binary())
    for row in range(batch.num_rows):
        yield {name: column[row].as_buffer() for name, column in columns.items()}
