#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness): the metric "bypass", which its own predict-only runs use, is taken in a task's
# file as well. A task of output_type generate_until then has the score 999 in the results of lm_eval.evaluator.evaluate,
# beside the real scores of other tasks. A multiple_choice task asks all its questions and has no score at all; its
# sample_len is 0.
#
# Guessed: a metric that stands for no score leaves the task without one, whatever its output type.
# Seen: generate_until: bypass,none = 999; multiple_choice: 80 requests, no score, sample_len 0
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
data = folder / "questions.jsonl"
data.write_text("".join(json.dumps({"q": f"Is {n} odd?", "a": "yes" if n % 2 else "no"}) + "\n" for n in range(40)))
OF_KINDS = {"generate_until": "", "multiple_choice": 'doc_to_choice: ["yes", "no"]'}


class Model(LM):
    asked = 0

    def loglikelihood(self, requests):
        self.asked += len(requests)
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests): ...

    def generate_until(self, requests):
        return ["yes" for _ in requests]


def result_of(kind):
    file = folder / f"{kind}.yaml"
    file.write_text(f"""
task: odd_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: a
metric_list: [{{metric: bypass}}]
{OF_KINDS[kind]}
""")
    model = Model()
    tasks = TaskManager(include_defaults=False).load([str(file)])
    return evaluate(model, tasks, bootstrap_iters=0)["results"][f"odd_{kind}"], model.asked


generated, _ = result_of("generate_until")
chosen, asked = result_of("multiple_choice")
scores = [key for key in chosen if "," in key]
print(f"generate_until: bypass,none = {generated['bypass,none']}; multiple_choice: {asked} requests, "
      f"{len(scores) or 'no'} score, sample_len {chosen['sample_len']}")
raise SystemExit((generated["bypass,none"], asked, scores, chosen["sample_len"]) != (999, 80, [], 0))
PYTHON
