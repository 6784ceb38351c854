"""Registers of rules and of edits. Each rule or edit is a file that adds its class to a register."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable

from pydantic.dataclasses import dataclass

from data_pipeline.thresholds import STRICT


@dataclasses.dataclass(frozen=True)
class Entry:
    """`kind`: the dataclass of thresholds, whose instances are called with a text; `on`: whether on by default;
    `place`: entries are applied in ascending order of it."""

    name: str
    kind: type
    on: bool
    place: int


class Register:
    """The rules, or the edits, of one folder."""

    def __init__(self):
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, *, on: bool = False, place: int = 0) -> Callable[[type], type]:
        """Class decorator: adds the class as `name`. Raises ValueError for a duplicate name."""

        def enter(kind: type) -> type:
            if name in self._entries:
                raise ValueError(f"{kind.__module__}: {self._entries[name].kind.__module__} is registered as {name!r}")
            self._entries[name] = Entry(name, kind, on, place)
            return kind

        return enter

    def import_folder(self, package: str, path: list[str]) -> None:
        """Imports every module of `package`, so that each adds its class."""
        for module in pkgutil.iter_modules(path):
            importlib.import_module(f"{package}.{module.name}")

    def classes(self, order: tuple[str, ...] = ()) -> dict[str, type]:
        """{name: class} in `order`, or by place without one. Raises ValueError when `order` does not name every entry
        once."""
        if order and sorted(order) != sorted(self._entries):
            raise ValueError(f"registered are {sorted(self._entries)}, the order names {sorted(order)}")
        by_place = sorted(self._entries.values(), key=lambda entry: (entry.place, entry.name))
        return {name: self._entries[name].kind for name in order or [entry.name for entry in by_place]}

    def settings(self, name: str, doc: str, order: tuple[str, ...] = ()) -> type:
        """A pydantic dataclass `name` with a field for each entry, in the order of `classes`: its thresholds, or None
        for off. Its method `active()` returns {name: thresholds} of the entries that are on."""
        fields = []
        for entry in map(self._entries.get, self.classes(order)):
            default = dataclasses.field(default_factory=entry.kind) if entry.on else None
            fields.append((entry.name, entry.kind | None, default))
        namespace = {"__doc__": doc, "active": _active}
        plain = dataclasses.make_dataclass(name, fields, frozen=True, namespace=namespace)
        return dataclass(plain, frozen=True, config=STRICT)


def _active(settings: object) -> dict[str, Callable]:
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value is not None}
