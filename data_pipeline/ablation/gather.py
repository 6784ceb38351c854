"""Gathers text available on every machine: documentation and sources of the installed Python packages."""

import ast
import hashlib
import json
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import InputError
from data_pipeline.files import replacing

DOCUMENTATION = (".md", ".rst", ".txt")
LENGTHS = (400, 100_000)  # minimum and maximum UTF-8 bytes of a document; longer files are mostly data
STANDARD_LIBRARY = "python"
NO_TEXT = {"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__"}


class Text(NamedTuple):
    """A text of a package. `kind`: documentation or source; `place`: the file and, of a docstring, its line."""

    kind: str
    package: str
    place: str
    text: str


def gather(folder: Path, limits: dict[str, int], packages: list[str] | None, parts: int = 16) -> dict:
    """Writes distinct texts of installed packages to `folder`/NN.jsonl and returns
    {package: {version, documents, bytes}}.

    limits: {kind: UTF-8 bytes at most}. The choice and order of texts follow their hashes. Raises InputError for a
    package that is not installed, or when more than LENGTHS[1] bytes and a tenth of a limit are missing.
    """
    versions = installed(packages)
    texts: dict[str, tuple[Text, int]] = {}
    for name in versions:
        for found in package_texts(name):
            data = found.text.encode(errors="replace")  # a docstring may contain an unpaired surrogate
            if LENGTHS[0] <= len(data) <= LENGTHS[1]:
                # Hash digits other than document.in_heldout's, for an independent choice.
                digest = hashlib.sha256(data).hexdigest()[32:]
                texts.setdefault(digest, (found._replace(text=data.decode()), len(data)))
    left, taken = dict(limits), {}
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[bytes]] = [[] for _ in range(parts)]
    for digest, (found, size) in sorted(texts.items()):
        if left[found.kind] < size:
            continue
        left[found.kind] -= size
        entry = taken.setdefault(found.package, {"version": versions[found.package], "documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += size
        record = {"id": f"{found.kind}/{found.package}/{found.place}", "text": found.text}
        lines[int(digest[:8], 16) % parts].append(json.dumps(record).encode() + b"\n")
    if short := [
        f"{kind}_bytes={limits[kind]}: only {limits[kind] - size} bytes found"
        for kind, size in left.items()
        if size > max(LENGTHS[1], limits[kind] // 10)
    ]:
        raise InputError(*short)
    for number, part in enumerate(lines):
        with replacing(folder / f"{number:02d}.jsonl") as file:
            file.writelines(part)
    return dict(sorted(taken.items()))


def installed(packages: list[str] | None) -> dict[str, str]:
    """{name: version} of `packages`, or of all installed ones, including the standard library. Raises InputError."""
    versions = {STANDARD_LIBRARY: platform.python_version()}
    versions |= {found.metadata["Name"]: found.version for found in distributions()}
    if packages is None:
        return dict(sorted(versions.items()))
    if missing := sorted(set(packages) - set(versions)):
        raise InputError(*(f"packages: {name} is not installed" for name in missing))
    return {name: versions[name] for name in sorted(packages)}


def package_texts(name: str) -> Iterator[Text]:
    """The texts of a package: files of documentation, docstrings, and sources without their docstrings."""
    for place, path in sorted(_files(name)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a missing or binary file
        if path.suffix in DOCUMENTATION:
            yield Text("documentation", name, place, text)
        else:
            yield from _split_source(name, place, text)


def _files(name: str) -> Iterator[tuple[str, Path]]:
    if name == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    else:
        found = next(found for found in distributions() if found.metadata["Name"] == name)
        paths = [(path.as_posix(), Path(path.locate())) for path in found.files or ()]
    for place, path in paths:
        if path.suffix in (*DOCUMENTATION, ".py") and not NO_TEXT & set(Path(place).parts):
            yield place, path


def _split_source(name: str, place: str, source: str) -> Iterator[Text]:
    """Each docstring of a module as a document, and the module without docstrings."""
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings of invalid escapes in the packages' strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (docstring := ast.get_docstring(node)) is not None:
            statement = node.body[0]
            yield Text("documentation", name, f"{place}:{statement.lineno}", docstring)
            lines[statement.lineno - 1 : statement.end_lineno] = [""] * (statement.end_lineno - statement.lineno + 1)
    yield Text("source", name, place, "".join(lines))
