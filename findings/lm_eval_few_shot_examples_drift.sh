#!/usr/bin/env bash
# lm_eval 0.4.13 (lm-evaluation-harness): lm_eval.evaluator.evaluate(model, tasks) called twice with the same loaded
# tasks asks other prompts the second time: few-shot examples are drawn from a random generator that belongs to the task,
# and the second call goes on where the first one stopped. Scores of one model, as of a model while it trains, then
# differ from call to call. task.set_fewshot_seed(seed) before each call makes prompts equal.
#
# Guessed: prompts depend on the task, its data and the seed, so that the same call gives the same prompts.
# Seen: same tasks, twice: prompts equal: False; seeded before each call: equal: True
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
data.write_text("".join(json.dumps({"q": f"question {n}", "a": "yes" if n % 2 else "no"}) + "\n" for n in range(40)))
(folder / "task.yaml").write_text(f"""
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
test_split: test
fewshot_split: train
num_fewshot: 3
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: a
""")


class Model(LM):
    def loglikelihood(self, requests):
        self.prompts = [request.args[0] for request in requests]
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests): ...

    def generate_until(self, requests): ...


model = Model()
tasks = TaskManager(include_defaults=False).load([str(folder / "task.yaml")])


def prompts(seed=None):
    if seed is not None:
        tasks["tasks"]["ours"].set_fewshot_seed(seed)
    evaluate(model, tasks, bootstrap_iters=0)
    return model.prompts


plain, seeded = prompts() == prompts(), prompts(1) == prompts(1)
print(f"same tasks, twice: prompts equal: {plain}; seeded before each call: equal: {seeded}")
raise SystemExit((plain, seeded) != (False, True))
PYTHON
