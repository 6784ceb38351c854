"""The pipeline's settings: dataclasses, and the way from YAML and the command line to them.

Hydra composes, pydantic checks. An unknown key is let through composition on purpose, so that one on the command line
and one in a file meet the same refusal, all of them at once.
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
from data_pipeline.errors import InputError
from data_pipeline.files import replace_file
from data_pipeline.filters.language import Language
from data_pipeline.sources import STRICT, AnySource, LocalFolder, Positive
from data_pipeline.words import as_typed

CONF = Path(__file__).resolve().parents[1] / "conf"


Rules = filters.REGISTER.settings("Rules", "The thresholds of each rule (see `filters/`), None for a rule that is off.")
Edits = edits.REGISTER.settings(
    "Edits", "The thresholds of each edit (see `edits/`), None for an edit that is off.", edits.ORDER
)


@dataclass(frozen=True, config=STRICT)
class NearDuplicates:
    """MinHash with locality-sensitive hashing: runs of `words` words; two documents are near duplicates with even odds
    at a similarity of about (1 / buckets) ** (1 / hashes)."""

    words: Positive = 5
    buckets: Positive = 14
    hashes: Positive = 8


@dataclass(frozen=True, config=STRICT)
class LineDuplicates:
    """Lines of `min_characters` or more that are in `min_documents` documents or more are taken out of all of them; a
    document of which less than `min_kept` of the characters is left is dropped."""

    min_documents: Annotated[int, Field(ge=2)] = 20
    min_characters: Positive = 20
    min_kept: Annotated[float, Field(ge=0, le=1)] = 0.3


@dataclass(frozen=True, config=STRICT)
class TokenizerSettings:
    """`file`: an existing tokenizer.json; null trains one of `vocab_size` entries on at most `sample_bytes` of the
    training split. `weights`: how many parts of the sample each category of the sources gets; null gives it what it has
    of the text that an epoch of training sees, but no less than `min_share` of the sample. A category that has less
    than its part leaves the rest to the others. bos, eos, pad: the entries that play these parts."""

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
    """How `executor=slurm` submits each stage as a job array: what sbatch calls `partition`, `time`, `qos` and
    `cpus_per_task` (quote a time in YAML, which reads 24:00:00 as a number); memory in GB a CPU; `at_once`: array tasks
    that run at the same time, null for no limit; `tasks_per_job`: tasks of a stage that one array task works through;
    `max_array_size`: the cluster's MaxArraySize.

    `env_command`: shell lines before the task, such as `module load python`; `sbatch_args`, `srun_args`: further
    options without their dashes, such as {account: lab}. `wait`: follow the jobs to the end; without it the command
    returns when they are submitted, and running it again shows how far they are.
    """

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
    """Everything a run depends on. All but those in FREE decide the bytes of what it writes.

    `tasks`: into how many independent pieces the per-document stages are cut; `executor`: what runs them, `workers`
    processes of this machine or SLURM.
    """

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


FREE = ("output", "executor", "workers", "slurm", "overwrite")  # settings that leave the bytes of the output alone


def compose(overrides: list[str], directory: Path = CONF) -> Settings:
    """Settings from `directory`/pipeline.yaml, its groups, and overrides in Hydra's grammar. Raises InputError with a
    line for each unknown key, wrong value and unknown choice of a group."""
    data, groups = compose_plain("pipeline", overrides, Settings, directory)
    return parse(data, extra_names=groups)


def compose_plain(root: str, overrides: list[str], cls: type, directory: Path = CONF) -> tuple[dict, set[str]]:
    """What `directory`/`root`.yaml and the overrides say, unchecked, and the names of the groups there are. cls: of the
    settings, whose text is taken as it is typed."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = {path.name for path in directory.iterdir() if path.is_dir()} if directory.is_dir() else set()
    try:
        kinds = _kinds(cls)
        words = [as_typed(word, lambda key: kinds.get(key.rpartition(".")[2], ())) for word in overrides]
        parsed = OverridesParser.create().parse_overrides(words)
        chosen = [o for o in parsed if o.key_or_group in groups]
        if problems := [line for o in chosen if (line := _unknown_choice(directory, o.key_or_group, o.value()))]:
            raise InputError(*problems)
        # `++` adds or overrides: a key that does not exist is reported below, with its neighbours.
        lines = [o.input_line if o in chosen or o.input_line[0] in "+~" else f"++{o.input_line}" for o in parsed]
        with initialize_config_dir(str(directory), version_base="1.3"):
            config = hydra_compose(root, lines)
        return OmegaConf.to_container(config, resolve=True), groups
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from None


def parse(data: dict, extra_names: set[str] = frozenset(), cls: type = Settings) -> typing.Any:
    """Settings from plain data; raises InputError naming every key that is unknown, missing or of a wrong value."""
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        names = sorted({*known_keys(cls, data), *extra_names})
        raise InputError(*dict.fromkeys(_line(item, names) for item in error.errors())) from None


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
    """Notes in `output`/settings.json what decides the bytes of what is made there, or, when that is noted already,
    raises InputError naming every setting that is another one now. what: what `output` holds, for the message."""
    path, now = Path(output) / "settings.json", json.loads(json.dumps(settings))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(now, indent=1).encode() + b"\n")
    elif changed := difference(json.loads(path.read_text()), now):
        raise InputError(*(f"output={output} holds {what} with other settings: {line}" for line in changed))


def _unknown_choice(directory: Path, group: str, choice: object) -> str | None:
    choices = sorted(path.stem for path in (directory / group).glob("*.yaml"))
    if choice in choices:
        return None
    return f"{group}={choice}: no such choice{_nearest(str(choice), choices)}; there are {', '.join(choices)}"


def _line(error: dict, names: list[str]) -> str:
    location = [str(part) for part in error["loc"]]
    if location[0] == "sources" and len(location) > 3:
        del location[2]  # pydantic names the kind of the source between its name and the key
    key = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown setting{_nearest(key, names)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; give it as {key}=..."
    if error["input"] is None and key.startswith("sources."):
        return f"{key}: missing; give input=FOLDER, or {key}=..."
    return f"{key}={error['input']!r}: {error['msg']}"


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    leaf = name.rpartition(".")[2]
    close = close or [n for n in names if difflib.get_close_matches(leaf, [n.rpartition(".")[2]], cutoff=0.7)][:1]
    return f"; did you mean {close[0]}?" if close else ""


def known_keys(cls: type, data: object = None, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a dataclass; a mapping's keys are those that `data` has."""
    keys = []
    for field in dataclasses.fields(cls):
        name, here = f"{prefix}{field.name}", data.get(field.name) if isinstance(data, dict) else None
        keys.append(name)
        if typing.get_origin(field.type) is dict:
            kinds = _dataclasses(typing.get_args(field.type)[1])
            entries = here if isinstance(here, dict) else {}
            keys += [key for entry in entries for kind in kinds for key in known_keys(kind, None, f"{name}.{entry}.")]
        else:
            keys += [key for kind in _dataclasses(field.type) for key in known_keys(kind, here, f"{name}.")]
    return keys


def _kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """Last part of each setting's name -> the types whose union it takes, over all settings of that name."""
    found: dict[str, tuple[type, ...]] = {}
    for field in dataclasses.fields(cls):
        found[field.name] = (*found.get(field.name, ()), *_members(field.type))
        for below in _dataclasses(field.type):
            for name, kinds in _kinds(below).items():
                found[name] = (*found.get(name, ()), *kinds)
    return found


def _members(hint: object) -> tuple[type, ...]:
    """The types of a union, with or without what Annotated adds to them; (object,) of lists and the like."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _members(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _members(part))
    return (hint,) if isinstance(hint, type) and origin is None else (object,)


def _dataclasses(hint: object) -> list[type]:
    parts = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return [hint]
    return functools.reduce(operator.iadd, (_dataclasses(part) for part in parts), [])
