"""The pipeline's settings: dataclasses, composed by Hydra from YAML and the command line, checked by pydantic.

Composition accepts unknown keys; pydantic then refuses those of files and of the command line together.
"""

import dataclasses
import difflib
import functools
import json
import operator
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_pipeline import edits, filters
from data_pipeline.booleans import booleans_as_numbers
from data_pipeline.errors import InputError
from data_pipeline.files import read_object, replace_file
from data_pipeline.filters.language import Language
from data_pipeline.redaction import resolve, storable
from data_pipeline.sources import KINDS, STRICT, AnySource, LocalFolder, Positive
from data_pipeline.words import as_typed

CONF = Path(__file__).resolve().parents[1] / "conf"


Rules = filters.REGISTER.settings("Rules", "The thresholds of each rule (see `filters/`), None for a rule that is off.")
Edits = edits.REGISTER.settings(
    "Edits", "The thresholds of each edit (see `edits/`), None for an edit that is off.", edits.ORDER
)


@dataclass(frozen=True, config=STRICT)
class NearDuplicates:
    """MinHash with locality-sensitive hashing over shingles of `words` words; at a similarity of about
    (1 / buckets) ** (1 / hashes), two documents are found with probability 1/2."""

    words: Positive = 5
    buckets: Positive = 14
    hashes: Positive = 8


@dataclass(frozen=True, config=STRICT)
class LineDuplicates:
    """Lines of at least `min_characters` that occur in at least `min_documents` documents are removed; a document that
    keeps less than the share `min_kept` of its characters is dropped."""

    min_documents: Annotated[int, Field(ge=2)] = 20
    min_characters: Positive = 20
    min_kept: Annotated[float, Field(ge=0, le=1)] = 0.3


@dataclass(frozen=True, config=STRICT)
class TokenizerSettings:
    """`file`: path of an existing tokenizer.json; null: train one of `vocab_size` entries on at most `sample_bytes`
    bytes of the training split. `weights`: {category: weight}, the share of each source category in that sample; null:
    its share of an epoch's text, but at least `min_share`. Where a category has too little text, the others fill its
    part. `bos`, `eos`, `pad`: names of the special entries."""

    vocab_size: Positive = 64_000
    file: str | None = None
    sample_bytes: Positive = 1_000_000_000
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    min_share: Annotated[float, Field(ge=0, le=0.1)] = 0.02
    bos: str = "<s>"
    eos: str = "</s>"
    pad: str = "<pad>"


@dataclass(frozen=True, config=STRICT)
class Slurm:
    """Job arrays of `executor=slurm`, one per stage. `partition`, `time`, `qos`, `cpus_per_task`: as in sbatch (quote a
    time in YAML, which reads 24:00:00 as a number); `mem_per_cpu_gb`: memory per CPU in GB; `at_once`: array tasks that
    run at the same time, null: no limit; `tasks_per_job`: tasks of the stage per array task; `max_array_size`: the
    cluster's MaxArraySize; `job_name`: beginning of the jobs' names. `env_command`: shell lines before the task, such
    as `module load python`; null: none. `sbatch_args`, `srun_args`: further options without dashes, such as {account:
    lab}. `wait`: follow the jobs to their end; false: the command returns after submission, and a second call shows
    their progress."""

    partition: str | None = None
    time: str | int = "24:00:00"
    cpus_per_task: Positive = 1
    mem_per_cpu_gb: Positive = 4
    qos: str | None = None
    at_once: Positive | None = None
    tasks_per_job: Positive = 1
    max_array_size: Positive = 1001
    job_name: str = "pipeline"
    env_command: str | None = None
    sbatch_args: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    srun_args: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    wait: bool = True


@dataclass(frozen=True, config=STRICT)
class Settings:
    """All settings of a run. All except those in FREE determine the bytes of its output. `output`: folder of the run;
    `overwrite`: delete what it holds from a run with other settings, instead of refusing. `sources`: {NAME: source};
    `input`: path of the source `main` in conf/pipeline. `edits`, `rules`, `language`: thresholds, null for one that is
    off. `exact_duplicates`, `line_duplicates`, `near_duplicates`: whether and how such copies are removed, false or
    null: they stay. `heldout_fraction`: share of the documents that goes to heldout/ instead of train/. `shard_tokens`:
    tokens of a shard. `tasks`: number of independent tasks of each per-document stage; `executor`: runs them as
    `workers` local processes, or by SLURM (`slurm`)."""

    output: LocalFolder
    sources: dict[str, AnySource]
    input: str | None = None
    edits: Edits = dataclasses.field(default_factory=Edits)
    language: Language | None = None
    rules: Rules = dataclasses.field(default_factory=Rules)
    exact_duplicates: bool = True
    line_duplicates: LineDuplicates | None = None
    near_duplicates: NearDuplicates | None = dataclasses.field(default_factory=NearDuplicates)
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    tokenizer: TokenizerSettings = dataclasses.field(default_factory=TokenizerSettings)
    shard_tokens: Positive = 50_000_000
    tasks: Positive = 8
    executor: Literal["local", "slurm"] = "local"
    workers: Positive = 2
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    overwrite: bool = False


FREE = ("output", "executor", "workers", "slurm", "overwrite")  # settings without influence on the output's bytes


def compose(overrides: list[str], directory: Path = CONF) -> Settings:
    """Settings from `directory`/pipeline.yaml, its groups, and overrides in Hydra's grammar. Raises InputError with a
    line for each unknown key, wrong value and unknown group choice."""
    data, groups = compose_plain("pipeline", overrides, Settings, directory)
    return parse(data, extra_names=groups)


def compose_settings(root: str, overrides: list[str], cls: type) -> typing.Any:
    """Settings `cls` from conf/`root`.yaml and overrides in Hydra's grammar; raises InputError, a line per problem."""
    data, _ = compose_plain(root, overrides, cls)
    return parse(data, cls=cls)


def compose_plain(root: str, overrides: list[str], cls: type, directory: Path = CONF) -> tuple[dict, set[str]]:
    """(Unchecked settings from `directory`/`root`.yaml and the overrides, names of the config groups). cls: dataclass
    of the settings; values of its text settings are taken verbatim."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    groups = {path.name for path in directory.iterdir() if path.is_dir()} if directory.is_dir() else set()
    try:
        kinds = _kinds(cls)
        words = [as_typed(word, lambda key: kinds.get(key.rpartition(".")[2], ())) for word in overrides]
        parsed = OverridesParser.create().parse_overrides(words)
        chosen = [o for o in parsed if o.key_or_group in groups]
        if problems := [line for o in chosen if (line := _unknown_choice(directory, o.key_or_group, o.value()))]:
            raise InputError(*problems)
        # `++` adds or overrides: `parse` reports unknown keys, all at once.
        lines = [o.input_line if o in chosen or o.input_line[0] in "+~" else f"++{o.input_line}" for o in parsed]
        with initialize_config_dir(str(directory), version_base="1.3"):
            config = hydra_compose(root, lines)
        return resolve(config), groups
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from None


def parse(data: dict, extra_names: set[str] = frozenset(), cls: type = Settings) -> typing.Any:
    """Settings from plain data; raises InputError naming every unknown or missing key and every wrong value."""
    try:
        settings = TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        names = sorted({*known_keys(cls, data), *extra_names})
        raise InputError(*dict.fromkeys(_line(item, names) for item in error.errors())) from None
    if booleans := dict(booleans_as_numbers(data, dataclasses.asdict(settings))):
        raise InputError(*booleans.values())
    return settings


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two nested dictionaries differ."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


def keep_settings(output: str, settings: dict, what: str) -> None:
    """Writes `settings`, which determine the output's bytes, to `output`/settings.json. If the file exists, raises
    InputError naming every setting that differs. what: description of `output`'s content, for the message."""
    path, now = Path(output) / "settings.json", json.loads(json.dumps(storable(settings)))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(now, indent=1).encode() + b"\n")
    elif changed := difference(storable(read_object(path)), now):
        raise InputError(
            *(f"output={output} holds {what} with other settings: {line}" for line in changed),
            f"output={output}: choose another folder, or give the settings it was made with",
        )


def _unknown_choice(directory: Path, group: str, choice: object) -> str | None:
    choices = sorted(path.stem for path in (directory / group).glob("*.yaml"))
    if choice in choices:
        return None
    return f"{group}={choice}: no such choice{_nearest(str(choice), choices)}; there are {', '.join(choices)}"


def _line(error: dict, names: list[str]) -> str:
    location = [str(part) for part in error["loc"]]
    if location[0] == "sources" and len(location) > 3:
        del location[2]  # the source's kind, which pydantic inserts into the key's location
    key = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown setting{_nearest(key, names)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; give it as {key}=..."
    if key.count(".") == 1 and key.startswith("sources."):
        kind = error["input"].get("kind") if isinstance(error["input"], dict) else None
        spelled = f"give {key}={{kind: KIND, path: PATH}}, where KIND is one of {', '.join(KINDS)}"
        return f"{key}.kind={kind!r}: no such kind{_nearest(str(kind), KINDS)}: {spelled}"
    if error["input"] is None and key.startswith("sources."):
        return f"{key}: missing; give input=FOLDER, or {key}=..."
    if error["type"] == "dataclass_type" and location[0] in ("rules", "edits"):
        below = next((name for name in names if name.startswith(f"{key}.")), None)
        one = f", {below}=... sets one" if below else ""
        return f"{key}={error['input']!r}: null turns it off, {{}} on with its defaults{one}"
    return f"{key}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}"


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    leaf = name.rpartition(".")[2]
    close = close or [n for n in names if difflib.get_close_matches(leaf, [n.rpartition(".")[2]], cutoff=0.7)][:1]
    return f"; did you mean {close[0]}?" if close else ""


def known_keys(cls: type, data: object = None, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a dataclass; keys of mappings are taken from `data`."""
    keys = []
    for field in dataclasses.fields(cls):
        name, here = f"{prefix}{field.name}", data.get(field.name) if isinstance(data, dict) else None
        keys.append(name)
        if typing.get_origin(field.type) is dict:
            kinds = dataclasses_of(typing.get_args(field.type)[1])
            entries = here if isinstance(here, dict) else {}
            keys += [key for entry in entries for kind in kinds for key in known_keys(kind, None, f"{name}.{entry}.")]
        else:
            keys += [key for kind in dataclasses_of(field.type) for key in known_keys(kind, here, f"{name}.")]
    return keys


def _kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """Last part of a setting's name -> types that it accepts, over all settings of that name."""
    found: dict[str, tuple[type, ...]] = {}
    for field in dataclasses.fields(cls):
        found[field.name] = (*found.get(field.name, ()), *_members(field.type))
        for below in dataclasses_of(field.type):
            for name, kinds in _kinds(below).items():
                found[name] = (*found.get(name, ()), *kinds)
    return found


def _members(hint: object) -> tuple[type, ...]:
    """The member types of a union, without Annotated; (object,) for lists and other generics."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _members(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _members(part))
    return (hint,) if isinstance(hint, type) and origin is None else (object,)


def dataclasses_of(hint: object) -> list[type]:
    parts = typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return functools.reduce(operator.iadd, (dataclasses_of(part) for part in parts), [])
