"""Secrets in settings: what is stored or printed holds no value of `${oc.env:NAME}` and no credentials of a URL.

Settings are used with their values. Files get them as `storable` writes them: `${oc.env:NAME}` unresolved, and `***`
for the user information and the query of a URL (the query of a signed URL is a password). `restored` reads them again.
Messages pass through `redacted`. This module keeps the interpolations that the process has resolved.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}")
USER = re.compile(rf"(?:{VARIABLE.pattern}(?::|\Z))+")  # user information of interpolations alone
URL = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*://)(?:([^\s/?#]*)@)?([^\s?#'\"<>]*)(?:\?([^\s#'\"<>]*))?"
)
PUNCTUATION = ",;:.)]"  # marks of the sentence that may follow a URL
CONTROL = re.compile(r"[^\n\t -~\xa0-\u200d\u2010-\u2027\u202f-\u2065\u206a-\U0010ffff]|[\u2066-\u2069\ud800-\udfff]")
LONGEST, MOST = 2000, 50  # characters of a line, and lines: a damaged file may give one a key
SHORTEST = 6  # characters of a value that messages hide: a shorter one may be part of any word
SHOWN = re.compile(r"USER|LOGNAME|HOSTNAME|SLURM_\w+")  # variables whose values messages show

_written: dict[str, str] = {}  # setting, resolved -> the same with its interpolations
_values: dict[str, str] = {}  # value of a variable -> its interpolation


def resolve(composed: Any, then: Callable[[Any], Any] = lambda values: values) -> Any:
    """An OmegaConf container as plain values, changed by `then`. Raises OmegaConf's errors."""
    from omegaconf import OmegaConf

    values = then(OmegaConf.to_container(composed, resolve=True))
    with _variables_kept() as names:
        texts = then(OmegaConf.to_container(composed, resolve=True))
    for name in names:
        _note_variable(name)
    _note(values, texts)
    return values


def written(value: Any) -> Any:
    """Settings, or one of them, with `${oc.env:NAME}` where this process resolved it: as other programs get them, whose
    arguments every user of the machine may read."""
    return _map(value, lambda text: _written.get(text, text))


def storable(value: Any) -> Any:
    """`written`, without the credentials of URLs."""
    return _map(value, lambda text: _without_credentials(_written.get(text, text)))


def redacted(text: str) -> str:
    """A message without the credentials of URLs and the values of interpolated variables, except for existing paths and
    for values shorter than SHORTEST."""
    for value in sorted(_values, key=len, reverse=True):
        text = text.replace(value, _values[value])
    return _without_credentials(text)


def shown(text: str) -> str:
    """A `redacted` message with control characters of terminals escaped: it may quote names of other people's files."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], redacted(text))


def lines_of(problems: Iterable[str]) -> list[str]:
    """Problems as a command line shows them: `shown`, each cut to LONGEST characters, at most MOST of them."""
    left = iter(problems)
    lines = [shown(line if len(line) <= LONGEST else f"{line[:LONGEST]}...") for line in islice(left, MOST)]
    more = sum(1 for _ in left)
    return [*lines, f"and {more} problems more"] if more else lines


def has_credentials(text: str) -> bool:
    """Whether `storable` leaves out a part of `text`."""
    return storable(text) != written(text)


def resolved(text: str) -> str:
    """`text` with the values of its interpolations. Raises ValueError naming a variable that is not set."""
    names = VARIABLE.findall(text)
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"the environment variable {missing[0]} is not set")
    if names:
        for name in names:
            _note_variable(name)
        text, before = VARIABLE.sub(lambda match: os.environ[match[1]], text), text
        _written[text] = before
    return text


def restored(stored: Any, given: Any, problems: list[str], key: str = "") -> Any:
    """The settings that `storable` wrote to `stored`. An interpolation gets its value from the environment; credentials
    come from the same URL in `given`, the settings of this start. Appends a line to `problems` for each missing secret.
    """
    if isinstance(stored, dict):
        mine = given if isinstance(given, Mapping) else {}
        return {
            name: restored(below, mine.get(name), problems, f"{key}.{name}" if key else str(name))
            for name, below in stored.items()
        }
    if isinstance(stored, list):
        mine = given if isinstance(given, list | tuple) and len(given) == len(stored) else [None] * len(stored)
        return [restored(below, other, problems, key) for below, other in zip(stored, mine, strict=True)]
    if not isinstance(stored, str):
        return stored
    if isinstance(given, str) and storable(given) == stored:
        return given
    if any(HIDDEN in (url[2], url[4]) for url in URL.finditer(stored)):
        problems.append(f"{key}={stored}: the credentials are not stored, and this command has none for this URL")
        return stored
    try:
        return resolved(stored)
    except ValueError as error:
        problems.append(f"{key}={stored}: {error}")
        return stored


def _without_credentials(text: str) -> str:
    return URL.sub(_url_without_credentials, text) if "://" in text else text


def _url_without_credentials(match: re.Match) -> str:
    scheme, user, path, query = match.groups()
    if user and not USER.fullmatch(user):
        user = HIDDEN
    rest = ""
    if query:
        kept = query.rstrip(PUNCTUATION)
        if all(VARIABLE.fullmatch(pair.partition("=")[2]) for pair in query.split("&")):
            kept = query
        elif kept:
            rest, kept = query[len(kept) :], HIDDEN
    else:
        kept = query
    return f"{scheme}{'' if user is None else user + '@'}{path}{'' if kept is None else '?' + kept}{rest}"


def _note_variable(name: str) -> None:
    value = os.environ.get(name, "")
    if len(value) >= SHORTEST and not SHOWN.fullmatch(name) and not os.path.exists(value):
        _values[value] = _values[quote(value, safe="")] = f"${{oc.env:{name}}}"


def _note(value: Any, text: Any) -> None:
    """Keeps the texts of settings with interpolations, for `written`."""
    if isinstance(value, dict) and isinstance(text, dict):
        for key, below in value.items():
            _note(below, text.get(key))
    elif isinstance(value, list) and isinstance(text, list):
        for below, other in zip(value, text, strict=False):
            _note(below, other)
    elif isinstance(value, str) and isinstance(text, str) and VARIABLE.search(text):
        _written[value] = text


@contextmanager
def _variables_kept() -> Iterator[list[str]]:
    """Within the block, OmegaConf resolves a variable to its own `${oc.env:NAME}`, and one that is not set to its
    default. Yields the names of the former."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    names: list[str] = []

    def keep(name: str, *default: Any) -> str | None:
        if name not in os.environ:
            return oc.env(name, *default)
        names.append(name)
        return f"${{oc.env:{name}}}"

    OmegaConf.register_new_resolver("oc.env", keep, replace=True)
    try:
        yield names
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _map(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(below, change) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_map(below, change) for below in value]
    return change(value) if isinstance(value, str) else value
