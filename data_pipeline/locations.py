"""Checks of paths and URLs in settings: which may be opened, and which are local."""

import re

SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(//|:)?")
CHAIN = re.compile(r"(?:^|::)([A-Za-z][\w+.-]+)(?=://|::)")  # the schemes of simplecache::s3://bucket/x


def openable(path: str) -> str:
    """Returns `path`, a local path or a URL of an fsspec file system. Raises ValueError for any other scheme:
    WebDataset runs `pipe:cat x` as a shell command."""
    if match := SCHEME.match(path):
        from fsspec import available_protocols

        known = set(available_protocols())
        schemes = CHAIN.findall(path) if match[2] else [match[1]]
        if unknown := [scheme for scheme in schemes if not match[2] or scheme not in known]:
            raise ValueError(f"{unknown[0]}: is no file system that fsspec opens: refused")
    return path


def local(path: str) -> str:
    """Returns `path`, a local path. Raises ValueError for a URL, which would create a local folder such as `s3:`."""
    if "://" in path:
        raise ValueError("is a URL: it must be a local or mounted folder")
    return path
