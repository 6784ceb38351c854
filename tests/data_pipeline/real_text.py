"""Real text that is on every machine: what Python's own documentation and modules say about themselves."""

import ast
import sysconfig
from pathlib import Path


def write_real_text(folder: Path, least: int) -> None:
    """Writes at least `least` documents, one a file: sections of the language reference that pydoc brings, and long
    docstrings of the standard library."""
    from pydoc_data.topics import topics

    texts = [text for text in topics.values() if len(text) >= 600]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if len(texts) >= least:
            break
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        texts += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= 700]
    folder.mkdir(parents=True)
    for number, text in enumerate(texts[:least]):
        (folder / f"{number:04d}.txt").write_text(text)
