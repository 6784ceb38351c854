"""Preprocessing of command-line overrides before Hydra: quoting of paths, precedence of group choices over
experiment=..., and one error line for each override that Hydra cannot compose."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import hashlib
import itertools
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline import redaction
from data_pipeline.words import as_typed, quoted
from megatron_tn.config import ConfigError, from_mapping, known_keys, out_of_bounds, to_mapping, unknown_key

CONF = Path(__file__).resolve().parents[1] / "conf"
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
        kinds = _kinds(kind)
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

    def words(self) -> list[str]:
        """The arguments for Hydra, which accepts flags only before overrides."""
        return [*self.flags, *self.choices_win(self.overrides)]

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
        inside = {part: _files_in(part, choices) for part in parts if part not in choices}
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

    def check(self) -> None:
        """Compose the config as Hydra will, and turn Hydra's errors into one line each. All jobs of a sweep are
        composed and checked first, so that no job is refused after hours of earlier jobs.

        Raises:
            ConfigError: an unknown key, an unknown choice of a group, an invalid value, a word that is not KEY=VALUE, a
                sweep without --multirun, a sweep without values, or one in which two jobs have the same settings.
        """
        parsed, problems = [], []
        if self.config_dir and not Path(self.config_dir).is_dir():
            raise ConfigError(f"--config-dir {self.config_dir}: there is no such folder")
        for word in self.overrides:
            try:
                parsed += OverridesParser.create().parse_overrides([word])
            except HydraException as error:
                problems.append(
                    f"not an override: {word!r}: {_first_line(error)}; it must be KEY=VALUE, and a value with spaces "
                    """or signs such as = ~ [ ( { , goes in quotes of its own: "KEY='a, b'\""""
                )
        swept = [override for override in parsed if override.is_sweep_override()]
        if swept and not self.multirun and not problems:
            needed = "needs --multirun" if "run_dir" in _kinds(self.kind) else f"is not for {self.config_name}"
            problems = [f"{override.input_line}: a sweep over several values {needed}" for override in swept]
        values = []
        for override in [] if problems else parsed:
            try:
                values.append(self._values(override))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        swept_places = [place for place, each in enumerate(values) if len(each) > 1]
        names: dict[str, str] = {}  # settings -> the swept words of the first job that has them
        for job in itertools.product(*values):
            config, found = self._job(job, values=bool(swept))
            problems += found
            name = " ".join(job[place] for place in swept_places)
            if config is None:
                continue
            if first := names.get(key := json.dumps(to_mapping(config))):
                problems.append(
                    f"{name} has the settings of {first}: leave one out, or the word that replaces what differs in them"
                )
            names.setdefault(key, name)
        if problems := list(dict.fromkeys(problems)):
            raise ConfigError(problems)

    def _values(self, override: Override) -> list[str]:
        """KEY=VALUE for each value of a (swept) override. Raises ConfigError for a sweep without values."""
        if not override.is_sweep_override():
            return [override.input_line]
        name = override.input_line.partition("=")[0]
        if override.value_type == ValueType.INTERVAL_SWEEP:
            if any(word.startswith("hydra/sweeper=") for word in self.overrides):
                return []  # a sweeper plugin draws values from the interval: jobs cannot be checked in advance
            raise ConfigError(
                f"{override.input_line}: an interval has no list of values to sweep over; name them, as in "
                f"{name}=0.1,0.2 or {name}=range(1,4)"
            )
        if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            choices, globs = self.groups.get(name.lstrip("+"), []), override.value()
            values = [choice for choice in choices if any(fnmatch.fnmatch(choice, glob) for glob in globs.include)]
            values = [value for value in values if not any(fnmatch.fnmatch(value, glob) for glob in globs.exclude)]
        else:
            try:
                values = list(override.sweep_string_iterator())
            except (HydraException, ValueError, TypeError) as error:
                raise ConfigError(f"{override.input_line}: {_first_line(error)}") from None
        if not values:
            raise ConfigError(f"{override.input_line}: there is no value to sweep over")
        return [f"{name}={value}" for value in values]

    def _job(self, words: Sequence[str], *, values: bool) -> tuple[Any, list[str]]:
        """One job's config, of a sweep, and its error lines. values: of a sweep, whose values are checked as well, not
        only names."""
        try:
            composed = self.compose(self.choices_win(words)) if values else self.composed
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return None, self._explain(error, words)
        if not values:
            return None, []
        try:
            config = from_mapping(self.kind, settings(composed))
        except ConfigError as error:
            return None, error.problems
        except OmegaConfBaseException:
            return None, []  # an interpolation such as ${hydra:...}, resolved only when the job runs
        return config, config.job_problems()

    def _explain(self, error: Exception, words: Sequence[str]) -> list[str]:
        """Error lines of words that cannot be composed: unknown names, and then values that are wrong by themselves.
        Relations are not checked, since a misspelt setting may be one side of them."""
        if unknown := dict(self._unknown(words)):
            return [*unknown.values(), *self._wrong_values([word for word in words if word not in unknown])]
        return [_first_line(error) + (f": {_first_line(error.__cause__)}" if error.__cause__ else "")]

    def _wrong_values(self, words: Sequence[str]) -> list[str]:
        try:
            config = from_mapping(self.kind, settings(self.compose(self.choices_win(words))))
        except ConfigError as error:
            return error.problems
        except (HydraException, OmegaConfBaseException, ValueError):
            return []
        return list(out_of_bounds(config).values())

    def _unknown(self, words: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(word, error line) of each word that names no setting, no group, or no choice of a group."""
        known = known_keys(self.kind)
        for word in words:
            key, _, value = word.lstrip("+~").partition("=")
            if (choices := self.groups.get(key)) is not None:
                if value not in choices:
                    if inside := _files_in(value, choices):
                        yield (
                            word,
                            f"{word}: conf/{key}/{value} is a folder of {len(inside)} files: name one, such as "
                            f"{key}={inside[0]}, or run all of them with --multirun",
                        )
                        continue
                    choices = [choice for choice in choices if not choice.startswith("_")]  # _X: part of others
                    close = difflib.get_close_matches(value, choices, n=1)
                    hint = f"; did you mean {close[0]}?" if close else ""
                    yield word, f"{key}={value}: conf/{key} has {', '.join(choices)}{hint}"
            elif key not in known and not key.startswith(("hydra.", "hydra/")):
                yield word, unknown_key(key, sorted({*known, *self.groups}))


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


LONGEST_SETTING, LONGEST_NAME = 60, 150  # characters of a sweep's folder; file systems take 255 bytes


def job_folder(run_dir: str, job: DictConfig, words: list[str]) -> str:
    """The folder of one job of a sweep: job number and swept settings, such as run_dir/0_model.decay-none.

    The name consists of letters, digits and _ . + -, so that it can be typed as a setting's value. A name that is
    shortened or has characters replaced ends with a hash of the settings: the same command gives the same folders, and
    another sweep in run_dir other folders. words: overrides of the sweep. job: Hydra's settings of the job.
    """
    parsed = OverridesParser.create().parse_overrides(words)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    varied = [word.lstrip("+") for word in job.overrides.task if word.lstrip("+").partition("=")[0] in swept]
    named = [re.sub(r"[^A-Za-z0-9_.+-]", "-", word.replace("'", "").replace('"', "")) for word in varied]
    short = [name if len(name) <= LONGEST_SETTING else f"{name[:30]}..{name[-28:]}" for name in named]
    name = "_".join([str(job.job.num), *short])[:LONGEST_NAME]
    plain = "_".join([str(job.job.num), *(word.replace("=", "-", 1) for word in varied)])
    if name != plain:
        name += f"-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
    earlier = Path(run_dir) / "_".join([str(job.job.num), *varied]).replace("/", "-")  # the name until 2026-11
    with contextlib.suppress(OSError):  # too long for a file system
        if earlier.is_dir():
            return str(earlier)
    return f"{run_dir}/{name}"


@functools.cache
def _kinds(kind: type, prefix: str = "") -> dict[str, tuple[type, ...]]:
    """Dotted name of each setting of a config dataclass -> the types whose union it takes."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
            found |= _kinds(hint, f"{prefix}{name}.")
        found[f"{prefix}{name}"] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return found


def _files_in(folder: str, choices: Sequence[str]) -> list[str]:
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


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).strip().split("\n")[0])
