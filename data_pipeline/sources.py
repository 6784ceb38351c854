"""Settings of each kind of source."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_pipeline.locations import local, openable
from data_pipeline.redaction import resolved, written
from data_pipeline.shards.index import language_number
from data_pipeline.thresholds import Count, Positive

STRICT = ConfigDict(extra="forbid")


def storable(language: str) -> str:
    """Returns `language` if a shard's index can store it; raises ValueError otherwise."""
    language_number(language)
    return language


Location = Annotated[str, AfterValidator(openable)]
LocalFolder = Annotated[str, AfterValidator(local)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Source:
    """Settings of all kinds. `path`: a folder, local or on any fsspec file system, such as s3://bucket/crawl.

    `category`: for the mixture and the report; `epochs`: repetitions of the source in an epoch of training; `priority`:
    of duplicates, the copy in the source of highest priority stays; `language`: the code of all documents ("" for code
    and the like), null to identify each; `max_document_bytes`: larger documents are quarantined unread;
    `max_expansion`: a compressed file whose content exceeds max_expansion x its size and max_document_bytes is a bomb:
    the documents before stay, and the rest is quarantined unread; `max_seconds`: a page that takes longer to extract is
    quarantined, and so is a line, record or batch of rows that takes more CPU time to decode. docs/bounds.md lists the
    resulting limits.
    """

    path: Location
    category: str = ""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    priority: Annotated[int, Field(ge=0, le=1000)] = 0
    language: Annotated[str, AfterValidator(storable)] | None = None
    max_document_bytes: Positive = 100_000_000
    max_expansion: Positive = 200
    max_seconds: Positive = 60

    def __getstate__(self) -> dict:
        # SLURM's tasks get it from a file, and resolve its variables in their environment.
        return self.__dict__ | {"path": written(self.path)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"path": resolved(state["path"])})


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Tree(Source):
    """A folder whose files are the documents: plain text, Markdown, source code; of .html, .htm and .xhtml the page's
    visible text. `suffixes`: of the files to read, also with .gz or .zst; `exclude`: names of folders that are skipped.
    `path` may be `stdlib`, the running Python's standard library. `fill`: installed packages to add, one by one, while
    the source has less than `minimum_bytes` bytes; a source that stays below is refused."""

    kind: Literal["tree"]
    suffixes: tuple[str, ...] = (".py",)
    exclude: tuple[str, ...] = ("site-packages", "dist-packages", "__pycache__", ".git", "node_modules")
    fill: tuple[str, ...] = ()
    minimum_bytes: Count = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Jsonl(Source):
    """JSON lines, plain, .gz or .zst: a document per line. `glob`: pattern of the files below `path`. `text_key`: key
    of the text; `id_key`: key of the document's name, kept as `key` in the metadata. `html`: the text is an HTML page,
    whose visible text is extracted."""

    kind: Literal["jsonl"]
    glob: str = "**/*.jsonl*"
    text_key: str = "text"
    id_key: str = "id"
    html: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Parquet(Source):
    """Parquet files: a document per row. Needs the package pyarrow. `glob`, `text_key`, `id_key`, `html`: as of
    kind=jsonl, with columns as keys. `max_row_group_bytes`: largest uncompressed size of the columns that are read of a
    row group, in bytes; a larger row group is quarantined unread, since a page, which is read whole, may be as
    large."""

    kind: Literal["parquet"]
    glob: str = "**/*.parquet"
    text_key: str = "text"
    id_key: str = "id"
    html: bool = False
    max_row_group_bytes: Positive = 4_000_000_000


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Warc(Source):
    """WARC files of a crawl: the text of each fetched page, and the plain text of WET files. `glob`: pattern of the
    files below `path`. `statuses`: HTTP status codes of responses to read; others are quarantined."""

    kind: Literal["warc"]
    glob: str = "**/*.warc*"
    statuses: tuple[Annotated[int, Field(ge=100, le=999)], ...] = (200,)


def category_of(name: str, source: Source) -> str:
    """The category of a source; by default its name."""
    return source.category or name


KINDS = ("tree", "jsonl", "parquet", "warc")
AnySource = Annotated[Tree | Jsonl | Parquet | Warc, Field(discriminator="kind")]
