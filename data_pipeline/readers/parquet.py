"""Parquet files, by pyarrow, which is not in the default install: it is larger than all else that reads."""

import importlib.util
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.readers.base import Bomb, Items, Quarantined
from data_pipeline.readers.lines import from_record
from data_pipeline.sources import Parquet

ROWS = 64  # decoded at once, where that many values cannot take more than one document may
SHOWN = 20  # columns named in a message
PAGE_HEADER = 64  # bytes read of a page's header, of which its first three fields take at most 18


def require_pyarrow(name: str) -> None:
    """Raises InputError saying how to install pyarrow where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"sources.{name}.kind=parquet needs the package pyarrow: pip install pyarrow")


def read_parquet(file: BinaryIO, source: Parquet, size: int) -> Items:
    """A document a row of a file of `size` bytes; only the columns that are asked for are read. A file whose text
    column is absent or holds something other than text is quarantined as a whole, a row whose bytes are no UTF-8 by
    itself. Raises Bomb once the rows hold more than `max_expansion` times the file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # Pages as they are asked for, not all of a column at once.
        table = ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        schema = table.schema_arrow
        if problem := _schema_problem(schema, source):
            yield Quarantined("", "wrong_schema", problem)
            return
        columns = [name for name in (source.text_key, source.id_key) if name in schema.names]
        most, given, number = max(size * source.max_expansion, source.max_document_bytes), 0, 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            parts = _parts(table, group, columns)
            if (needed := sum(part.total_uncompressed_size for part in parts)) > source.max_row_group_bytes:
                detail = f"{rows} rows, {needed} bytes uncompressed, max_row_group_bytes={source.max_row_group_bytes}"
                yield Quarantined(f"row group {group}", "too_large", detail, needed)
                number += rows
                continue
            largest = max(_largest_value(file, part) for part in parts)
            at_once = max(1, min(ROWS, source.max_document_bytes // max(largest, 1)))
            for batch in table.iter_batches(batch_size=at_once, row_groups=[group], columns=columns):
                for record in _records(batch, source):
                    number += 1
                    text = record[source.text_key]
                    given += len(text) if text is not None else 0
                    if given > most:
                        raise Bomb(
                            f"rows of {given} bytes in a file of {size}: expands beyond max_expansion="
                            f"{source.max_expansion}, max_document_bytes={source.max_document_bytes}"
                        )
                    try:
                        record[source.text_key] = None if text is None else str(text, "utf-8")
                    except UnicodeDecodeError:
                        yield Quarantined(str(number), "undecodable", f"{source.text_key} is no UTF-8", len(text))
                        continue
                    yield from_record(record, str(number), source)
    except ArrowException as error:
        yield Quarantined("", "unreadable", " ".join(str(error).split()))


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
    """Whether an Arrow type is a string or bytes, in any of its layouts, dictionaries and extensions of them too."""
    from pyarrow import BaseExtensionType, types

    while isinstance(kind, BaseExtensionType) or types.is_dictionary(kind):
        kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind.value_type
    layouts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{layout}")(kind) for layout in layouts)


def _parts(table, group: int, columns: list[str]) -> list:
    """What the footer says of these columns of a row group."""
    found = (table.metadata.row_group(group).column(number) for number in range(table.metadata.num_columns))
    return [part for part in found if part.path_in_schema in columns]


def _largest_value(file: BinaryIO, part) -> int:
    """The most bytes that a value of a column chunk can have. A dictionary may hold one that each row repeats, and its
    size is in its page's header alone: the footer counts it once and compressed."""
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


def _records(batch, source: Parquet) -> Iterator[dict]:
    """The rows of a batch, one by one; the text as the bytes that Arrow holds, which would refuse a whole batch for a
    row that is no UTF-8."""
    from pyarrow import BaseExtensionType, DictionaryArray, large_binary

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        while isinstance(column.type, BaseExtensionType) or isinstance(column, DictionaryArray):
            column = column.dictionary_decode() if isinstance(column, DictionaryArray) else column.storage
        columns[name] = column.cast(large_binary()) if name == source.text_key else column
    for row in range(batch.num_rows):
        record = {name: column[row] for name, column in columns.items()}
        yield {
            name: scalar.as_buffer() if name == source.text_key else scalar.as_py() for name, scalar in record.items()
        }
