"""Fetches packages by exact version with apt-get and pip, checks their hashes, and takes documents out of them."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from data_pipeline.corpus.settings import Package
from data_pipeline.errors import InputError, StageError
from data_pipeline.files import sha256_of

# The platform of PyPI's wheels, so that every machine gets the same files.
WHEEL = ["--python-version=3.13", "--implementation=cp", *(f"--abi={abi}" for abi in ("cp313", "abi3", "none"))]
WHEEL += [f"--platform=manylinux{number}_x86_64" for number in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")]


def fetch(packages: Mapping[str, Package], folder: Path) -> dict[str, Path]:
    """name -> the package's file in `folder`, downloaded if it is not there. All packages are tried. Raises InputError,
    where the hash of a file is another, or StageError, with a line for each package that cannot be had."""
    found, wrong, missing = {}, [], []
    of_debian = [name for name, package in packages.items() if package.kind == "debian"]
    if of_debian and shutil.which("dpkg-deb") is None:
        raise InputError(f"packages.{of_debian[0]}.kind=debian needs the program dpkg-deb, which is not on PATH")
    for name, package in packages.items():
        path = folder / package.file_name(name)
        if not path.exists() and (why := _download(name, package, path)):
            advice = "refresh the package lists with apt-get update, or " if package.kind == "debian" else ""
            advice += f"put the file that has sha256 {package.sha256} at {path}"
            missing.append(f"packages.{name}: version {package.version} cannot be downloaded: {why}; {advice}")
        elif (hashed := sha256_of(path)) != package.sha256:
            wrong.append(f"packages.{name}.sha256={package.sha256}: {path} has sha256 {hashed}")
        found[name] = path
    if wrong:
        raise InputError(*wrong, *missing)
    if missing:
        raise StageError("\n".join(missing))
    return found


def _download(name: str, package: Package, path: Path) -> str:
    """Downloads the package's file to `path`; returns why that failed, "" on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        try:
            done = subprocess.run(_command(name, package), cwd=place, capture_output=True, text=True)
        except FileNotFoundError as error:
            return str(error)
        found = list(Path(place).iterdir())
        if done.returncode or len(found) != 1:
            return (done.stderr.strip() or done.stdout.strip() or "nothing came").splitlines()[-1]
        found[0].rename(path)
    return ""


def _command(name: str, package: Package) -> list[str]:
    if package.kind == "debian":
        return ["apt-get", "download", f"{name}={package.version}"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    return [*pip, "--only-binary=:all:", *WHEEL, f"{name}=={package.version}"]


def take(name: str, package: Package, path: Path, folder: Path, share: float) -> dict[str, int]:
    """Writes the chosen files of a package below `folder`, each at its path in the package; returns {files, bytes}.
    share: of the files, by the hash of their paths."""
    files = size = 0
    for member, data in _members(path, package):
        if int(hashlib.sha256(f"{name}/{member}".encode()).hexdigest()[:16], 16) >= share * 2**64:
            continue
        if ".." in Path(member).parts or member.startswith("/"):
            raise InputError(f"packages.{name}: {path.name} has a file outside its own folder: {member}")
        place = folder / member
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
        files, size = files + 1, size + len(data)
    if not files and share == 1:
        raise InputError(f"packages.{name}.files={list(package.files)}: no file of {path.name} matches")
    return {"files": files, "bytes": size}


def _members(path: Path, package: Package) -> Iterator[tuple[str, bytes]]:
    """(Path, content) of the package's files that are chosen."""
    chosen = lambda member: any(fnmatchcase(member, pattern) for pattern in package.files)  # noqa: E731
    inner = lambda member: fnmatchcase(member, package.inner or "")  # noqa: E731
    outer = inner if package.inner else chosen
    with path.open("rb") as file:
        for member, data in _in_zip(file, outer) if package.kind == "pypi" else _in_deb(path, outer):
            if package.inner:
                read = _in_zip if member.endswith(".zip") else _in_tar
                yield from read(io.BytesIO(data), chosen)
            else:
                yield member, data


def _in_zip(file: BinaryIO, chosen) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if not entry.is_dir() and chosen(entry.filename):
                yield entry.filename, archive.read(entry)


def _in_deb(path: Path, chosen) -> Iterator[tuple[str, bytes]]:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as program:
        yield from _in_tar(program.stdout, chosen)


def _in_tar(file: BinaryIO, chosen) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for entry in archive:
            if entry.isreg() and chosen(member := entry.name.removeprefix("./")):
                yield member, archive.extractfile(entry).read()
