"""Paths and URLs as settings name them: which may be opened, and which lie on this machine."""

import re

SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(//|:)?")


def openable(path: str) -> str:
    """A local path, or a URL of a file system that fsspec knows. Raises ValueError for any other scheme: WebDataset
    reads `pipe:cat x` as a shell command."""
    if match := SCHEME.match(path):
        from fsspec import available_protocols

        scheme, slashes = match.groups()
        if not slashes or scheme not in available_protocols():
            raise ValueError(f"{scheme}: is no file system that fsspec opens: refused")
    return path


def local(path: str) -> str:
    """A path of this machine. Raises ValueError for a URL, which would name a local folder such as `s3:`."""
    if "://" in path:
        raise ValueError("is a URL: output goes to a folder of this machine, or one that it shares")
    return path
