"""Booleans given to settings that are numbers: pydantic reads true as 1 and false as 0."""

from collections.abc import Iterator, Mapping
from typing import Any


def booleans_as_numbers(given: Any, checked: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(Dotted name, one line) of every setting with a boolean in `given` that is a number in `checked`.

    given: plain nested settings. checked: the same settings as pydantic took them, as nested mappings, defaults
    included.
    """
    if isinstance(given, Mapping) and isinstance(checked, Mapping):
        for key in filter(checked.__contains__, given):
            yield from booleans_as_numbers(given[key], checked[key], f"{name}.{key}" if name else str(key))
    elif isinstance(given, list | tuple) and isinstance(checked, list | tuple):
        for value, number in zip(given, checked, strict=False):
            yield from booleans_as_numbers(value, number, name)
    elif isinstance(given, bool) and isinstance(checked, int | float) and not isinstance(checked, bool):
        yield name, f"{name}={given} must not be a boolean: it would be read as {checked}"
