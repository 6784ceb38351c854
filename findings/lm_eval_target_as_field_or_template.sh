#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness): in a multiple-choice task whose choices are numbers, `doc_to_target: answer` and
# `doc_to_target: "{{answer}}"` name different right answers, though both give the text of the field `answer`. What a
# template gives is read as the place of a choice, from 0, if it is digits alone, and else looked up among the choices; a
# field's text is always looked up. With the choices 1, 2, 3 and the answer "2", the template's right answer is 3.
#
# Guessed: a template that has nothing but a field means what the field's name means.
# Seen: a model that always chooses the answer: accuracy by field 1.0, by template 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "$@"; }
pip datasets==5.2.0 sacrebleu==2.6.0 jinja2==3.1.6 more-itertools==11.2.1 requests==2.34.2
pip --no-deps lm_eval==0.4.13
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import json
import sys
from pathlib import Path

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

folder = Path(sys.argv[1])
data = folder / "data.jsonl"
data.write_text("".join(json.dumps({"q": f"1 + {n}?", "answer": str(1 + n)}) + "\n" for n in (0, 1)))
for name, target in (("field", "answer"), ("template", "'{{answer}}'")):
    (folder / f"{name}.yaml").write_text(f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["1", "2", "3"]
doc_to_target: {target}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")


class Right(LM):
    def loglikelihood(self, requests):
        return [(0.0 if request.args[1].strip() == request.doc["answer"] else -1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests): ...

    def generate_until(self, requests): ...


manager = TaskManager(include_path=str(folder), include_defaults=False)
found = evaluate(Right(), manager.load(["field", "template"]), bootstrap_iters=0)["results"]
field, template = (float(found[name]["acc,none"]) for name in ("field", "template"))
print(f"a model that always chooses the answer: accuracy by field {field}, by template {template}")
raise SystemExit((field, template) != (1.0, 0.0))
PYTHON
