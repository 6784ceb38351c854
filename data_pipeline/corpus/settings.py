"""Settings of `python -m data_pipeline.corpus`; defaults and the packages are in conf/corpus.yaml."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.sources import STRICT, LocalFolder, Positive

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Package:
    """A package, whose file has this sha256. files: patterns (fnmatch) of the paths in it that are documents. inner:
    pattern of the one archive (.zip, .tar.*) within the package that holds the files, if they are not in the package
    itself. licence: as the package states it, for information."""

    source: Literal["code", "documentation", "prose"]
    kind: Literal["debian", "pypi"]
    version: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    licence: str
    files: tuple[str, ...]
    inner: str | None = None

    def file_name(self, name: str) -> str:
        """The name that the package's file is stored under."""
        return f"{name}_{self.version.replace(':', '%3a')}.{'deb' if self.kind == 'debian' else 'whl'}"


@dataclass(frozen=True, config=STRICT)
class CorpusSettings:
    """output: folder of the corpus. packages: name -> Package. shares: source -> share of its files that is taken,
    chosen by the hash of their paths. fraction: share of these that is taken, for a smaller corpus. vocab_size: entries
    of the tokenizer. heldout_fraction: share of documents held out. part_bytes: largest size of a part's file, in
    bytes. tasks, workers: as in data_pipeline.run."""

    output: LocalFolder
    packages: Annotated[dict[str, Package], Field(min_length=1)]
    shares: dict[Literal["code", "documentation", "prose"], Share] = dataclasses.field(default_factory=dict)
    fraction: Share = 1.0
    vocab_size: Positive = 16384
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    part_bytes: Positive = 60_000_000
    tasks: Positive = 32
    workers: Positive = 2

    def decisive(self) -> dict:
        """The settings that decide the bytes of the corpus."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("output", "workers")}
