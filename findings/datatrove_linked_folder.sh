#!/usr/bin/env bash
# datatrove 0.10.1 (fsspec 2026.9.0): a reader with a glob_pattern leaves out the files of a linked folder without a word,
# as corpora have them that span disks. Without a pattern it ends with IsADirectoryError. A linked file is read.
#
# Guessed: a link to a folder is followed, as a link to a file is, or named.
# Seen: three files of a document each, one of them behind a link to a folder:
#   with glob_pattern: ['linked file', 'plain']
#   without: IsADirectoryError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datatrove==0.10.1 fsspec==2026.9.0 orjson==3.13.0
mkdir "$folder/corpus" "$folder/disk2"
echo '{"text": "plain", "id": "1"}' >"$folder/corpus/a.jsonl"
echo '{"text": "behind a linked folder", "id": "2"}' >"$folder/disk2/b.jsonl"
echo '{"text": "linked file", "id": "3"}' >"$folder/c.jsonl"
ln -s "$folder/disk2" "$folder/corpus/part"
ln -s "$folder/c.jsonl" "$folder/corpus/c.jsonl"
"$folder/venv/bin/python" - "$folder/corpus" 2>/dev/null <<'PYTHON'
import sys

from datatrove.pipeline.readers import JsonlReader


def texts(**options):
    return sorted(document.text for document in JsonlReader(sys.argv[1], compression=None, **options).run())


found = texts(glob_pattern="**/*.jsonl")
print("with glob_pattern:", found)
try:
    without = texts()
except OSError as error:
    without = type(error).__name__
print("without:", without)
raise SystemExit((found, without) != (["linked file", "plain"], "IsADirectoryError"))
PYTHON
