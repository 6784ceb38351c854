"""Held-out bits per byte of a checkpoint or a released model, and its scores in tasks of lm-evaluation-harness.

python -m megatron_tn.evaluate checkpoint=runs/demo manifest=runs/demo/data/heldout/manifest.json
python -m megatron_tn.evaluate checkpoint=export/ tasks=[boolq,piqa,hellaswag]           docs/evaluation.md
torchrun --nproc-per-node 8 -m megatron_tn.evaluate checkpoint=runs/65b ...              split by tensor parallelism
torchrun --nproc-per-node 8 -m megatron_tn.evaluate checkpoint=runs/1b tp=1 ...          each process evaluates a share

Tables have bits per byte by source, beside those of gzip, xz and, with train_manifest=, a unigram model on the same
text, and the tasks' scores. output=FILE writes all as JSON, bits per byte by position in the document too; json=true
prints that. A figure that is not finite, as of a model that diverged, is null there.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers import Tokenizer

from data_pipeline.shards import read_documents
from data_pipeline.stream import InputError, Manifest
from megatron_tn.cli import command, is_first_process, run_program
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ConfigError, EvaluateConfig, TrainConfig, changed, out_of_bounds, unwritable
from megatron_tn.data import other_tokenizer as other_tokenizer_than_training
from megatron_tn.data import tokenizer_file
from megatron_tn.engine.base import Engine
from megatron_tn.evaluation.baselines import compressor_bits_per_byte, unigram_bits_per_byte
from megatron_tn.evaluation.continuations import continue_texts, prompt_problems
from megatron_tn.evaluation.perplexity import Documents, Sums, evaluate_documents
from megatron_tn.evaluation.progress import DocumentProgress
from megatron_tn.evaluation.tasks import TaskSet, journal_names, load_tasks, problems_of_tasks, run_tasks
from megatron_tn.held_out import (
    held_out_documents,
    held_out_loss,
    laid_end_to_end,
    load_manifest,
    problems_of_held_out,
)
from megatron_tn.loading import (
    load_any_model,
    load_tokenizer,
    memory_is_named,
    model_config,
    other_tokenizer,
    problems_of_vocabulary,
    read_tokenizer,
    resolve_checkpoint,
    tensor_parallel,
)
from megatron_tn.model.base import Model
from megatron_tn.parallel.world import world_size

log = logging.getLogger(__name__)

# What is evaluated -> the settings that are of it alone.
OF_INPUTS = {
    "manifest": ("train_manifest", "max_documents", "max_document_tokens", "sequence_tokens"),
    "tasks": ("task_folder", "task_documents", "shots"),
}
# Long documents are read DOCUMENTS at a time, in windows of batch_tokens // DOCUMENTS tokens: few windows, since each
# costs a forward pass's kernel launches, and few decoding states, since a Transformer's grow with the document.
DOCUMENTS, SHORTEST_WINDOW = 8, 256


@command(EvaluateConfig, "evaluate")
def main(config: EvaluateConfig) -> None:
    tasks = check(config)
    with tensor_parallel(config.device, config.tp) as (context, device):
        tokenizer = load_tokenizer(config.tokenizer, config.checkpoint)
        model = load_any_model(config.checkpoint, device, config.precision, context, fp8_weights=config.fp8_weights)
        result: dict[str, Any] = {"checkpoint": config.checkpoint}
        failure = None
        with memory_is_named(f"batch_tokens={config.batch_tokens}"):
            if config.manifest:
                result |= held_out_figures(config, model, tokenizer)
            if tasks:
                try:
                    result["tasks"] = task_scores(config, model, tokenizer, tasks)
                except ConfigError as error:  # of a metric, on every rank alike, when all answers are there
                    if not config.manifest:
                        raise
                    failure = error
    if is_first_process():
        content = json.dumps(_with_null(result), indent=1, allow_nan=False)
        if config.json:
            print(content)
        else:
            show(result)
        if config.output:
            write(content, config)
        if not config.json:
            print(f"wrote {config.output}" if config.output else "json=true prints all of it, output=FILE writes it")
    if failure:
        raise failure


def write(content: str, config: EvaluateConfig) -> None:
    """Write the figures to the output, and print them where they would be lost otherwise. Raises ConfigError."""
    try:
        Path(config.output).write_text(content + "\n")
    except OSError as error:
        if not config.json:
            print(content)
        raise ConfigError(f"output={config.output} cannot be written: {error.strerror}") from None


def _with_null(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have; as in a run's journal."""
    if isinstance(value, dict):
        return {key: _with_null(below) for key, below in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(config: EvaluateConfig) -> TaskSet | None:
    """The tasks, if there are any. Raises ConfigError with every problem that can be known before a model is loaded."""
    problems, tasks = list(out_of_bounds(config).values()), None
    try:
        resolve_checkpoint(config.checkpoint)
    except ConfigError as error:
        problems += error.problems
    if not config.manifest and not config.tasks:
        problems.append("manifest is not set: name the manifest.json of held-out shards, or tasks")
    for needed, names in OF_INPUTS.items():
        if not getattr(config, needed):
            problems += [f"{said} needs {needed}, which is not set" for said in changed(config, names)]
    for path, prefix in ((config.manifest, ""), (config.train_manifest, "train_")):
        try:
            if path:
                Manifest.load(path)
        except InputError as error:
            problems += [f"{prefix}{problem}" for problem in error.problems]
    for setting in ("max_document_tokens", "sequence_tokens"):
        if getattr(config, setting) == 1:
            problems.append(f"{setting}=1 must be 0 or at least 2: nothing predicts the first token of a sequence")
    problems += unwritable("output", config.output)
    if config.tp and world_size() % config.tp:
        problems.append(f"tp={config.tp} must divide the number of processes, which is {world_size()}")
    try:
        if config.tasks:
            tasks = load_tasks(tuple(config.tasks), config.task_folder)
        if tasks and not problems:
            model, tokenizer = model_config(config.checkpoint), load_tokenizer(config.tokenizer, config.checkpoint)
            problems += problems_of_vocabulary(tokenizer, model, config.checkpoint)
            problems += problems_of_tasks(tasks, model.max_length, config.shots, config.task_documents)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tasks


def held_out_figures(config: EvaluateConfig, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    held_out, setting = load_manifest(config.manifest), f"manifest={config.manifest}"
    problems = problems_of_held_out(held_out, setting, model.config.vocab_size)
    if problems := problems or other_tokenizer(held_out, setting, config.tokenizer, config.checkpoint):
        raise ConfigError(problems)
    documents = held_out_documents(config.manifest, config.max_documents, config.max_document_tokens)
    if config.sequence_tokens:
        documents = laid_end_to_end(documents, config.sequence_tokens)
    options = {"batch_tokens": config.batch_tokens, "window": max(SHORTEST_WINDOW, config.batch_tokens // DOCUMENTS)}
    size, hidden = (len(documents.tokens), sum(map(len, documents.tokens))), not is_first_process()
    with DocumentProgress("evaluate", *size, hidden=hidden) as shown:
        found = evaluate_documents(model, documents, progress=shown.advance, **options)
    bits_per_byte = {"model": found.bits_per_byte}
    if config.train_manifest:
        training = (document.tokens for document in read_documents(load_manifest(config.train_manifest)))
        bits_per_byte["unigram"] = unigram_bits_per_byte(
            training, documents.tokens, found.text_bytes, model.config.vocab_size
        )
    with DocumentProgress("compress", *size, hidden=hidden) as shown:
        bits_per_byte |= compressor_bits_per_byte(texts(documents, tokenizer, shown))
    return {
        "manifest": config.manifest,
        "documents": found.documents,
        "tokens": found.tokens,
        "text_bytes": found.text_bytes,
        "nats_per_token": found.nats_per_token,
        "bits_per_byte": bits_per_byte,
        "sources": {name: figures(sums) for name, sums in found.sources.items()},
        "positions": {str(first): figures(sums) for first, sums in found.positions.items()},
    }


def texts(documents: Documents, tokenizer: Tokenizer, shown: DocumentProgress) -> Iterator[bytes]:
    for ids in documents.tokens:
        yield tokenizer.decode(list(ids)).encode()
        shown.advance(1, len(ids))


def figures(sums: Sums) -> dict[str, Any]:
    """Figures of `sums` by name; without bits_per_byte where the bytes of tokens are not known."""
    found = {"tokens": sums.tokens, "nats_per_token": sums.nats_per_token}
    return found | ({"text_bytes": sums.text_bytes, "bits_per_byte": sums.bits_per_byte} if sums.text_bytes else {})


def task_scores(
    config: EvaluateConfig, model: Model, tokenizer: Tokenizer, tasks: TaskSet
) -> dict[str, dict[str, float]]:
    columns = (SpinnerColumn(), TextColumn("tasks: {task.completed:.0f} requests done"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not is_first_process(), console=Console(stderr=True)) as bar:
        done = bar.add_task("", total=None)
        return run_tasks(
            model,
            tokenizer,
            tasks,
            shots=config.shots,
            limit=config.task_documents,
            batch_tokens=config.batch_tokens,
            progress=lambda requests, tokens: bar.advance(done, requests),
        )


def show(result: dict[str, Any]) -> None:
    """Print tables of a result: held-out figures without those by position, and task scores."""
    out = table_console()
    if "manifest" in result:
        table = Table("held-out text", "bits/byte", "nats/token", "tokens", "documents")
        bits_per_byte = result["bits_per_byte"]
        of_all = {"bits_per_byte": bits_per_byte["model"], "documents": result["documents"]}
        table.add_row("model", *_cells(result | of_all))
        if len(result["sources"]) > 1:
            for source, found in sorted(result["sources"].items()):
                table.add_row(f"model, {source}", *_cells(found))
        for name, value in bits_per_byte.items():
            if name != "model":
                table.add_row(name, *_cells({"bits_per_byte": value}))
        out.print(table)
    if "tasks" in result:
        table = Table("task", "metric", "value", "stderr", "documents")
        for task, scores in result["tasks"].items():
            documents = f"{scores['samples']:,}" if "samples" in scores else ""  # a group of tasks has none
            for metric, value in scores.items():
                name, comma, chosen = metric.partition(",")  # chosen: a filter of the task
                if metric != "samples" and not name.endswith("_stderr"):
                    error = scores.get(f"{name}_stderr{comma}{chosen}")
                    table.add_row(task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", documents)
        out.print(table)


def _cells(found: dict[str, Any]) -> list[str]:
    forms = {"bits_per_byte": ".4f", "nats_per_token": ".4f", "tokens": ",", "documents": ","}
    return [format(found[key], form) if key in found else "" for key, form in forms.items()]


# In training


def problems_in_training(config: TrainConfig) -> list[str]:
    """Why evaluation.* cannot be evaluated, one line each."""
    evaluation, problems = config.evaluation, []
    try:
        if evaluation.manifest:
            held_out, setting = Manifest.load(evaluation.manifest), f"evaluation.manifest={evaluation.manifest}"
            problems += problems_of_held_out(held_out, setting, config.model.vocab_size)
            problems += other_tokenizer_than_training(held_out, config)
    except InputError as error:
        problems += [f"evaluation.{problem}" for problem in error.problems]
    try:
        if evaluation.tasks:
            tasks = _tasks_in_training(config)
            limit, setting = evaluation.task_documents, "evaluation.tasks"
            problems += problems_of_tasks(tasks, config.model.max_length, limit=limit, setting=setting)
    except ConfigError as error:
        problems += error.problems
    needing = [name for name in ("tasks", "prompts") if getattr(evaluation, name)]
    file = tokenizer_file(config.data.manifest) if needing else None
    if needing and file is None:
        problems += [
            f"evaluation.{name} needs the tokenizer of data.manifest={config.data.manifest}: it is not there"
            for name in needing
        ]
    elif evaluation.prompts:
        tokenizer, most = read_tokenizer(file), config.model.max_length
        problems += prompt_problems(tokenizer, evaluation.prompts, evaluation.prompt_tokens, most)
    return problems


def evaluate_in_training(engine: Engine, config: TrainConfig, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Held-out figures, task scores and generated texts, by their names in the journal; without scores, and with a
    warning, where a task cannot be scored.

    Ranks with the same parameters share documents, requests and prompts; all get the figures. progress(n, tokens):
    called after each batch of n documents or requests, of so many tokens.
    """
    model, evaluation, found = engine.model, config.evaluation, {}
    with engine.whole_weights():
        if evaluation.manifest:
            found |= held_out_loss(model, config, progress)
        if evaluation.prompts:
            tokenizer = read_tokenizer(tokenizer_file(config.data.manifest))
            found["texts"] = continue_texts(model, tokenizer, evaluation.prompts, evaluation.prompt_tokens)
        if evaluation.tasks:
            tokenizer, tasks = read_tokenizer(tokenizer_file(config.data.manifest)), _tasks_in_training(config)
            limit = evaluation.task_documents
            try:
                found |= journal_names(run_tasks(model, tokenizer, tasks, limit=limit, progress=progress))
            except ConfigError as error:  # of a metric, on every rank alike, when all answers are there
                if is_first_process():
                    log.warning("%s; training goes on without this evaluation's scores", error)
    return found


def _tasks_in_training(config: TrainConfig) -> TaskSet:
    return load_tasks(tuple(config.evaluation.tasks), config.evaluation.task_folder, "evaluation.tasks")


if __name__ == "__main__":
    run_program(main)
