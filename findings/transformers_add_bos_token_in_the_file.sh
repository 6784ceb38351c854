#!/usr/bin/env bash
# transformers 5.23.0 (tokenizers 0.23.3): where tokenizer_class is PreTrainedTokenizerFast, "add_bos_token": true in
# tokenizer_config.json is dropped without a word: texts get no bos, and the attribute reads False. The same setting as
# an argument of from_pretrained works, and so does a post_processor in tokenizer.json.
#
# Guessed: from_pretrained takes each setting of tokenizer_config.json as if it had been given as an argument.
# Seen: without the setting: [3, 4]; add_bos_token in the file: False [3, 4]; as an argument: True [1, 3, 4]; with a
#   post_processor: [1, 3, 4]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: transformers==5.23.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import AutoTokenizer


def folder(name, post_processor=None, **settings):
    path = Path(sys.argv[1], name)
    path.mkdir()
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, []))
    tokenizer.add_special_tokens([AddedToken(entry, special=True) for entry in ("<pad>", "<s>", "</s>")])
    if post_processor:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return path


plain = AutoTokenizer.from_pretrained(folder("plain"))
in_file = AutoTokenizer.from_pretrained(folder("in_file", add_bos_token=True))
argument = AutoTokenizer.from_pretrained(folder("argument"), add_bos_token=True)
template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
processed = AutoTokenizer.from_pretrained(folder("processed", template))
ids = [tokenizer("ab").input_ids for tokenizer in (plain, in_file, argument, processed)]
print(
    f"without the setting: {ids[0]}; add_bos_token in the file: {in_file.add_bos_token} {ids[1]}; "
    f"as an argument: {argument.add_bos_token} {ids[2]}; with a post_processor: {ids[3]}"
)
raise SystemExit(ids != [[3, 4], [3, 4], [1, 3, 4], [1, 3, 4]])
PYTHON
