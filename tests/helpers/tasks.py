"""Tasks in the formats of lm-evaluation-harness's own BoolQ, PIQA, HellaSwag, ARC, LAMBADA, WikiText and GSM8K, with
data of our own beside them."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CHOICES = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
TASKS = {
    "our_boolq": (
        r"""
output_type: multiple_choice
doc_to_text: "{{passage}}\nQuestion: {{question}}?\nAnswer:"
doc_to_target: label
doc_to_choice: ["no", "yes"]
"""
        + CHOICES,
        [
            {"passage": "the cat sat on the mat", "question": f"did {n} birds sing {n} songs", "label": n % 2}
            for n in range(6)
        ],
    ),
    "our_piqa": (
        r"""
output_type: multiple_choice
training_split: validation
fewshot_split: validation
num_fewshot: 1
doc_to_text: "Question: {{goal}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
"""
        + CHOICES.replace("]", ", {metric: acc_norm, aggregation: mean, higher_is_better: true}]"),
        [
            {"goal": f"let {n} birds sing", "sol1": "sat on the mat and " * (n + 1), "sol2": "the log", "label": n % 2}
            for n in range(5)
        ],
    ),
    "our_hellaswag": (
        r"""
output_type: multiple_choice
process_docs: !function our_utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: choices
"""
        + CHOICES,
        [
            {"ctx": "the cat sat", "endings": ["on the mat.", "on the log.", "and", "songs"], "label": str(n % 4)}
            for n in range(4)
        ],
    ),
    "our_arc": (
        r"""
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
"""
        + CHOICES,
        [
            {
                "question": f"how many birds sang the {n} songs?",
                "choices": {"text": ["99", "the dog", f"{n}"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[n % 3],
            }
            for n in range(4)
        ],
    ),
    "our_lambada": (
        r"""
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
        [{"text": f"the cat sat on the mat and the dog sat on {n} birds"} for n in range(3)],
    ),
    "our_wikitext": (
        r"""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
        [{"page": "<s> = the cat =\n" + "the dog sang 12 songs for the mat.\n" * n} for n in (1, 12, 3)],
    ),
    "our_gsm8k": (
        r"""
output_type: generate_until
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, regexes_to_ignore: [","]}
generation_kwargs: {until: ["Question:", " x"], do_sample: false, max_gen_toks: 12}
filter_list:
  - name: first-number
    filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]
""",
        [{"question": f"{n} birds sang {n} songs " * (1 + 5 * n), "answer": "1"} for n in range(4)],
    ),
}
UTILS = """
def process_docs(dataset):
    return dataset.map(lambda doc: {"query": "A cat: " + doc["ctx"], "choices": doc["endings"]})
"""


def lm_eval() -> ModuleType:
    """The package, told to look nothing up on a network, its data cached in a temporary folder. Skips the test where it
    is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "HF_DATASETS_CACHE" not in os.environ:
        os.environ["HF_DATASETS_CACHE"] = cache = tempfile.mkdtemp(prefix="datasets-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install -e '.[eval]')")


def write_tasks(folder: Path) -> Path:
    """A folder of all TASKS."""
    (folder / "our_utils.py").write_text(UTILS)
    for name, (text, documents) in TASKS.items():
        write_task(folder, name, text, documents)
    return folder


def write_task(folder: Path, name: str, text: str, documents: list[dict[str, Any]]) -> Path:
    """The task file; its data lies beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
    file = folder / f"{name}.yaml"
    file.write_text(f"{head}validation_split: validation\n{text}")
    return file
