"""Every setting with its default and meaning, read from the dataclasses' own source: for --help and docs/settings.md.

python -m megatron_tn.config.describe > docs/settings.md
"""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from megatron_tn.config import commands
from megatron_tn.config.run import TrainConfig
from megatron_tn.config.slurm import SlurmConfig


class Setting(NamedTuple):
    """name: dotted. default: as it is typed on a command line. meaning: the comment beside or above the field."""

    name: str
    default: str
    meaning: str


def settings(kind: type, prefix: str = "") -> Iterator[Setting]:
    """All settings below config dataclass `kind`, groups after single settings."""
    comments, hints = {}, typing.get_type_hints(kind)
    for part in reversed(kind.__mro__):
        if dataclasses.is_dataclass(part):
            comments |= _comments(part)
    groups = []
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            groups.append((hints[field.name], f"{name}."))
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        choices = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is Literal else ()
        meaning = comments.get(field.name, "")
        if choices:
            meaning = f"{'|'.join(map(str, choices))}{'; ' if meaning else ''}{meaning}"
        yield Setting(name, default if isinstance(default, str) else json.dumps(default), meaning)
    for group, below in groups:
        yield from settings(group, below)


def _comments(kind: type) -> dict[str, str]:
    """Field -> the comment lines right above it, and the comment at its end."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in said and not said[first - 1].line[: said[first - 1].start[1]].strip():
                first -= 1
            lines = [*range(first, node.lineno), node.end_lineno]
            texts = (said[line].string.removeprefix("#").strip() for line in lines if line in said)
            found[node.target.id] = " ".join(texts)
    return found


def help_text(kind: type, about: str) -> str:
    """The --help of a command with the settings of dataclass `kind`. about: what the command does, its module's
    docstring."""
    lines = [about.strip(), "", "settings (KEY=VALUE), with their defaults:"]
    for name, default, meaning in settings(kind):
        lines.append(f"  {name}={default}")
        lines += textwrap.wrap(meaning, 110, initial_indent="      ", subsequent_indent="      ")
    sweeps = any(field.name == "run_dir" for field in dataclasses.fields(kind))
    sweep = "-m, --multirun: a sweep over KEY=A,B; " if sweeps else ""
    return "\n".join([*lines, "", f"{sweep}--cfg job: print the settings; more: --hydra-help"])


COMMANDS = {
    "train": (TrainConfig, "`python -m megatron_tn.train`"),
    "plan": (commands.PlanSettings, "`plan`, beside those of `train`"),
    "submit": (SlurmConfig, "`launch.submit`, beside those of `train`, and `dry_run=true`"),
    "benchmark": (commands.BenchmarkSettings, "`benchmark`, beside those of `train`"),
    "evaluate": (commands.EvaluateConfig, "`evaluate`"),
    "score": (commands.ScoreConfig, "`score`"),
    "generate": (commands.GenerateConfig, "`generate`"),
    "convert": (commands.ConvertConfig, "`convert`"),
}


def page() -> str:
    """docs/settings.md."""
    lines = ["# Settings", "", "Made by `python -m megatron_tn.config.describe`; `--help` of a command prints its own."]
    lines += ["Settings of data_pipeline are in its commands' help, such as `python -m data_pipeline.run --help`."]
    for name, (kind, title) in COMMANDS.items():
        lines += ["", f"## {title}", "| setting | default | |", "|---|---|---|"]
        prefix = {"benchmark": "benchmark.", "submit": "slurm."}.get(name, "")
        lines += ["| " + " | ".join(map(_cell, setting)) + " |" for setting in settings(kind, prefix)]
    return "\n".join(lines) + "\n"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
