"""JSON lines files of prompts and of their continuations."""

import contextlib
import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_tn.config import ConfigError

END = "end"  # key of an output line: why its text ends
ENDS = ("eos", "length", "stop")
SAMPLE = "sample"  # key of an output line with samples > 1: which of them, from 0
MOST_PROBLEMS = 5  # malformed lines of a file of prompts that one message names


def prompt_problems(path: str, text_key: str, taken: set[str]) -> list[str]:
    """Why prompts=`path` cannot be continued, line by line. taken: keys that the lines must not have.

    Reads the file once, so that nothing is computed for one that breaks off in the middle.
    """
    if Path(path).exists() and not Path(path).is_dir() and not Path(path).is_file():
        return [f"prompts={path} is no regular file, and is read more than once"]
    try:
        with Path(path).open("rb") as file:
            found, empty = [], True
            for number, line in enumerate(file, 1):
                empty = empty and not line.strip()
                if line.strip() and (problem := _problem(line, text_key, taken)):
                    found.append(f"prompts={path}, line {number}: {problem}")
                if len(found) == MOST_PROBLEMS:
                    break
    except OSError as error:
        return [f"prompts={path} cannot be read: {error.strerror}"]
    return [f"prompts={path} has no texts"] if empty else found


def read_prompts(path: str) -> Iterator[dict[str, Any]]:
    """The records of a file without `prompt_problems`, one at a time. Blank lines are none."""
    try:
        with Path(path).open("rb") as file:
            yield from (json.loads(line) for line in file if line.strip())
    except OSError as error:
        raise ConfigError(f"prompts={path} cannot be read: {error.strerror}") from None


def _object(line: bytes) -> dict[str, Any] | str:
    """The JSON object of a line; why the line holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return found if isinstance(found, dict) else f"a JSON {type(found).__name__}, no object"


def _problem(line: bytes, text_key: str, taken: set[str]) -> str | None:
    record = _object(line)
    if isinstance(record, str):
        return record
    if text_key not in record:
        return f"text_key={text_key}: no such key; there are {', '.join(sorted(record)) or 'none'}"
    text = record[text_key]
    if not isinstance(text, str):
        return f"text_key={text_key}: {text!r} is no text"
    if clash := taken & record.keys():
        return f"the key {min(clash)!r} is there already: output_key names another"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"text_key={text_key}: the text holds half a character: {error.reason}"
    return None


class OrderedLines:
    """Writes numbered records to a JSON lines file in the order of their numbers, each as soon as all before it are
    there. count: the number of the next line, from `first`."""

    def __init__(self, file: BinaryIO, first: int):
        self._file = file
        self.count = first
        self._waiting: dict[int, dict[str, Any]] = {}

    def put(self, number: int, record: dict[str, Any]) -> None:
        self._waiting[number] = record
        while self.count in self._waiting:
            self._file.write(_line(self._waiting.pop(self.count)))
            self.count += 1
        self._file.flush()


def _line(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a key that was kept holds half a character
        return (json.dumps(record) + "\n").encode()


def output_problems(
    path: str, resume: bool, read: Mapping[str, str], records: Iterable[dict[str, Any]], output_key: str, samples: int
) -> list[str]:
    """Why continuations cannot be written to output=`path` beyond `config.unwritable`. read: other settings -> files
    that are read. records: the texts to continue, of which the lines of an earlier output begin with the first ones."""
    if not path or not Path(path).is_file():
        return []
    same = [f"output={path} is {name}={file} itself" for name, file in read.items() if _is_file(file, path)]
    if same or not Path(path).stat().st_size:
        return same
    if not resume:
        return [f"output={path} exists: resume=true goes on behind its last line; or name another file"]
    wanted = ((record, sample) for record in records for sample in range(samples))
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            record, sample = next(wanted, (None, 0))
            if record is None:
                problem = f"samples={samples} of the texts are {number - 1} continuations alone"
            else:
                problem = _line_problem(line, record, output_key, sample if samples > 1 else None)
            if problem:
                return [f"output={path}, line {number}: {problem}: resume=true cannot go on"]
    return []


def _line_problem(line: bytes, record: dict[str, Any], output_key: str, sample: int | None) -> str:
    """Why `line` is not the continuation of `record`, or the beginning of its line; empty where it is."""
    if not line.endswith(b"\n"):  # the writer broke off
        begin = _line({**record, output_key: ""}).removesuffix(b'"}\n')
        return "" if begin.startswith(line) or line.startswith(begin) else "it does not begin as the line of its text"
    found = _object(line)
    if isinstance(found, str):
        return found
    for key, values in ((output_key, None), (END, ENDS)):
        if not isinstance(found.get(key), str) or (values and found[key] not in values):
            return f"it has no {key}"
    wanted = record | {key: found[key] for key in (output_key, END)} | ({} if sample is None else {SAMPLE: sample})
    for key in [*wanted, *found]:
        here, there = (json.dumps(each[key]) if key in each else "missing" for each in (found, wanted))
        if here != there:
            return f"{key} is {here:.60}, not {there:.60}"
    return ""


def _is_file(one: str, other: str) -> bool:
    return Path(one).is_file() and Path(one).samefile(other)


def whole_lines(path: str) -> tuple[int, int]:
    """(lines that end, bytes of them) of a file that a writer may have left in the middle of a line."""
    lines = size = 0
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    lines, size = lines + 1, size + len(line)
    return lines, size


@contextlib.contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """The file at `path`, for writing behind its end. No other process opens it so until the block ends.

    Raises:
        ConfigError: it cannot be written, or another process has it open so.
    """
    with written(f"output={path}"), Path(path).open("ab") as file:
        if Path(path).is_file():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"output={path} is being written by another process") from None
            except OSError:
                pass  # a file system without locks
        yield file


@contextlib.contextmanager
def written(name: str) -> Iterator[None]:
    """Within the block a file is written to, and its errors, such as a full disk, become ConfigErrors that begin with
    `name`. A reader that has gone stays a BrokenPipeError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is not None and str(error.filename) not in name:
            raise  # another file's
        raise ConfigError(f"{name} cannot be written: {error.strerror or error}") from None
