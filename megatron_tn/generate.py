"""Continue a text with a trained model.

python -m megatron_tn.generate checkpoint=runs/demo prompt="def "
python -m megatron_tn.generate checkpoint=runs/demo prompts=texts.jsonl output=continued.jsonl batch=32
torchrun --nproc-per-node 2 -m megatron_tn.generate checkpoint=runs/7b prompt="def "        tensor parallel 2
"""

import codecs
import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tokenizers import Tokenizer

from megatron_tn.cli import command, run_program
from megatron_tn.config import ConfigError, GenerateConfig, out_of_bounds, unwritable
from megatron_tn.device.free_memory import free_bytes
from megatron_tn.inference.generator import Generator, Request, check_length, least_bytes
from megatron_tn.inference.prefix import Prefix, check_ids
from megatron_tn.inference.prefix_file import identity, load_prefix, replacing_problem, save_prefix
from megatron_tn.inference.records import (
    END,
    SAMPLE,
    OrderedLines,
    open_output,
    output_problems,
    prompt_problems,
    read_prompts,
    whole_lines,
    written,
)
from megatron_tn.inference.sampler import Sampler
from megatron_tn.inference.text import TextStream
from megatron_tn.loading import load_any_model, load_tokenizer, memory_is_named, resolve_checkpoint, tensor_parallel
from megatron_tn.model.base import Model
from megatron_tn.parallel.world import world_size

log = logging.getLogger(__name__)

SIZES = ("batch", "together", "prefill_chunk", "check_every", "max_new_tokens")  # settings by which tensors grow


@command(GenerateConfig, "generate", literal=("prompt", "stop"))
def main(config: GenerateConfig) -> None:
    check(config)
    with tensor_parallel(config.device) as (context, device):
        tokenizer = load_tokenizer(config.tokenizer, config.checkpoint)
        tokenizer.encode_special_tokens = not config.special_tokens
        model = load_any_model(config.checkpoint, device, config.precision, context, fp8_weights=config.fp8_weights)
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in SIZES)
        with memory_is_named(sizes):
            job = Job(config, model, tokenizer)
            if config.prompts:
                job.write_lines()
            else:
                job.continue_prompt()


class Job:
    """One command's work. Under tensor parallelism every rank runs it, and rank 0 writes."""

    def __init__(self, config: GenerateConfig, model: Model, tokenizer: Tokenizer):
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.writes = model.context.tp.rank == 0
        self.sampler = sampler_of(config)
        self.stop = stop_strings(config.stop)
        if config.save_state and (problem := replacing_problem(config.save_state, identity(model))):
            raise ConfigError(f"save_state={config.save_state} cannot be written: {problem}")
        self.beginning = load_prefix(config.state, model) if config.state else None
        rows = config.batch if config.prompts else min(config.batch, config.samples)
        self._check_memory(rows)
        self.generator = Generator(
            model, rows, together=config.together, check_every=config.check_every, chunk=config.prefill_chunk
        )

    def _check_memory(self, rows: int) -> None:
        """Raise ConfigError where `rows` rows do not fit into the memory that is free."""
        config, device = self.config, next(self.model.parameters()).device
        need, free = least_bytes(self.model, rows, config.together), free_bytes(device)
        if free is not None and need > free:
            raise ConfigError(
                f"batch={config.batch}, together={config.together}: the states of so many texts need "
                f"{need / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free"
            )

    def ids(self, text: str, name: str) -> list[int]:
        """The tokens of `text`, which follow those of state= or begin a document. name: of the text, in errors."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        before = 0
        if self.beginning is None:
            ids = [self.model.config.bos_id, *ids]
        else:
            before = self.beginning.length
        try:
            check_ids(ids, self.model.config.vocab_size)
            check_length(self.model, before + len(ids), self.config.max_new_tokens)
        except ValueError as error:
            raise ConfigError(f"checkpoint={self.config.checkpoint} cannot continue {name}: {error}") from None
        return ids

    def prefix(self, ids: list[int]) -> Prefix:
        return Prefix.of(self.model, ids, self.beginning, self.config.prefill_chunk)

    def request(self, ids: list[int], prefix: Prefix | None, number: int) -> tuple[Request, TextStream]:
        context = ids or [prefix.last]
        text = TextStream(self.tokenizer, context, self.stop)
        return Request(
            prompt=ids,
            prefix=prefix,
            sampler=self.sampler,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.config.seed,
            number=number,
            until=text,
        ), text

    def continue_prompt(self) -> None:
        """Print the prompt and its continuation as it comes; several of them one after the other."""
        config = self.config
        ids, prefix = self.ids(config.prompt, "prompt"), self.beginning
        if config.save_state:
            ids, prefix = [], self.prefix(ids)
            save_prefix(prefix, self.model, config.save_state)
            log.info("save_state=%s holds %d tokens", config.save_state, prefix.length)
        if config.output or config.samples > 1:
            self.write_lines()
            return
        request, text = self.request(ids, prefix, 0)
        self._print(config.prompt)
        for piece in self.generator.stream([request]):
            if piece.end:
                text.finish()
            self._print(text.take())
        self._print("\n")

    def write_lines(self) -> None:
        """One JSON line for each continuation, in the order of the texts, written as it goes."""
        config, open_texts = self.config, {}

        def requests() -> Iterator[Request]:
            for index, record in enumerate(texts(config)):
                numbers = range(max(index * config.samples, first), (index + 1) * config.samples)
                name = f"text {index + 1} of prompts={config.prompts}" if config.prompts else "prompt"
                ids, prefix = self.ids(record[config.text_key], name), self.beginning
                if len(numbers) > 1:
                    ids, prefix = [], self.prefix(ids)  # once for all samples
                for number in numbers:
                    request, text = self.request(ids, prefix, number)
                    open_texts[number - first] = (record, text)
                    yield request

        with contextlib.ExitStack() as stack:
            file, first = stack.enter_context(self._output())
            lines = OrderedLines(file, first)
            columns = (TextColumn("continuations"), BarColumn(), MofNCompleteColumn())
            console = Console(stderr=True)
            hidden = not self.writes or not config.output or not console.is_terminal
            bar = stack.enter_context(Progress(*columns, transient=True, disable=hidden, console=console))
            task = bar.add_task("", total=None, completed=first)
            for piece in self.generator.stream(requests()):
                if not piece.end:
                    continue
                record, text = open_texts.pop(piece.index)
                text.finish()
                added = {config.output_key: text.text, END: "stop" if piece.end == "until" else piece.end}
                if config.samples > 1:
                    added[SAMPLE] = (first + piece.index) % config.samples
                if self.writes:
                    lines.put(first + piece.index, record | added)
                bar.advance(task)
        if config.output:
            log.info("output=%s holds %d continuations", config.output, lines.count)

    @contextlib.contextmanager
    def _output(self) -> Iterator[tuple[BinaryIO, int]]:
        """The file that lines go to, and how many are there. Only rank 0 writes to it."""
        output = self.config.output
        if not output or not self.writes:
            with written("standard output"):
                yield sys.stdout.buffer, whole_lines(output)[0]
            return
        with open_output(output) as file:
            if problems := existing_problems(self.config):  # written since `check`, by another process
                raise ConfigError(problems)
            lines, size = whole_lines(output)
            if Path(output).is_file():
                file.truncate(size)
            yield file, lines

    def _print(self, text: str) -> None:
        if self.writes and text:
            with written("standard output"):
                sys.stdout.write(text)
                sys.stdout.flush()


def texts(config: GenerateConfig) -> Iterable[dict[str, Any]]:
    """The records to continue."""
    return read_prompts(config.prompts) if config.prompts else [{config.text_key: config.prompt}]


def existing_problems(config: GenerateConfig) -> list[str]:
    """Why continuations must not be written behind what output holds."""
    read = {name: value for name in ("prompts", "state", "tokenizer") if (value := getattr(config, name))}
    return output_problems(config.output, config.resume, read, texts(config), config.output_key, config.samples)


def check(config: GenerateConfig) -> None:
    """Raises ConfigError with every problem that can be known before anything is loaded."""
    problems = [*out_of_bounds(config).values()]
    readers = ((sampler_of, config), (resolve_checkpoint, config.checkpoint), (stop_strings, config.stop))
    for read, value in readers:
        try:
            read(value)
        except ConfigError as error:
            problems += error.problems
    found = []
    if config.prompts:
        for name in ("prompt", "save_state"):
            if getattr(config, name):
                problems.append(
                    f"{name}={getattr(config, name)} is for one text, and prompts={config.prompts} for many"
                )
        added = {config.output_key, END} | ({SAMPLE} if config.samples > 1 else set())
        found = prompt_problems(config.prompts, config.text_key, added)
        problems += found
    if config.state and not Path(config.state).is_file():
        why = (
            "it is a folder: name a file that save_state wrote"
            if Path(config.state).is_dir()
            else "there is no such file"
        )
        problems.append(f"state={config.state} cannot be read: {why}")
    if len({config.output_key, END, SAMPLE, config.text_key}) < 4:
        problems.append(f"output_key={config.output_key} must be none of {config.text_key!r}, {END!r} and {SAMPLE!r}")
    for name in ("output", "save_state"):
        problems += unwritable(name, getattr(config, name))
    if config.save_state and not Path(config.save_state).is_dir() and (problem := replacing_problem(config.save_state)):
        problems.append(f"save_state={config.save_state} cannot be written: {problem}")
    if config.output and config.save_state and Path(config.output).absolute() == Path(config.save_state).absolute():
        problems.append(f"output={config.output} is save_state={config.save_state} itself")
    if config.resume and not config.output:
        problems.append("resume=true goes on behind the lines of output, which is not set")
    if not found:
        problems += existing_problems(config)
    for name in ("prompt", "stop"):
        if any("\ud800" <= character <= "\udfff" for character in getattr(config, name)):
            problems.append(f"{name}={getattr(config, name)!r} is no text: it has bytes that are not UTF-8")
    if world_size() > 1 and config.device not in ("auto", "cpu"):
        problems.append(f"device={config.device}: each of {world_size()} processes takes its own; use auto or cpu")
    if problems:
        raise ConfigError(problems)
    if not config.prompts and not config.output and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        sys.stdout.reconfigure(errors="backslashreplace")
        log.warning(
            "standard output takes %s: other characters are printed as \\u escapes; PYTHONIOENCODING=utf-8 prints them",
            sys.stdout.encoding,
        )


def sampler_of(config: GenerateConfig) -> Sampler:
    return Sampler(config.temperature, config.top_k, config.top_p, config.repetition_penalty)


def stop_strings(text: str) -> list[str]:
    """The strings of setting `stop`: a JSON list of strings, or one string that does not begin with [."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"stop={text} begins a JSON list, and is none: {error}") from None
    if not all(isinstance(each, str) and each for each in found):
        raise ConfigError(f"stop={text} must be a list of texts that are not empty")
    return found


if __name__ == "__main__":
    run_program(main)
