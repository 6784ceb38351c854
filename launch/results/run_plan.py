"""A plan of runs (launch/plans/): what its YAML file may hold, and the runs of its grids."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_tn.config import BenchmarkConfig, EvaluateConfig, known_keys, unknown_key

# Evaluations of every run: name -> settings of megatron_tn.evaluate. Of the held-out text in pieces, whose figure is
# the row's, and of whole documents, equally many of each source where it has them.
OF_ALL = {
    "pieces": {"split": "pieces", "batch_tokens": 65536},
    "heldout": {"split": "heldout", "batch_tokens": 16384, "max_document_tokens": 131072, "max_documents": 240},
}
HELD_OUT = ("evaluate", "curve")  # values of `held_out`: "evaluate" (default) evaluates OF_ALL, "curve" does not
SPLITS = ("train", "heldout", "pieces")  # splits in the folder --data
KEYS = ("settings", "pieces", "evaluations", "held_out")
OF_RUNS = {*known_keys(BenchmarkConfig), "experiment"}
OF_EVALUATIONS = {*known_keys(EvaluateConfig), "split"}
ELSEWHERE = {"data.manifest": "--data", "evaluation.manifest": "--data", "run_dir": "--runs", "checkpoint": "--runs"}
ELSEWHERE |= {"manifest": "split", "output": "--runs", "benchmark.output": "--output"}  # setting -> what says its value
ANY_BELOW = ("engine.deepspeed_config.", "hydra.")  # settings without a list of their names
BEST = re.compile(r"best of (\w+)(?: (\S+))?")  # model, and variant
RESULT = "result"  # name of the row of a trained run

Row = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML's would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key, count in Counter(keys).items():
            if count > 1:
                raise Bad(f"{key} is there twice in one mapping, at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class Bad(Exception):
    """A plan that cannot be run; the message is one line."""


def read_plan(path: Path) -> dict[str, Any]:
    """{"settings": {setting: value}, "pieces": {name: [grid]}, "evaluations": {name: {"split": ..., setting: value}},
    "held_out": one of HELD_OUT}. OF_ALL is among the evaluations unless the plan says `held_out: curve`. Raises Bad."""
    try:
        plan = yaml.load(path.read_text(), _Loader)
        _check(plan)
    except Bad as bad:
        raise Bad(f"{path}: {bad}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise Bad(f"{path}: no plan: {' '.join(str(error).split())}") from None
    plan = {"settings": {}, "evaluations": {}, "held_out": HELD_OUT[0]} | plan
    return plan | {"evaluations": (OF_ALL if plan["held_out"] == HELD_OUT[0] else {}) | plan["evaluations"]}


def _check(plan: Any) -> None:
    """Raises Bad for the first key of a plan that is unknown, missing, or has a value of another form."""
    has = f"a plan has {', '.join(KEYS)}"
    if not isinstance(plan, dict):
        raise Bad(f"it holds {plan!r:.50}, not keys and values: {has}")
    if unknown := [key for key in plan if key not in KEYS]:
        raise Bad(f"unknown key {unknown[0]}: {has}")
    if "pieces" not in plan:
        raise Bad(f"pieces is missing: {has}")
    if (held_out := plan.get("held_out", HELD_OUT[0])) not in HELD_OUT:
        raise Bad(f"held_out: {held_out} must be one of {', '.join(HELD_OUT)}")
    _check_settings("settings", plan.get("settings", {}), OF_RUNS)
    for name, piece in _mapping("pieces", plan["pieces"]).items():
        if not isinstance(piece, list):
            raise Bad(f"pieces.{name}: {piece!r:.50} must be a list of grids, each a mapping of settings to lists")
        for place, grid in ((f"pieces.{name}[{index}]", grid) for index, grid in enumerate(piece)):
            _check_settings(place, grid, OF_RUNS)
            for key, values in grid.items():
                if not isinstance(values, list) or not values:
                    raise Bad(f"{place}.{key}: {values!r:.50} must be a list of values")
    for name, settings in _mapping("evaluations", plan.get("evaluations", {})).items():
        _check_settings(f"evaluations.{name}", settings, OF_EVALUATIONS)
        if settings.get("split") not in SPLITS:
            raise Bad(f"evaluations.{name}.split: {settings.get('split')} must be one of {', '.join(SPLITS)}")


def _mapping(place: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Bad(f"{place}: {value!r:.50} must be a mapping of names")
    return value


def _check_settings(place: str, settings: Any, known: set[str]) -> None:
    for key in map(str, _mapping(place, settings)):
        name = key.lstrip("+")
        if name in ELSEWHERE:
            raise Bad(f"{place}.{key}: {ELSEWHERE[name]} says it; leave it out here")
        if name not in known and not name.startswith(ANY_BELOW):
            raise Bad(f"{place}: {unknown_key(name, sorted(known))}")


def grid_runs(grid: dict[str, list[Any]], done: list[Row]) -> Iterator[dict[str, Any]]:
    """The settings of each run of a grid; `done`: rows from which "best of MODEL" is read. Raises Bad."""
    for values in itertools.product(*grid.values()):
        yield {key: _resolved(key, value, done) for key, value in zip(grid, values, strict=True)}


def _resolved(key: str, value: Any, done: list[Row]) -> Any:
    if not (wanted := BEST.fullmatch(str(value))):
        return value
    column = key.rpartition(".")[2]
    asked = (RESULT, wanted[1], wanted[2] or "")
    found = [row for row in done if (row["name"], row.get("model"), row.get("variant", "")) == asked]
    diverged = " that did not diverge" if found else ""
    found = [row for row in found if math.isfinite(row["value"])]
    if not found:
        raise Bad(f"{key}={value}: no run of {wanted[0].removeprefix('best of ')}{diverged} has a row yet")
    return min(found, key=lambda row: row["value"])[column]
