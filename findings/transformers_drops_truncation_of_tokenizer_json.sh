#!/usr/bin/env bash
# transformers 5.23.0 (tokenizers 0.23.3): a tokenizer.json that was saved with truncation and padding on gives other ids
# in the two libraries. Tokenizer.from_file cuts and pads as the file says; AutoTokenizer switches both off when it calls
# the tokenizer, and even for direct calls to the tokenizers object that it wraps, from its first call on.
#
# Guessed: both read one file, so both give the same ids for a text.
# Seen: tokenizers: [3, 4]; transformers: [3, 4, 5, 6]; its backend afterwards: [3, 4, 5, 6]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: transformers==5.23.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

path = Path(sys.argv[1])
tokenizer = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "d": 6}, []))
tokenizer.enable_truncation(2)
tokenizer.save(str(path / "tokenizer.json"))
(path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
alone = Tokenizer.from_file(str(path / "tokenizer.json")).encode("abcd").ids
wrapped = AutoTokenizer.from_pretrained(path)
ids = wrapped("abcd").input_ids
backend = wrapped.backend_tokenizer.encode("abcd").ids
print(f"tokenizers: {alone}; transformers: {ids}; its backend afterwards: {backend}")
raise SystemExit((alone, ids, backend) != ([3, 4], [3, 4, 5, 6], [3, 4, 5, 6]))
PYTHON
