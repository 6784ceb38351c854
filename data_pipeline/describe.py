"""The settings of a command line as text: what its dataclasses' docstrings say, and every setting with its default."""

import dataclasses
import itertools
import json
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass

from data_pipeline.config import dataclasses_of

WIDTH = 110


def settings_text(kind: type) -> str:
    """All settings of dataclass `kind`, group after group."""
    title = "settings (KEY=VALUE) with the defaults of the code; the files of conf/ set others:"
    return "\n".join([title, *_group(kind, "")])


def _group(kind: type, name: str, which: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    """The lines of one group and of those below it. name: dotted. which: kind of the group, where it has several.
    above: dataclasses whose fields are shown already."""
    yield name and f"\n{name}{which}:"
    about = " ".join((kind.__doc__ or "").split())
    yield from textwrap.wrap(about, WIDTH, initial_indent="  ", subsequent_indent="  ")
    shown, groups = {field.name for part in above for field in dataclasses.fields(part)}, []
    for field in dataclasses.fields(kind):
        is_named = typing.get_origin(field.type) is dict  # {name: group}
        label = f"{name}.{field.name}" if name else field.name
        if below := dataclasses_of(typing.get_args(field.type)[1] if is_named else field.type):
            groups.append((f"{label}.NAME" if is_named else label, below))
        elif field.name not in shown:
            yield f"    {label}{_default(kind, field.name)}"
    for label, below in groups:
        of_kinds = itertools.chain.from_iterable(part.__mro__[1:] for part in below if len(below) > 1)
        bases = dict.fromkeys(filter(is_dataclass, of_kinds))
        for base in bases:  # settings that the kinds of a group have in common
            yield from _group(base, label)
        for part in below:
            kinds = typing.get_args(part.__annotations__.get("kind"))
            yield from _group(part, label, f" of kind={'|'.join(kinds)}" if kinds else "", tuple(bases))


def _default(kind: type, name: str) -> str:
    """=VALUE, as it is typed; empty for a setting that must be given."""
    field = kind.__pydantic_fields__[name]
    if field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    return f"={default if isinstance(default, str) else json.dumps(default)}"
