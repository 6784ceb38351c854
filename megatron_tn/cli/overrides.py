"""A command line for Hydra: its words parsed, quoted and composed; group choices win over experiment=..."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline import redaction
from data_pipeline.words import as_typed, quoted
from megatron_tn.config import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENT = "experiment"  # config group whose files override values of other groups


@dataclass(frozen=True)
class CommandLine:
    """A command line for the settings of dataclass `kind`, composed from conf/`config_name`.yaml.

    flags: Hydra's own options (--multirun, --cfg job, --config-dir DIR). overrides: all other words, KEY=VALUE.
    """

    kind: type
    config_name: str
    flags: list[str]
    overrides: list[str]
    multirun: bool = False
    config_dir: str | None = None

    @classmethod
    def parse(cls, kind: type, config_name: str, words: Sequence[str]) -> CommandLine:
        """Parse `words`; Hydra's flags may be anywhere among them. Exit code 2 for an unknown flag. Raises ConfigError
        for --config-path, which would replace conf/ and the settings' schema, and for a sweep without run_dir."""
        asked = get_args_parser().parse_intermixed_args(list(words))
        asked.multirun = asked.multirun or "hydra.mode=multirun" in (word.lstrip("+").lower() for word in words)
        flags = list(words)
        for word in asked.overrides:
            flags.remove(word)
        kinds = kinds_of(kind)
        overrides = [
            as_typed(word, lambda key: kinds.get(key, ()), multirun=asked.multirun) for word in asked.overrides
        ]
        if asked.config_path:
            raise ConfigError(
                f"--config-path {asked.config_path}: the settings are composed from {CONF}; --config-dir DIR adds a "
                "folder"
            )
        if asked.multirun and "run_dir" not in kinds:
            raise ConfigError(f"--multirun: {config_name} has no run_dir for a sweep; call it once for each value")
        name = asked.config_name or config_name
        line = cls(kind, name, flags, overrides, asked.multirun, asked.config_dir)
        return replace(line, overrides=[line.of_folders(word) for word in overrides]) if asked.multirun else line

    def words(self, aside: str) -> list[str]:
        """The arguments for Hydra, which accepts flags only before overrides. aside: a folder for the file that Hydra
        writes of a sweep that it runs here: in run_dir it would be left behind where the first job is refused."""
        launched = any(word.lstrip("+").startswith("hydra/launcher=") for word in self.overrides)
        own = [f"hydra.sweep.dir={quoted(aside)}"] if self.multirun and not launched else []
        return [*self.flags, *own, *self.choices_win(self.overrides)]

    @property
    def roots(self) -> list[Path]:
        """The config folders, in Hydra's search order."""
        return [CONF, *([Path(self.config_dir).absolute()] if self.config_dir else [])]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose this command's config with `overrides`. Raises Hydra's exceptions."""
        path = ",".join(quoted(f"file://{root}") for root in self.roots[1:])
        with _hydra_over(CONF):
            return hydra.compose(self.config_name, overrides=[f"hydra.searchpath=[{path}]", *overrides])

    @functools.cached_property
    def composed(self) -> DictConfig:
        """The config of a command without a sweep. Raises Hydra's exceptions."""
        return self.compose(self.choices_win(self.overrides))

    @property
    def needs_hydra(self) -> bool:
        """Whether the command asks Hydra for more than `composed`: by a flag, a setting of Hydra's, or its value."""
        return bool(self.flags) or any(
            word.lstrip("+~").startswith(("hydra.", "hydra/")) or "${hydra:" in word for word in self.overrides
        )

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """Config group -> its choices, including those of --config-dir."""
        found: dict[str, set[str]] = {}
        for root in self.roots:
            for path in root.rglob("*.yaml"):
                group, _, choice = path.relative_to(root).with_suffix("").as_posix().partition("/")
                if choice:
                    found.setdefault(group, set()).add(choice)
        return {group: sorted(choices) for group, choices in found.items()}

    def of_folders(self, word: str) -> str:
        """`word`, in which every value that is a folder of its group is replaced by the files right in that folder:
        experiment=paper/norm by the rows of that table. Of files with equal settings, such as the row that several
        tables have in common, the first alone is kept."""
        group, equals, value = word.partition("=")
        choices, parts = self.groups.get(group, []), value.split(",")
        inside = {part: files_in(part, choices) for part in parts if part not in choices}
        if not equals or not any(inside.values()):
            return word
        named: dict[str, str] = {}  # settings -> choice
        for choice in (choice for part in parts for choice in inside.get(part) or [part]):
            named.setdefault(self._content(group, choice), choice)
        return f"{group}={','.join(named.values())}"

    def _content(self, group: str, choice: str) -> str:
        """The settings of a group's file as text that equals another file's where they do; the name of one that is not
        there."""
        for root in self.roots:
            with contextlib.suppress(OSError):
                return OmegaConf.to_yaml(OmegaConf.load(root / group / f"{choice}.yaml"))
        return choice

    def choices_win(self, overrides: Sequence[str]) -> list[str]:
        """With experiment=...: `overrides` preceded by KEY=VALUE for every value in the other chosen groups' files.

        Hydra composes an experiment's file after the files of other groups, so experiment=demo data=8k would have the
        experiment's sequence length. A group choice on the command line must have precedence.
        """
        chosen = dict(word.partition("=")[::2] for word in overrides)
        if chosen.get(EXPERIMENT, "null") == "null":
            return list(overrides)
        values = []
        for group, choice in chosen.items():
            if group == EXPERIMENT or choice not in self.groups.get(group, []):
                continue
            root = next(root for root in self.roots if (root / group / f"{choice}.yaml").is_file())
            with contextlib.suppress(HydraException, OmegaConfBaseException), _hydra_over(root):
                composed = OmegaConf.to_container(hydra.compose(f"{group}/{choice}"))
                values += [f"{key}={literal(value)}" for key, value in _leaves(composed)]
        return [*values, *overrides]


@contextlib.contextmanager
def _hydra_over(root: Path) -> Iterator[None]:
    """Within the block hydra.compose reads from `root`, even if Hydra is already initialised."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(root), version_base=None):
            yield
    finally:
        GlobalHydra.instance().hydra = running


def settings(composed: DictConfig) -> dict[str, Any]:
    """The composed config as plain nested mappings. A leading `~` in a string value is expanded to the home folder,
    since shells do not expand it in KEY=~/folder.

    Raises:
        ConfigError: a value begins with ~USER, and there is no such user.
    """
    return redaction.resolve(composed, lambda values: _with_home(values, ""))


def _with_home(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _with_home(below, f"{key}.{name}" if key else str(name)) for name, below in value.items()}
    if not (isinstance(value, str) and value.startswith("~")):
        return value
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ConfigError(f"{key}={value}: there is no user {value[1:].partition('/')[0]!r} with a home folder")
    return expanded


@functools.cache
def kinds_of(kind: type, prefix: str = "") -> dict[str, tuple[type, ...]]:
    """Dotted name of each setting of a config dataclass -> the types whose union it takes."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
            found |= kinds_of(hint, f"{prefix}{name}.")
        found[f"{prefix}{name}"] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return found


def files_in(folder: str, choices: Sequence[str]) -> list[str]:
    """The choices right in `folder` of their group."""
    return [choice for choice in choices if choice.rpartition("/")[0] == folder]


def literal(value: Any) -> str:
    """`value` in the syntax of a Hydra override."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    return json.dumps(value)  # null, true, false and numbers: same syntax in JSON and Hydra


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
