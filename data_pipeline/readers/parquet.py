"""Parquet files, by pyarrow, which is not in the default install: it is larger than all else that reads."""

import importlib.util
from typing import BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.readers.base import Items, Quarantined
from data_pipeline.readers.lines import from_record
from data_pipeline.sources import Parquet

ROWS = 64  # read at once


def require_pyarrow(name: str) -> None:
    """Raises InputError saying how to install pyarrow where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"sources.{name}.kind=parquet needs the package pyarrow: pip install pyarrow")


def read_parquet(file: BinaryIO, source: Parquet) -> Items:
    """A document a row; only the columns that are asked for are read. A file whose text column is absent or holds
    something other than text is quarantined as a whole, a row whose bytes are no UTF-8 by itself."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # Not all of a column at once: pages as they are asked for.
        table = ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        schema = table.schema_arrow
        if problem := _schema_problem(schema, source):
            yield Quarantined("", "wrong_schema", problem)
            return
        columns = [name for name in (source.text_key, source.id_key) if name in schema.names]
        number = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if (size := _bytes(table, group, columns)) > source.max_row_group_bytes:
                detail = f"{rows} rows, {size} bytes uncompressed, max_row_group_bytes={source.max_row_group_bytes}"
                yield Quarantined(f"row group {group}", "too_large", detail, size)
                number += rows
                continue
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns):
                for record in _records(batch, source):
                    number += 1
                    if isinstance(data := record[source.text_key], bytes):
                        yield Quarantined(str(number), "undecodable", f"{source.text_key} is no UTF-8", len(data))
                    else:
                        yield from_record(record, str(number), source)
    except ArrowException as error:
        yield Quarantined("", "unreadable", " ".join(str(error).split()))


def _schema_problem(schema, source: Parquet) -> str | None:
    if source.text_key not in schema.names:
        return f"no column {source.text_key!r}; there are {', '.join(schema.names[:20])}"
    kind = schema.field(source.text_key).type
    kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
    if str(kind) not in ("string", "large_string", "binary", "large_binary"):
        return f"column {source.text_key!r} is {kind} and no text"
    return None


def _bytes(table, group: int, columns: list[str]) -> int:
    """Of these columns of a row group, uncompressed, by the file's own word."""
    parts = (table.metadata.row_group(group).column(n) for n in range(table.metadata.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema in columns)


def _records(batch, source: Parquet) -> list[dict]:
    """The rows of a batch, the text decoded here: Arrow would refuse a whole batch for a row that is no UTF-8."""
    import pyarrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name == source.text_key:
            column = column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
            columns[name] = [_text(value) for value in column.cast(pyarrow.large_binary()).to_pylist()]
        else:
            columns[name] = column.to_pylist()
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _text(value: bytes | None) -> str | bytes | None:
    """The bytes themselves when they are no UTF-8."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
