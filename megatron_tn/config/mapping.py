"""Config dataclasses from and to plain mappings and JSON files; unknown keys and wrong types as one-line errors."""

import contextlib
import dataclasses
import difflib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_pipeline.booleans import booleans_as_numbers
from data_pipeline.redaction import lines_of, restored, storable
from megatron_tn.config.bounds import out_of_bounds

MOST = 50  # problems of a mapping that are looked into: a damaged file may have thousands
STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """One or more settings are wrong. `problems` holds one line for each, without secrets; command lines exit with code
    2."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = lines_of([problems] if isinstance(problems, str) else problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        # By default, unpickling on another rank would make one problem of the joined text.
        return type(self), (self.problems,)


def to_mapping(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dictionaries, ready for JSON or Hydra."""
    return dataclasses.asdict(config)


def to_stored(config: Any) -> dict[str, Any]:
    """`to_mapping` as files and loggers get it: interpolated variables unresolved, URLs without credentials."""
    return storable(to_mapping(config))


def from_stored(kind: type, values: Mapping[str, Any], given: Any) -> Any:
    """Config dataclass `kind` from `to_stored`'s mapping. Secrets come from the environment and the config `given`.

    Raises:
        ConfigError: as `from_mapping`, or a secret is in neither.
    """
    problems: list[str] = []
    values = restored(values, to_mapping(given), problems)
    if problems:
        raise ConfigError(problems)
    return from_mapping(kind, values)


def from_mapping(kind: type, values: Mapping[str, Any]) -> Any:
    """Build config dataclass `kind` from nested plain mappings.

    Values out of bounds alone raise nothing: the config's `problems()` reports them with the violated relations.

    Raises:
        ConfigError: unknown keys or values of a wrong type; lists all of them, and all values that are out of bounds.
    """
    adapter = TypeAdapter(kind)
    problems: list[str] = []
    try:
        config = adapter.validate_python(dict(values))
    except ValidationError as error:
        known, refused = known_keys(kind), error.errors(include_url=False)[:MOST]
        problems += [_describe(item, known) for item in refused]
        try:
            config = adapter.validate_python(_without([_setting(item) for item in refused], values))
        except ValidationError:
            raise ConfigError(problems) from None
    booleans = dict(booleans_as_numbers(values, to_mapping(config)))
    problems += booleans.values()
    if problems:
        raise ConfigError([*problems, *(line for name, line in out_of_bounds(config).items() if name not in booleans)])
    return config


def _without(settings: list[list[str]], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without `settings`, each a path of nested keys."""
    kept = {}
    for key, value in values.items():
        below = [path[1:] for path in settings if path[:1] == [key]]
        if [] not in below:
            kept[key] = _without(below, value) if below and isinstance(value, Mapping) else value
    return kept


def unwritable(name: str, path: str) -> list[str]:
    """One line if `path`, the value of setting `name`, cannot be written as a file; none if it can, or is empty."""
    if not path:
        return []
    file = Path(path)
    if file.is_dir():
        return [f"{name}={path} is a folder: name a file"]
    if not file.parent.is_dir():
        return [f"{name}={path} cannot be written: there is no folder {file.parent}"]
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        return [f"{name}={path} cannot be written: no permission"]
    return []


def changed(config: Any, names: Iterable[str]) -> list[str]:
    """NAME=VALUE of those settings `names` of a config that have another value than their default."""
    usual = type(config)()
    values = {name: value for name in names if (value := getattr(config, name)) != getattr(usual, name)}
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ConfigError: the file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(regular(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it holds {type(values).__name__}, not settings")
    return values


def regular(path: Path) -> Path:
    """The path, of a regular file or a link to one: who opens a FIFO waits for its other end, and a device may never
    end. Raises OSError where it is none."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def save(config: Any, path: Path) -> None:
    with replacing(path) as file:
        file.write(json.dumps(to_stored(config), indent=1) + "\n")


@contextlib.contextmanager
def replacing(path: Path, mode: str = "x", *, sync: bool = False) -> Iterator[IO]:
    """A temporary file that is renamed to `path` when the block ends: readers see the old or the new file, also after a
    kill, and a symbolic link in its place is replaced. On an exception it is removed. sync: fsync it first."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open_new(partial, mode) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write names none
        raise


def open_new(path: Path, mode: str = "x") -> IO:
    """A new file in the place of what a killed process left there. In a folder that others may write to, no symbolic
    link is followed."""
    path.unlink(missing_ok=True)
    return path.open(mode)


def known_keys(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings and groups of config dataclass `kind`."""
    keys = []
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        keys.append(name)
        if dataclasses.is_dataclass(field.default_factory):
            keys += known_keys(field.default_factory, f"{name}.")
    return keys


def unknown_key(key: str, known: Iterable[str]) -> str:
    """One error line for the unknown `key`, with the most similar known keys."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    if not close:  # right name in the wrong group: model.lr for optim.lr
        close = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"unknown setting {key}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ between two resolved configs, as 'name: old -> new'."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


BRANCHES = ("int", "str")  # pydantic's location names for the branches of int | str


def _setting(item: Any) -> list[str]:
    """The path of keys of the setting in a pydantic error. Location parts below the setting are left out: list indices,
    and branches of a union (model.lrpe, checkpoint.resume)."""
    return [part for part in item["loc"] if isinstance(part, str) and "[" not in part and part not in BRANCHES]


def _describe(item: Any, known: list[str]) -> str:
    key = ".".join(_setting(item))
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(key, known)
    said = item["msg"].removeprefix("Value error, ")
    return f"{key}={item['input']!r}: {said[0].lower()}{said[1:]}"
