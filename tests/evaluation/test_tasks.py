"""Tasks of lm-evaluation-harness on a model: scores against the model's logits, one text at a time."""

import dataclasses
import math
import random
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data_pipeline.tokenizer import train
from megatron_tn.config import ConfigError
from megatron_tn.evaluation.tasks import load_tasks, problems_of_tasks, run_tasks
from megatron_tn.inference.generator import generate
from megatron_tn.inference.sampler import Sampler
from megatron_tn.loading import read_tokenizer
from megatron_tn.model.base import Model
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import ParallelContext
from tests.helpers.models import TINY, reference_model
from tests.helpers.ranks import run_ranks
from tests.helpers.tasks import CHOICES, TASKS, lm_eval, write_task, write_tasks

lm_eval()
CONFIG = dataclasses.replace(TINY, vocab_size=401)
NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "the cat sat on the mat and the dog sat on the log while 12 birds sang 99 songs.\nQuestion: Answer: yes no\n"
    found = train(lambda: [text * 30], CONFIG.vocab_size)
    found.encode_special_tokens = True
    return found


@pytest.fixture(scope="module")
def model() -> Model:
    return reference_model(CONFIG, seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def scores(model, tokenizer, folder) -> dict[str, dict[str, float]]:
    return run_tasks(model, tokenizer, load_tasks(NAMES, str(folder)))


@torch.no_grad()
def log_probability(model: Model, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Of texts whose border no merge crosses."""
    first, second = (tokenizer.encode(part, add_special_tokens=False).ids for part in (context, continuation))
    assert first + second == tokenizer.encode(context + continuation, add_special_tokens=False).ids
    ids = torch.tensor([[CONFIG.bos_id, *first, *second]])
    logs = model(ids).logits[0, len(first) : -1].double().log_softmax(-1)
    targets = ids[0, 1 + len(first) :]
    return logs.gather(1, targets.unsqueeze(1)).sum().item(), bool((logs.argmax(-1) == targets).all())


def accuracy(model: Model, tokenizer: Tokenizer, questions: list[tuple[str, list[str], int]], by_length: bool) -> float:
    right = 0
    for context, choices, label in questions:
        found = [log_probability(model, tokenizer, context, f" {choice}")[0] for choice in choices]
        found = [value / (len(choice) if by_length else 1) for value, choice in zip(found, choices, strict=True)]
        right += int(np.argmax(found)) == label
    return right / len(questions)


def test_multiple_choice(scores, model, tokenizer):
    documents = {name: data for name, (_, data) in TASKS.items()}
    questions = {
        "our_boolq": [
            (f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:", ["no", "yes"], d["label"])
            for d in documents["our_boolq"]
        ],
        "our_hellaswag": [(f"A cat: {d['ctx']}", d["endings"], int(d["label"])) for d in documents["our_hellaswag"]],
        "our_arc": [
            (f"Question: {d['question']}\nAnswer:", d["choices"]["text"], "ABC".index(d["answerKey"]))
            for d in documents["our_arc"]
        ],
    }
    for name, asked in questions.items():
        assert scores[name]["acc"] == accuracy(model, tokenizer, asked, by_length=False), name
        assert scores[name]["samples"] == len(asked)
    assert scores["our_boolq"]["acc_stderr"] == pytest.approx(
        math.sqrt(scores["our_boolq"]["acc"] * (1 - scores["our_boolq"]["acc"]) / 5)
    )


def test_likelihood_and_perplexity(scores, model, tokenizer):
    words = [d["text"].rpartition(" ") for d in TASKS["our_lambada"][1]]
    found = [log_probability(model, tokenizer, context, f" {word}") for context, _, word in words]
    assert scores["our_lambada"]["perplexity"] == pytest.approx(math.exp(-np.mean([nats for nats, _ in found])), 1e-5)
    assert scores["our_lambada"]["acc"] == np.mean([greedy for _, greedy in found])
    pages = [d["page"] for d in TASKS["our_wikitext"][1]]
    nats = sum(log_probability(model, tokenizer, "", page)[0] for page in pages)
    size = sum(len(page.encode()) for page in pages)
    assert scores["our_wikitext"]["bits_per_byte"] == pytest.approx(-nats / size / math.log(2), 1e-5)


CONTEXTS = [f"Question: {d['question']}\nAnswer:" for d in TASKS["our_gsm8k"][1]]


def requests() -> list:
    """Each context, continued by greedy decoding and by sampling."""
    from lm_eval.api.instance import Instance

    greedy = {"until": ["sat", "\n"], "max_gen_toks": 15, "do_sample": False}
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_gen_toks": 15, "until": []}
    both = [(context, settings) for settings in (greedy, sampled) for context in CONTEXTS]
    return [Instance("generate_until", {}, arguments, index) for index, arguments in enumerate(both)]


def test_generation(model, tokenizer, folder):
    from megatron_tn.evaluation.harness import HarnessModel

    found = HarnessModel(model, tokenizer, window=5).generate_until(requests())
    for context, text in zip(CONTEXTS, found, strict=False):
        prompt = [CONFIG.bos_id, *tokenizer.encode(context, add_special_tokens=False).ids]
        (ids,) = generate(model, [prompt], max_new_tokens=15, sampler=Sampler(temperature=0))
        alone = tokenizer.decode(ids)
        assert text == alone.partition("sat")[0].partition("\n")[0]
    assert HarnessModel(model, tokenizer, batch_tokens=64).generate_until(requests()) == found
    assert len(set(found[len(CONTEXTS) :])) == len(CONTEXTS)


def test_scores_depend_neither_on_the_batch_nor_on_the_window(scores, model, tokenizer, folder):
    for options in ({"batch_tokens": 1, "window": 16}, {"batch_tokens": 512, "window": 7}):
        other = run_tasks(model, tokenizer, load_tasks(NAMES, str(folder)), **options)
        for name, values in scores.items():
            assert other[name] == pytest.approx(values, abs=1e-5, rel=1e-5), (name, options)


class Generated(NamedTuple):
    """passes: forward passes. rows: of the largest."""

    texts: list[str]
    passes: int
    rows: int


def generated(model: Model, tokenizer: Tokenizer, rows: int) -> Generated:
    """Of `requests`, in batches of up to `rows`, however long their contexts are."""
    from megatron_tn.evaluation.harness import HarnessModel

    spread = mock.patch("megatron_tn.inference.rows.SPREAD", 200)
    with spread, mock.patch.object(model, "forward", wraps=model.forward) as forward:
        texts = HarnessModel(model, tokenizer, batch_tokens=rows * 64, window=5).generate_until(requests())
    return Generated(texts, forward.call_count, max(call.args[0].shape[0] for call in forward.call_args_list))


def on_ranks(tokenizer: str, folder: str, tp: int) -> tuple[dict[str, dict[str, float]], list[Generated]]:
    """Three rows: a batch more than two ranks can share. 64: one batch on one rank."""
    model = build_model(CONFIG, ParallelContext.create(tp))
    initialize(model, 1)
    read = read_tokenizer(Path(tokenizer))
    scores = run_tasks(model, read, load_tasks(NAMES, folder), batch_tokens=512)
    return scores, [generated(model, read, rows) for rows in (3, 64)]


@pytest.mark.parametrize("tp", [2, 1], ids="tp={}".format)
def test_ranks_score_as_one(scores, model, tokenizer, folder, tmp_path, tp):
    """Data-parallel ranks share the generation of texts, in equally many forward passes: the texts are those of one."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    alone = [generated(model, tokenizer, rows) for rows in (3, 64)]
    found = run_ranks(2, on_ranks, str(tmp_path / "tokenizer.json"), str(folder), tp)
    for own, of_rank in found:
        assert own == {name: pytest.approx(values, abs=1e-4, rel=1e-4) for name, values in scores.items()}
        for one, other, wanted in zip(of_rank, found[0][1], alone, strict=True):
            assert one.texts == (wanted.texts if tp == 1 else other.texts)
            assert one.passes == other.passes
        few, many = of_rank
        assert few.passes < alone[0].passes if tp == 1 else few.passes == alone[0].passes
        assert (alone[1].rows, many.rows) == (8, 8 if tp == 2 else 4)


def test_few_shot_examples_are_the_same_each_time_and_random_states_stay(scores, model, tokenizer, folder):
    """The harness draws them from a generator of the task, which goes on from one evaluation to the next."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    again = run_tasks(model, tokenizer, load_tasks(NAMES, str(folder)))
    assert again == scores
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_shots_and_limits(model, tokenizer, folder):
    tasks = load_tasks(("our_piqa",), str(folder))
    asked = [(f"Question: {d['goal']}\nAnswer:", [d["sol1"], d["sol2"]], d["label"]) for d in TASKS["our_piqa"][1][:3]]
    found = run_tasks(model, tokenizer, tasks, shots=0, limit=3)["our_piqa"]
    assert found["samples"] == 3
    assert found["acc_norm"] == accuracy(model, tokenizer, asked, by_length=True)


UNREADABLE = "output_type: ["
GENERATED, QUESTIONS = TASKS["our_gsm8k"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("{folder}/absent.yaml",), "tasks={folder}/absent.yaml: there is no such file"),
        (("beams",), "tasks=beams: beams sets num_beams in generation_kwargs; known are until, "),
        (("bypass",), "tasks=bypass: bypass has the metric bypass, which stands for no score"),
        (("none",), "tasks=none: none: generation_kwargs: max_gen_toks=0 must be at least 1"),
        (("many",), "tasks=many: many: generation_kwargs: invalid literal for int() with base 10: 'many'"),
        (("cold",), "tasks=cold: cold: generation_kwargs: temperature=-1.0 must be at least 0, and finite"),
        (("stop",), "tasks=stop: stop: generation_kwargs: until=3 is not a text"),
        (("empty",), "tasks=empty: its data has no documents"),
        (
            ("words",),
            "tasks=words: words: document 1: doc_to_target gives 'the cat sat on the mat', which is none of the",
        ),
        (("beyond",), "tasks=beyond: document 1: doc_to_target gives a place that is none of doc_to_choice's"),
        (
            ("later",),
            "tasks=later: later: document 2: doc_to_target gives 2, but the places of the choices ['no', 'yes'] are",
        ),
        (
            ("before",),
            "tasks=before: before: document 2: doc_to_target gives -1, but the places of the choices ['no', 'yes']",
        ),
        (("no_data",), "tasks=no_data: it cannot be read: FileNotFoundError: "),
        (("no_field",), "tasks=no_field: it cannot be read: UndefinedError: 'pasage' is undefined"),
        (("fine", "{folder}/fine.yaml"), "tasks={folder}/fine.yaml: task fine is in another one of fine,"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_tasks_that_cannot_be_run(tmp_path, names, message):
    text, documents = TASKS["our_boolq"]
    for name, setting in {
        "beams": "num_beams: 4",
        "none": "max_gen_toks: 0",
        "many": "max_gen_toks: many",
        "cold": "temperature: -1",
    }.items():
        text_of = GENERATED.replace("max_gen_toks: 12", setting)
        write_task(tmp_path, name, text_of.replace("do_sample: false", "do_sample: true"), QUESTIONS)
    write_task(tmp_path, "stop", GENERATED.replace('["Question:", " x"]', "3"), QUESTIONS)
    write_task(tmp_path, "empty", text, [])
    write_task(tmp_path, "bypass", text.replace("metric: acc", "metric: bypass"), documents)
    write_task(tmp_path, "words", text.replace("doc_to_target: label", "doc_to_target: passage"), documents)
    for name, changed, label in (("beyond", 0, 2), ("later", 1, 2), ("before", 1, -1)):
        labelled = [one | {"label": label} if number == changed else one for number, one in enumerate(documents)]
        write_task(tmp_path, name, text, labelled)
    write_task(tmp_path, "fine", text, documents)
    write_task(tmp_path, "no_field", text.replace("{{passage}}", "{{pasage.x}}"), documents)
    write_task(tmp_path, "no_data", text, documents)
    (tmp_path / "no_data.jsonl").unlink()
    with pytest.raises(ConfigError) as error:
        load_tasks(tuple(name.format(folder=tmp_path) for name in names), str(tmp_path))
    (line,) = error.value.problems
    assert line.startswith(message.format(folder=tmp_path))
    assert "\n" not in line


def test_what_a_model_cannot_run_is_known_before(folder):
    """More examples than documents; more tokens than a cosFormer is built for."""
    tasks = load_tasks(("our_piqa", "our_gsm8k"), str(folder))
    assert problems_of_tasks(tasks, max_length=12) == []
    assert problems_of_tasks(tasks, max_length=0, shots=3) == []
    (line,) = problems_of_tasks(tasks, max_length=11)
    assert line == "tasks: our_gsm8k generates max_gen_toks=12 > model.max_length=11 tokens"
    lines = problems_of_tasks(tasks, 0, shots=9, setting="evaluation.tasks")
    assert [line.rpartition(": ValueError")[0] for line in lines] == [
        "evaluation.tasks: our_piqa: shots=9 of its 5 documents cannot be examples",
        "evaluation.tasks: our_gsm8k: shots=9 of its 4 documents cannot be examples",
    ]


ANSWERS = 'output_type: multiple_choice\ndoc_to_text: "{{q.x}}"\ndoc_to_target: 0\ndoc_to_choice: "{{c}}"\n'
CODE = """
import numpy, torch
def results(doc, results): return dict.fromkeys(("numpy", "torch", "text"), 1.0)
def of_numpy(items): return numpy.float32(0.5)
def of_torch(items): return torch.tensor(0.25)
def of_text(items): return "good"
def fails(items): raise KeyError("no\\nkey")
def needs(items): import no_such_library
"""


def own_metrics(folder: Path, name: str, functions: dict[str, str]) -> None:
    """A task whose metrics are computed by functions of CODE."""
    listed = ", ".join(f"{{metric: {key}, aggregation: !function {name}_code.{of}}}" for key, of in functions.items())
    (folder / f"{name}_code.py").write_text(CODE)
    text = f"{ANSWERS}process_results: !function {name}_code.results\nmetric_list: [{listed}]"
    write_task(folder, name, text, [{"q": {"x": "the"}, "c": ["a", "b"]}] * 2)


def test_a_task_whose_later_documents_or_metrics_cannot_be_used_is_known_before(tmp_path):
    """The harness finds the first when the model is loaded, the second when all answers are there."""
    choices = ANSWERS + 'target_delimiter: ""\n' + CHOICES
    write_task(tmp_path, "gap", choices, [{"q": {"x": "the"}, "c": ["a", "b"]}, {"q": None, "c": ["a", "b"]}])
    write_task(tmp_path, "blank", choices, [{"q": {"x": "the"}, "c": ["a", "b"]}, {"q": {"x": "cat"}, "c": ["a", ""]}])
    own_metrics(tmp_path, "library", {"numpy": "needs"})
    tasks = load_tasks(("gap", "blank", "library"), str(tmp_path))
    assert problems_of_tasks(tasks, 0, setting="evaluation.tasks") == [
        "evaluation.tasks: gap: document 2 cannot be read: UndefinedError: 'None' has no attribute 'x'",
        "evaluation.tasks: blank: document 2: nothing can be scored: an answer is empty, and so is target_delimiter",
        "evaluation.tasks: library: numpy cannot be computed: ModuleNotFoundError: No module named 'no_such_library'",
    ]
    assert problems_of_tasks({"tasks": {"gap": tasks["tasks"]["gap"]}}, 0, limit=1) == []


def test_metrics_of_a_tasks_own(model, tokenizer, tmp_path, caplog):
    """Numbers of numpy and PyTorch are scores; a text is left out with a line; code that fails is named."""
    own_metrics(tmp_path, "own", {"numpy": "of_numpy", "torch": "of_torch", "text": "of_text"})
    own_metrics(tmp_path, "failing", {"numpy": "fails"})
    caplog.set_level("INFO")
    found = run_tasks(model, tokenizer, load_tasks(("own",), str(tmp_path)))
    assert found == {"own": {"numpy": 0.5, "torch": 0.25, "samples": 2}}
    assert "task own: text is left out: 'good' is no number" in caplog.messages
    tasks = load_tasks(("failing", "own"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"^task failing cannot be scored: KeyError: 'no\\nkey'$"):
        run_tasks(model, tokenizer, tasks)
    broken = mock.patch.object(model, "forward", side_effect=KeyError("the model's"))
    with broken, pytest.raises(KeyError, match="the model's"):
        run_tasks(model, tokenizer, tasks)


def test_a_task_file_that_is_no_yaml_is_named(tmp_path):
    """The harness passes over such a file in a folder."""
    file = write_task(tmp_path, "broken", UNREADABLE, [])
    with pytest.raises(ConfigError, match=rf"^task_folder={tmp_path}: {file} cannot be read: while parsing"):
        load_tasks(("broken",), str(tmp_path))
    with pytest.raises(ConfigError, match=r"^evaluation\.task_folder=nowhere is no folder$"):
        load_tasks(("broken",), "nowhere", "evaluation.tasks")


def test_a_task_that_does_not_exist(folder, monkeypatch):
    """Without the harness's own tasks, thousands of files."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "megatron_tn.evaluation.tasks._all_tasks", lambda path: TaskManager(include_path=path, include_defaults=False)
    )
    with pytest.raises(ConfigError, match=r"^tasks=our_bolq: there is no such task; did you mean our_boolq"):
        load_tasks(("our_bolq",), str(folder))
