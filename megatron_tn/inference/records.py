"""JSON lines files of prompts and of their continuations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_tn.config import ConfigError

MOST_PROBLEMS = 5  # malformed lines of a file of prompts that one message names


def prompt_problems(path: str, text_key: str, taken: set[str]) -> list[str]:
    """Why prompts=`path` cannot be continued, line by line. taken: keys that the lines must not have.

    Reads the file once, so that nothing is computed for one that breaks off in the middle.
    """
    try:
        with Path(path).open("rb") as file:
            found = []
            for number, line in enumerate(file, 1):
                if line.strip() and (problem := _problem(line, text_key, taken)):
                    found.append(f"prompts={path}, line {number}: {problem}")
                if len(found) == MOST_PROBLEMS:
                    break
    except OSError as error:
        return [f"prompts={path} cannot be read: {error.strerror}"]
    return found


def read_prompts(path: str) -> Iterator[dict[str, Any]]:
    """The records of a file without `prompt_problems`, one at a time. Blank lines are none."""
    with Path(path).open("rb") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _problem(line: bytes, text_key: str, taken: set[str]) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, no object"
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
    there. first: the first number."""

    def __init__(self, file: BinaryIO, first: int = 0):
        self._file = file
        self._next = first
        self._waiting: dict[int, dict[str, Any]] = {}

    def put(self, number: int, record: dict[str, Any]) -> None:
        self._waiting[number] = record
        while self._next in self._waiting:
            self._file.write(_line(self._waiting.pop(self._next)))
            self._next += 1
        self._file.flush()


def _line(record: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a key that was kept holds half a character
        return (json.dumps(record) + "\n").encode()


def output_problems(
    path: str, resume: bool, read: Mapping[str, str], output_key: str, record: Mapping[str, Any]
) -> list[str]:
    """Why continuations cannot be written to output=`path` beyond `config.unwritable`. read: other settings -> files
    that are read. output_key: a key that every line of earlier output has. record: the first text to continue, with
    whose keys an output begins that broke off in its first line."""
    if not path or not Path(path).is_file():
        return []
    same = [f"output={path} is {name}={file} itself" for name, file in read.items() if _is_file(file, path)]
    if same or not Path(path).stat().st_size:
        return same
    if not resume:
        return [f"output={path} exists: resume=true goes on behind its last line; or name another file"]
    with Path(path).open("rb") as file:
        first = file.readline()
    if first.endswith(b"\n"):
        try:
            own = output_key in json.loads(first)
        except (ValueError, TypeError, RecursionError):
            own = False
    else:
        begin = _line({**record, output_key: ""}).removesuffix(b'"}\n')
        own = begin.startswith(first) or first.startswith(begin)
    return [] if own else [f"output={path} does not begin with a line that has {output_key}: resume=true cannot go on"]


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


def open_output(path: str, size: int) -> BinaryIO:
    """The file at `path`, cut to `size` bytes, for writing behind them."""
    try:
        if Path(path).is_file():
            os.truncate(path, size)
        return Path(path).open("ab")
    except OSError as error:
        raise ConfigError(f"output={path} cannot be written: {error.strerror}") from None
