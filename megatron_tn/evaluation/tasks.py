"""Tasks of lm-evaluation-harness: found and read before a model is loaded, and run on one.

lm_eval is an extra, imported when tasks are asked for. Its files are YAML; data is read by `datasets`, from the hub or
from local files.
"""

import contextlib
import difflib
import functools
import itertools
import logging
import math
import os
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from megatron_tn.config import ConfigError
from megatron_tn.model.base import Model

log = logging.getLogger(__name__)

SEED = 1234  # for the choice of few-shot examples; the harness's own default
RESAMPLES = 100  # of the bootstrap, for the standard error of metrics that are no mean

# What raises IndexError in the harness, by the error's text.
FIRST_DOCUMENT = {
    "list index out of range": "document 1: doc_to_target gives a place that is none of doc_to_choice's",
    "string index out of range": "document 1: a choice is empty",
}

# {"tasks": {name: task}, "groups": ..., "group_map": ...}, as lm_eval's TaskManager returns it.
TaskSet = dict[str, Any]


@functools.lru_cache(maxsize=4)
def load_tasks(names: tuple[str, ...], folder: str, setting: str = "tasks") -> TaskSet:
    """The tasks with their data. names: of tasks, groups or tags that the harness or a file below `folder` has, or
    paths of task files. setting: the one that names them.

    Raises:
        ConfigError: the extra is missing; a task does not exist or cannot be read, or needs what `HarnessModel` lacks.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"{setting} needs the extra eval, pip install -e '.[eval]': {error}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if problems := _unreadable(folder, setting):
        raise ConfigError(problems)
    manager = TaskManager(include_path=folder or None, include_defaults=False)
    if any(not _is_file(name) and name not in manager.all_tasks for name in names):
        manager = _all_tasks(folder)
    found: TaskSet = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            loaded = _load(manager, name)
        except ConfigError as error:
            problems += [f"{setting}={name}: {line}" for line in error.problems]
            continue
        for task in loaded["tasks"].keys() & found["tasks"].keys():
            problems.append(f"{setting}={name}: task {task} is in another one of {','.join(names)}, too")
        for kind, values in loaded.items():
            found[kind] |= values
    if problems:
        raise ConfigError(problems)
    return found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager: Any, name: str) -> TaskSet:
    if _is_file(name) and not Path(name).is_file():
        raise ConfigError("there is no such file")
    if not _is_file(name) and name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=2)
        raise ConfigError("there is no such task" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    try:
        with _quiet():
            loaded = manager.load([name])
    except StopIteration:
        raise ConfigError("its data has no documents") from None
    except IndexError as error:  # the harness tries the first document
        raise ConfigError(FIRST_DOCUMENT.get(str(error), f"it cannot be read: {_line(error)}")) from None
    except Exception as error:  # whatever YAML, jinja, datasets or a task's own code raises
        raise ConfigError(f"it cannot be read: {_line(error.__cause__ or error)}") from None
    if problems := [line for task in loaded["tasks"].values() for line in _unsupported(task)]:
        raise ConfigError(problems)
    return loaded


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@functools.lru_cache(maxsize=2)
def _all_tasks(folder: str) -> Any:
    """The harness's tasks and those below `folder`: thousands of files, which takes some ten seconds."""
    from lm_eval.tasks import TaskManager

    log.info("looking through the task files of lm-evaluation-harness")
    return TaskManager(include_path=folder or None)


def _unreadable(folder: str, setting: str) -> list[str]:
    """One line for each task file below `folder` that cannot be read: the harness passes over it without a word."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder:
        return []
    setting = f"{setting.removesuffix('tasks')}task_folder={folder}"
    if not Path(folder).is_dir():
        return [f"{setting} is no folder"]
    found = []
    for path in sorted(Path(folder).glob("**/*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            found.append(f"{setting}: {path} cannot be read: {' '.join(str(error).split())}")
    return found


def _unsupported(task: Any) -> Iterator[str]:
    from megatron_tn.evaluation.harness import GENERATION, generation_of

    if getattr(task, "UNSAFE_CODE", False):
        yield f"{task.task_name} runs code that the model writes, which is refused here"
    if getattr(task, "MULTIMODAL", False):
        yield f"{task.task_name} has images or sound, but the model reads text alone"
    if "bypass" in task.aggregation():
        yield f"{task.task_name} has the metric bypass, which stands for no score"
    if task.OUTPUT_TYPE == "multiple_choice" and not getattr(task, "multiple_input", True):
        yield from itertools.islice(_questions_without_answer(task), 1)
    settings = (task.get_config("generation_kwargs") or {}) if task.OUTPUT_TYPE == "generate_until" else {}
    if unknown := settings.keys() - set(GENERATION):
        wrong, known = ", ".join(sorted(unknown)), ", ".join(GENERATION)
        yield f"{task.task_name} sets {wrong} in generation_kwargs; known are {known}"
        return
    try:
        generation_of(settings)
    except ConfigError as error:
        yield from (f"{task.task_name}: generation_kwargs: {line}" for line in error.problems)


def _questions_without_answer(task: Any) -> Iterator[str]:
    """A line for each document whose target is none of its choices: the harness counts every such question as wrong."""
    for number, document in enumerate(task.task_docs, start=1):
        target, choices = task.doc_to_target(document), task.doc_to_choice(document)
        where = f"{task.task_name}: document {number}: doc_to_target gives {target!r}"
        if isinstance(target, str) and target not in choices:
            yield f"{where}, which is none of the choices {choices}"
        if isinstance(target, int) and not 0 <= target < len(choices):
            yield f"{where}, but the places of the choices {choices} are 0 to {len(choices) - 1}"


def problems_of_tasks(
    tasks: TaskSet, max_length: int, shots: int = -1, limit: int = 0, setting: str = "tasks"
) -> list[str]:
    """Why tasks that were loaded cannot be run by a model built for `max_length` tokens (0: any number), one line each.
    shots, limit: see `run_tasks`; setting: the one that names the tasks."""
    from megatron_tn.evaluation.harness import generation_of

    found = []
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until" and max_length:
            _, most, _ = generation_of(task.get_config("generation_kwargs") or {})
            if most > max_length:
                found.append(f"{setting}: {name} generates max_gen_toks={most} > model.max_length={max_length} tokens")
        if number := _shots(task, shots):
            try:
                with _quiet():
                    task.fewshot_context(next(iter(task.eval_docs)), number)
            except Exception as error:  # whatever jinja or the harness's choice of examples raises
                of = len(list(task.fewshot_docs()))
                which = "num_fewshot" if shots < 0 else "shots"
                found.append(
                    f"{setting}: {name}: {which}={number} of its {of} documents cannot be examples: {_line(error)}"
                )
        found += [f"{setting}: {name}: {line}" for line in (*_unmeasurable(task), *_unaskable(task, limit))]
    return found


def _unmeasurable(task: Any) -> Iterator[str]:
    """A line for each metric whose library is not installed: the harness imports it when all answers are there."""
    for metric, aggregate in task.aggregation().items():
        try:
            aggregate([])
        except ImportError as error:
            yield f"{metric} cannot be computed: {_line(error)}"
        except Exception:  # of no answers there is no mean
            pass


def _unaskable(task: Any, limit: int) -> Iterator[str]:
    """A line for the first document of which no requests can be made, or one without a token to be scored."""
    for number, document in enumerate(itertools.islice(task.eval_docs, limit or None), start=1):
        try:
            context = task.fewshot_context(document, 0, gen_prefix=task.doc_to_prefix(document))
            made = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, number, 1))
        except Exception as error:  # whatever jinja or the task's own code raises
            yield f"document {number} cannot be read: {_line(error)}"
            return
        for request in made if isinstance(made, list) else [made]:
            if request.request_type == "loglikelihood" and not request.args[1]:
                yield f"document {number}: nothing can be scored: an answer is empty, and so is target_delimiter"
                return


def _shots(task: Any, shots: int) -> int:
    return (task.get_config("num_fewshot") if shots < 0 else shots) or 0


def run_tasks(
    model: Model,
    tokenizer: Tokenizer,
    tasks: TaskSet,
    *,
    shots: int = -1,
    limit: int = 0,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> score; metrics of a filter of the task are named METRIC,FILTER. "samples" is the
    number of documents, METRIC_stderr the standard error. A metric that is no number is left out, with
    a line in the log.

    shots: examples in front of each question; -1: as many as the task says. limit: documents of each task, the first
    ones; 0: all. options: of `HarnessModel`. Few-shot examples depend on SEED alone, and no random state is
    changed. Collective: every rank gets the scores.

    Raises:
        ConfigError: a task's own code failed on the answers.
    """
    from lm_eval.evaluator import evaluate

    from megatron_tn.evaluation.harness import HarnessModel

    for task in tasks["tasks"].values():
        # The harness leaves both to its command line. A task draws on from where its last evaluation stopped.
        task.set_fewshot_seed(SEED)
        task.set_config("num_fewshot", _shots(task, shots))
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the bootstrap would fork a process that has threads
    with random_states_kept(), _quiet(), _failure_is_named(tasks):
        found = evaluate(
            HarnessModel(model, tokenizer, **options),
            tasks,
            limit=limit or None,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    scores = {}
    for name, values in found["results"].items():
        metrics = {key.removesuffix(",none"): value for key, value in values.items() if "," in key}
        numbers = {metric: number for metric, value in metrics.items() if (number := _number(value)) is not None}
        for metric in metrics.keys() - numbers.keys():
            if "_stderr" not in metric:  # "N/A" where it is not known
                log.info("task %s: %s is left out: %.50r is no number", name, metric, metrics[metric])  # on rank 0
        scores[name] = numbers
        if name in found["n-samples"]:
            scores[name]["samples"] = found["n-samples"][name]["effective"]
    return scores


def _number(value: Any) -> float | None:
    """A number of Python's, numpy's or PyTorch's; None for anything else."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    return float(value) if isinstance(value, float | int) else None


@contextlib.contextmanager
def _failure_is_named(tasks: TaskSet) -> Iterator[None]:
    """An error of a task's own code, such as a metric's, becomes a ConfigError that names the task; the model's errors
    stay what they are."""
    from megatron_tn.evaluation.harness import HarnessModel

    try:
        yield
    except Exception as error:
        places = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        failed = [name for place in places for name, task in tasks["tasks"].items() if place.get("task") is task]
        if not failed or any(isinstance(place.get("self"), HarnessModel) for place in places):
            raise
        raise ConfigError(f"task {failed[-1]} cannot be scored: {_line(error)}") from error


def journal_names(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Scores by the names that a run's journal has for them: tasks/TASK/METRIC."""
    return {
        f"tasks/{task}/{metric}": value
        for task, values in scores.items()
        for metric, value in values.items()
        if metric != "samples" and "_stderr" not in metric
    }


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, numpy's and PyTorch's random states are afterwards what they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: the harness shows no progress bars and prints nothing, since standard output is for the
    result."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
