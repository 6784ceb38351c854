"""Reads rows of measurements: JSON lines, each a flat object, with the keys that the tables of docs/ are made from."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = ("step", "step + optimizer", "training loop")
PASSES = ("forward", "forward + backward")
CURVE = re.compile(r"(\d+(\.\d+)?:(\d+(\.\d+)?|inf|nan)( |$))*")  # as of results.planned_run

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON may have and no file can
LARGEST = sys.float_info.max  # a whole number above is none that can be divided

Row = dict[str, Any]


class NotRows(Exception):
    """A file holds something other than rows; the message names file, line, key and problem."""


@dataclass(frozen=True)
class Form:
    """What the value of a key must be. or_null: also null, and the key may be missing."""

    words: str
    fits: Callable[[Any], bool]
    or_null: bool = False

    @property
    def optional(self) -> "Form":
        return Form(f"{self.words}, or null", self.fits, or_null=True)

    def problem(self, value: Any) -> str:
        return "" if (value is None and self.or_null) or self.fits(value) else f"must be {self.words}"


TEXT = Form("a text", lambda value: isinstance(value, str) and not SURROGATE.search(value))
FLAG = Form("true or false", lambda value: isinstance(value, bool))
WHOLE = Form("a whole number", lambda value: type(value) is int and abs(value) <= LARGEST)
COUNT = Form("a whole number above 0", lambda value: type(value) is int and 0 < value <= LARGEST)
NUMBER = Form("a number", lambda value: type(value) is float or (type(value) is int and abs(value) <= LARGEST))
POINTS = Form("pairs MILLION_TOKENS:BITS", lambda value: isinstance(value, str) and bool(CURVE.fullmatch(value)))

Forms = Mapping[str, Form]  # key -> form of its value

EVERY: Forms = {
    **dict.fromkeys(("command", "date", "name", "unit"), TEXT),
    **dict.fromkeys(("commit", "gpu", "cpu"), TEXT.optional),
    "value": NUMBER.optional,
}
MUST_BE_THERE = tuple(EVERY)  # also where null is a value
# Kind of a row -> keys beside EVERY; the tables of a kind read no others.
KINDS: dict[str, Forms] = {
    "training": {
        **dict.fromkeys(("model", "engine", "layout", "recompute", "replay"), TEXT),
        **dict.fromkeys(("gpus", "sequence_length", "micro_batch", "global_batch", "parameters"), COUNT),
        **dict.fromkeys(("value", "tokens_per_second"), NUMBER),
        **dict.fromkeys(("utilisation_sampled", "utilisation_datasheet", "peak_gib"), NUMBER.optional),
        **dict.fromkeys(("sampled_tflops", "datasheet_tflops"), NUMBER.optional),
    },
    "kernel": {
        **dict.fromkeys(("operator", "shape", "passes"), TEXT),
        "by": TEXT.optional,
        "value": NUMBER,
        **dict.fromkeys(("floor_ms", "extra_mib"), NUMBER.optional),
    },
    "decoding": {"model": TEXT, "position": WHOLE, "batch": COUNT, "fp8_weights": FLAG},
    "stream": {"value": NUMBER},
    "cleaning": dict.fromkeys(("value", "documents_per_s"), NUMBER),
    "result": {
        **dict.fromkeys(("plan", "run", "variant", "model"), TEXT),
        **dict.fromkeys(("steps", "tokens", "sequence_length", "global_batch"), COUNT),
        "seed": WHOLE,
        **dict.fromkeys(("lr", "value"), NUMBER),
        "curve": POINTS,
        **dict.fromkeys(("whole", "fp8_weights"), NUMBER.optional),
    },
}
PARTS = ("sources/", "positions/", "end_to_end/")  # of a result: bits per byte by part of the text


def kind_of(row: Row) -> str:
    """A key of KINDS; "" for a row that no table shows."""
    name = row["name"]
    if name in STEPS:
        return "training"
    if row.get("passes") in PASSES:
        return "kernel"
    if name.startswith("decoding"):
        return "decoding"
    return {"stream": "stream", "cleaning": "cleaning"}.get(name.partition(": ")[0], "result" * (name == "result"))


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files. Raises NotRows."""
    found = []
    for path in paths:
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise NotRows(f"{path}: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if problem := _problem(line):
                raise NotRows(f"{path}:{number}: {problem}")
            found.append(json.loads(line))
    return found


def _problem(line: bytes) -> str:
    """Why a line is no row; "" for one that is."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"no JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    if not isinstance(row, dict):
        return f"a row is an object, not {type(row).__name__}"
    if nested := [key for key, value in row.items() if isinstance(value, dict | list)]:
        return f"{nested[0]} is not a plain value, but a list or an object"
    if missing := [key for key in MUST_BE_THERE if key not in row]:
        return f"{', '.join(missing)} missing"
    forms = EVERY | KINDS.get(kind_of(row) if isinstance(row["name"], str) else "", {})
    if missing := [key for key, form in forms.items() if key not in row and not form.or_null]:
        return f"{', '.join(missing)} missing"
    forms |= {key: NUMBER.optional for key in row if key.startswith(PARTS)}
    wrong = ((key, form.problem(row.get(key))) for key, form in forms.items())
    return next((f"{key}={row.get(key)!r:.50} {problem}" for key, problem in wrong if problem), "")
