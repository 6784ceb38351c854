"""Who may import whom, as docs/design states it: checked on the syntax tree, imports inside functions included."""

import ast
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "data_pipeline", "megatron_tn", "launch")

# Part of the project -> the other parts it may import. A module is in the longest part that is a prefix of its name.
# Command lines (megatron_tn/*.py) may import every part, and of data_pipeline what reads shards.
ALLOWED = {
    "kernels": [],
    "data_pipeline": [],
    "megatron_tn.config": ["data_pipeline.booleans", "data_pipeline.redaction"],
    "megatron_tn.cli": ["megatron_tn.config", "data_pipeline.redaction", "data_pipeline.words"],
    "megatron_tn.device": [],
    "megatron_tn.precision": ["kernels", "megatron_tn.device"],
    "megatron_tn.parallel": ["kernels", "megatron_tn.device", "megatron_tn.precision", "megatron_tn.config"],
    "megatron_tn.gradients": ["megatron_tn.parallel", "megatron_tn.precision", "megatron_tn.device"],
    "megatron_tn.model": ["kernels", "megatron_tn.parallel", "megatron_tn.precision", "megatron_tn.config"],
    "megatron_tn.optim": ["kernels", "megatron_tn.config"],
    "megatron_tn.engine": [
        "megatron_tn.model",
        "megatron_tn.gradients",
        "megatron_tn.optim",
        "megatron_tn.parallel",
        "megatron_tn.device",
        "megatron_tn.config",
    ],
    "megatron_tn.checkpoint": ["megatron_tn.model", "megatron_tn.parallel", "megatron_tn.device", "megatron_tn.config"],
    "megatron_tn.released": [
        "megatron_tn.model",
        "megatron_tn.checkpoint",
        "megatron_tn.parallel",
        "megatron_tn.config",
        "kernels",  # of the modelling file, which is data to all others
    ],
    "megatron_tn.inference": [
        "kernels",  # sampling
        "megatron_tn.model",
        "megatron_tn.parallel",
        "megatron_tn.device",
        "megatron_tn.config",
    ],
    "megatron_tn.evaluation": [
        "megatron_tn.inference",
        "megatron_tn.model",
        "megatron_tn.parallel",
        "megatron_tn.config",
    ],
    "megatron_tn.training": [
        "megatron_tn.engine",
        "megatron_tn.checkpoint",
        "megatron_tn.optim",
        "megatron_tn.evaluation",
        "megatron_tn.parallel",
        "megatron_tn.planning",
        "megatron_tn.device",
        "megatron_tn.config",
    ],
    "megatron_tn.planning": [
        "megatron_tn.optim",
        "megatron_tn.model",
        "megatron_tn.parallel",
        "megatron_tn.engine",
        "megatron_tn.device",
        "megatron_tn.config",
    ],
    "megatron_tn": [
        "kernels",
        "megatron_tn",
        "data_pipeline.stream",
        "data_pipeline.shards",
        "data_pipeline.selfclean",
        "data_pipeline.words",
        "data_pipeline.redaction",
    ],
    "launch": [
        "kernels.bench",
        "data_pipeline.html_page",
        "data_pipeline.shards.remote",  # how patient a submission is
        "megatron_tn.cli",
        "megatron_tn.config",
        "megatron_tn.planning",
        "megatron_tn.checkpoint.manifest",
        "megatron_tn.training.run_folder",
        "megatron_tn.training.goodput",
        "megatron_tn.training.compare",
        "megatron_tn.training.curve",
        "megatron_tn.training.summary",
        "megatron_tn.training.hooks",
        "megatron_tn.training.submission",
        "megatron_tn.training.watchdog.signs",  # whether a run's process has ended
        "megatron_tn.plot",
        "megatron_tn.data",
        "megatron_tn.outline",
        "megatron_tn.preflight",
    ],
}


def is_in(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def part_of(module: str) -> str:
    return max((part for part in ALLOWED if is_in(module, part)), key=len)


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of a project module, wherever in the file it stands."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides which part it reaches into"
            # `from kernels import lrpe` reaches the package; `from megatron_tn import cli` the module below it.
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if module_exists(name) else node.module) for name in below]
    return [(line, module) for line, module in found if module.split(".")[0] in PACKAGES]


def module_exists(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_within_what_the_design_allows(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for line, module in imports(path):
        allowed = is_in(module, own) or any(is_in(module, part) for part in ALLOWED[own])
        assert allowed, f"{path.relative_to(ROOT)}:{line}: {own} must not import {module}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """What `start` imports, directly or not. edges: {module: modules it imports}."""
    found, ahead = set(), [start]
    while ahead:
        new = edges.get(ahead.pop(), set()) - found
        found |= new
        ahead += new
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other: strongly connected components of {module: modules it imports}."""
    reverse: dict[str, set[str]] = {}
    for module, imported in graph.items():
        for name in imported:
            reverse.setdefault(name, set()).add(module)
    found, seen = [], set()
    for module in graph:
        if module not in seen and module in reached(module, graph):
            found.append(reached(module, graph) & reached(module, reverse))
            seen |= found[-1]
    return found


def test_no_modules_import_each_other():
    """Imports inside functions and under TYPE_CHECKING count: they only hide a circle."""
    graph = {module_name(path): {module for _, module in imports(path)} for path in modules()}
    assert circles(graph) == []


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"f"}}
    assert circles(graph) == [{"a", "b", "c"}, {"f"}]


# What modules outside megatron_tn/model may import of it; all else belongs to one architecture, and is looked up.
MODEL = {f"megatron_tn.model.{name}" for name in ("base", "registry", "init")}
# Decay rates stand in a released config.json.
RELEASED = {"megatron_tn/released/transnormer.py": {"megatron_tn.model.decay"}}


def test_no_module_outside_model_imports_an_architecture():
    offenders = []
    for path in modules():
        name = str(path.relative_to(ROOT))
        if not name.startswith("megatron_tn/model/"):
            allowed = MODEL | RELEASED.get(name, set())
            found = [(line, module) for line, module in imports(path) if is_in(module, "megatron_tn.model")]
            offenders += [f"{name}:{line}: {module}" for line, module in found if module not in allowed]
    assert not offenders


def test_the_check_can_fail(tmp_path):
    offender = tmp_path / "offender.py"
    offender.write_text("def late():\n    from megatron_tn.engine import base\n    import data_pipeline.stream\n")
    assert [module for _, module in imports(offender)] == ["megatron_tn.engine.base", "data_pipeline.stream"]


def libraries(nodes: Iterable[ast.AST]) -> set[str]:
    """The packages that these import statements name."""
    found = set()
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found


def test_one_file_imports_deepspeed():
    importing = [path for path in modules() if "deepspeed" in libraries(ast.walk(tree(path)))]
    assert [str(path.relative_to(ROOT)) for path in importing] == ["megatron_tn/engine/deepspeed/adapter.py"]


def test_a_rank_that_trains_imports_no_library_of_the_cleaning_pipeline():
    """It builds the filter's rules and edits, every file of those folders (data_pipeline/registry.py)."""
    graph = {module_name(path): {module for _, module in imports(path)} for path in modules()}
    for module, imported in graph.items():  # a module's packages are imported before it
        imported |= {
            ".".join(name.split(".")[:n]) for name in (module, *imported) for n in range(1, name.count(".") + 1)
        }
    graph["rank"] = {"megatron_tn.train", "data_pipeline.corpus.join"}
    graph["rank"] |= {name for name in graph if name.startswith(("data_pipeline.edits.", "data_pipeline.rules."))}
    at_import = {module_name(path): libraries(tree(path).body) for path in modules()}
    needing = {name for name in reached("rank", graph) if at_import.get(name, set()) & {"datatrove", "resiliparse"}}
    assert needing == set()


def test_a_world_with_engines_is_left_by_one_function():
    """`leave_world` releases what engines registered for it."""
    leaving = [path for path in modules() if "dist.destroy_process_group" in path.read_text()]
    assert {module_name(path) for path in leaving} == {"megatron_tn.parallel.world"}


def test_a_start_imports_dtensor_with_the_engine_that_needs_it_alone():
    """It takes 0.6 s of every rank's start."""

    def at_import(*parts: str) -> list[str]:
        found = []
        for path in modules():
            froms = [node for node in tree(path).body if isinstance(node, ast.ImportFrom)]
            names = [f"{node.module}.{alias.name}" for node in froms for alias in node.names]
            if any(is_in(name, part) for name in names for part in parts):
                found.append(str(path.relative_to(ROOT)))
        return found

    assert at_import("torch.distributed.fsdp", "torch.distributed.tensor") == ["megatron_tn/engine/fsdp2.py"]
    assert at_import("megatron_tn.engine.fsdp2") == ["megatron_tn/planning/dry_run.py"]


def test_kernels_import_torch_and_triton_alone():
    outside = {"torch", "triton", "numpy"}
    for path in (ROOT / "kernels").rglob("*.py"):
        if "bench" in path.parts:
            continue  # measuring may use what it likes
        used = libraries(ast.walk(tree(path)))
        assert used <= outside | {"kernels"} | sys.stdlib_module_names, path
