"""Command line arguments KEY=VALUE in Hydra's grammar, with text values taken verbatim."""

import os
import re
import types
from collections.abc import Callable

PLAIN = re.compile(r"[A-Za-z_./-][A-Za-z0-9_./:-]*")


def as_typed(word: str, takes: Callable[[str], tuple[type, ...]], *, multirun: bool = False) -> str:
    """`word` with its value quoted where Hydra would change it (20250101, 1e3, true) or fail to parse it (a=b, my
    [first] run), and with a leading `~` expanded. null is left unquoted, as are sweeps in a multirun.

    takes: key -> types that its setting accepts; () for an unknown key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = word.partition("=")
    kinds = takes(key.lstrip("+"))
    if value.startswith("~") and not (multirun and "," in value):
        # For settings of every type, as no other value begins with ~. Before Hydra, which creates folders itself.
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


def value(text: str) -> str:
    """`text` as the value of an override that this program writes for another: quoted, unless it is a plain word."""
    return text if PLAIN.fullmatch(text) else quoted(text)


def quoted(text: str) -> str:
    """`text` quoted for Hydra, such as 'it\\'s'."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"
