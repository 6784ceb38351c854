#!/usr/bin/env bash
# tokenizers 0.23.3: encode_special_tokens, which makes the name of a special entry in a text letters like any other, is
# a setting of the object and not of the file. save() leaves it out, and whoever loads the file gets other ids for a text
# that holds such a name: one special entry in the place of its letters.
#
# Guessed: a tokenizer.json holds all that decides about ids, so that a copy of the file gives the same ids.
# Seen: before save: True [4, 3, 5]; after from_file: False [1]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder/tokenizer.json" <<'PYTHON'
import sys

from tokenizers import AddedToken, Tokenizer, models

tokenizer = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "a": 2, "s": 3, "<": 4, ">": 5}, []))
tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
tokenizer.encode_special_tokens = True
before = tokenizer.encode("<s>").ids
tokenizer.save(sys.argv[1])
loaded = Tokenizer.from_file(sys.argv[1])
after = loaded.encode("<s>").ids
print(f"before save: {tokenizer.encode_special_tokens} {before}; after from_file: {loaded.encode_special_tokens} {after}")
raise SystemExit(not (before == [4, 3, 5] and after == [1] and not loaded.encode_special_tokens))
PYTHON
