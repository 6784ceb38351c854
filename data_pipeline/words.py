"""Words of a command line, KEY=VALUE in Hydra's grammar, and settings whose text is taken as it is typed."""

import os
import re
import types
from collections.abc import Callable


def as_typed(word: str, takes: Callable[[str], tuple[type, ...]], *, multirun: bool = False) -> str:
    """The word with its value in quotes where Hydra would read something else than was typed (20250101, 1e3, true), or
    nothing at all (a=b, my [first] run), and with the home folder for `~` at the value's beginning. null is left to
    Hydra, and so are sweeps in a multirun.

    takes: key -> the types whose union its setting takes; () for an unknown one.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = word.partition("=")
    kinds = takes(key.lstrip("+"))
    if value.startswith("~") and not (multirun and "," in value):
        # Whatever the setting takes: nothing else begins so. Before Hydra, which makes folders itself.
        return f"{key}={quoted(os.path.expanduser(value))}"
    if not equals or str not in kinds or not set(kinds) <= {str, int, types.NoneType}:
        return word
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return word if multirun and "," in value else f"{key}={quoted(value)}"
    if override.is_sweep_override() or override.value() is None or isinstance(override.value(), str):
        return word
    return word if int in kinds and value.isdecimal() else f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """In Hydra's quotes: 'it\\'s'."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"
