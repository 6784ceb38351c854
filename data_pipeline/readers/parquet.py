"""Parquet files, by pyarrow, which is not in the default install: it is larger than all else that reads."""

import importlib.util
from typing import BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.readers.base import Items, Quarantined
from data_pipeline.readers.lines import from_record
from data_pipeline.sources import Parquet

ROWS = 256  # read at once


def require_pyarrow(name: str) -> None:
    """Raises InputError saying how to install pyarrow where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"sources.{name}.kind=parquet needs the package pyarrow: pip install pyarrow")


def read_parquet(file: BinaryIO, source: Parquet) -> Items:
    """A document a row; only the columns that are asked for are read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        columns = [name for name in (source.text_key, source.id_key) if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=columns):
            for record in batch.to_pylist():
                number += 1
                yield from_record(record, str(number), source)
    except ArrowException as error:
        yield Quarantined("", "unreadable", " ".join(str(error).split()))
