"""Folder trees of source code, text or web pages: each file is a document."""

import dataclasses
import importlib.util
import sysconfig
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.readers.base import File, Found, Items, Quarantined, too_large
from data_pipeline.readers.html import SUFFIXES, page_text
from data_pipeline.readers.listing import Listing, suffix_listing
from data_pipeline.sources import Tree

COMPRESSED = (".gz", ".zst")


def read_file(file: BinaryIO, source: Tree, name: str) -> Items:
    """The document of a file. Undecodable bytes become U+FFFD, which the rule `garbled` counts."""
    data = file.read(source.max_document_bytes + 1)
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if len(data) > source.max_document_bytes:
        yield too_large("", len(data), source)
    elif name.lower().endswith(SUFFIXES):
        yield page_text(data, None, "", source)
    elif not (text := data.decode("utf-8", errors="replace").removeprefix("\ufeff")) or text.isspace():
        yield Quarantined("", "empty", "the file is empty", len(data))
    else:
        yield Found("", text)


def tree_listing(name: str, source: Tree) -> Listing:
    """The files of a source, and of the packages in `fill`. Raises InputError when there is none, or less than
    `minimum_bytes` of text."""
    root = sysconfig.get_path("stdlib") if source.path == "stdlib" else source.path
    listing = suffix_listing(name, dataclasses.replace(source, path=root))
    files, absent = list(listing.files), []
    for package in source.fill:
        if sum(file.size for file in files) >= source.minimum_bytes:
            break
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            absent.append(package)
            continue
        found = suffix_listing(name, dataclasses.replace(source, path=spec.submodule_search_locations[0]))
        prefix = f"{name}/"
        files += [File(f"{prefix}{package}:{f.id.removeprefix(prefix)}", f.open, f.size) for f in found.files]
    if (total := sum(file.size for file in files)) < source.minimum_bytes:
        missing = [f"package {package}" for package in absent]
        if source.path == "stdlib" and not Path(root, "test").is_dir():
            missing.insert(0, "the standard library's test package")
        raise InputError(
            f"sources.{name}.minimum_bytes={source.minimum_bytes}: only {total} bytes found in {root}"
            + (f"; missing here: {', '.join(missing)}" if missing else "")
        )
    notes = [] if source.path == "stdlib" else listing.notes  # other files of the standard library are not worth a note
    return Listing(sorted(files, key=lambda file: file.id), notes)
