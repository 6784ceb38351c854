#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness): of a folder of task files (include_path), one that cannot be read, by an error
# of YAML or a misspelled file in `include:`, is left out without a word: the line about it is of level DEBUG. Its task is
# then "not a registered task", and a tag that it has is evaluated without it, as a smaller benchmark of the same name.
#
# Guessed: TaskManager raises, or at least warns, for a task file that it cannot read.
# Seen: tasks of tag "ours": ['one', 'two']; after an error in two.yaml: ['one'], and warnings: []
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "$@"; }
pip datasets==5.2.0 sacrebleu==2.6.0 jinja2==3.1.6 more-itertools==11.2.1 requests==2.34.2
pip --no-deps lm_eval==0.4.13
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import json
import logging
import sys
from pathlib import Path

from lm_eval.tasks import TaskManager

folder = Path(sys.argv[1])
data = folder / "data.jsonl"
data.write_text(json.dumps({"q": "1 + 1?", "answer": "2"}) + "\n")
for name in ("one", "two"):
    (folder / f"{name}.yaml").write_text(f"""
task: {name}
tag: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["1", "2"]
doc_to_target: answer
""")
said = []


class Listener(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.INFO and "two" in record.getMessage():
            said.append(record.getMessage())


logging.basicConfig(level=logging.INFO, handlers=[Listener()])


def tasks_of_tag():
    return sorted(TaskManager(include_path=str(folder), include_defaults=False).load(["ours"])["tasks"])


before = tasks_of_tag()
with (folder / "two.yaml").open("a") as file:
    file.write("include: absent.yaml\n")
after = tasks_of_tag()
print(f'tasks of tag "ours": {before}; after an error in two.yaml: {after}, and warnings: {said}')
raise SystemExit((before, after, said) != (["one", "two"], ["one"], []))
PYTHON
