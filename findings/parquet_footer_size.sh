#!/usr/bin/env bash
# pyarrow 26.0.1: a Parquet footer's total_uncompressed_size is no bound on what a column takes once it is read. A
# dictionary counts each value once, while the rows that repeat it hold it each; and one batch of iter_batches does.
#
# Guessed: total_uncompressed_size is about the size of the column in memory, so a reader can decide by it.
# Seen: 200 rows of one text of 100 kB:
#   footer: 100,054 bytes uncompressed; a batch of 64 rows: 6,400,256 bytes; all rows: 20,000,800
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: pyarrow==26.0.1
"$folder/venv/bin/python" - "$folder/a.parquet" <<'PYTHON'
import sys

import pyarrow
from pyarrow import parquet

parquet.write_table(pyarrow.table({"text": ["x" * 100_000] * 200}), sys.argv[1])
file = parquet.ParquetFile(sys.argv[1])
footer = file.metadata.row_group(0).column(0).total_uncompressed_size
batches = [batch.nbytes for batch in file.iter_batches(batch_size=64)]
print(f"footer: {footer:,} bytes uncompressed; a batch of 64 rows: {batches[0]:,} bytes; all rows: {sum(batches):,}")
raise SystemExit(not (footer < 110_000 and batches[0] >= 6_400_000 and sum(batches) >= 20_000_000))
PYTHON
