"""Every file that the product reads, with content made to do harm: one clear line or none, in bounded time."""

import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.audit.answers import AnswersFile
from data_pipeline.audit.samples import Samples
from data_pipeline.config import TokenizerSettings, keep_settings
from data_pipeline.errors import InputError
from data_pipeline.executors import Queue
from data_pipeline.redaction import LONGEST, MOST
from data_pipeline.run import _prepare
from data_pipeline.shards.index import build_index
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scores import scores_file
from data_pipeline.stream.score_filter import KeptCounts, ScoreFilter, counts_file
from data_pipeline.stream.state import StreamState
from data_pipeline.tokenise import describe
from megatron_tn.checkpoint.files import TensorFile
from megatron_tn.checkpoint.load import CheckpointWeights
from megatron_tn.checkpoint.manifest import FORMAT, MANIFEST, VERSION, CheckpointManifest
from megatron_tn.checkpoint.verify import glance, verify
from megatron_tn.config import ConfigError, EngineConfig, ModelConfig, TrainConfig, from_mapping, to_mapping
from megatron_tn.inference import prefix_file
from megatron_tn.inference.prefix_file import fingerprint, load_prefix
from megatron_tn.inference.records import prompt_problems, read_prompts
from megatron_tn.model.registry import build_model
from megatron_tn.parallel import world
from megatron_tn.released.config import config_from_released, config_to_released, read_config
from megatron_tn.released.tokenizer import tokenizer_files
from megatron_tn.released.weights import ReleasedWeights, weight_files
from megatron_tn.training import freeze
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.watchdog.signs import Sign
from tests.helpers.models import TINY, reference_model
from tests.helpers.shards import make_text_shards

CONTENTS = {
    "nothing": b"",
    "zeros": bytes(100),
    "no JSON": b"hello",
    "no text": b"\xff\xfe\xfa",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "null": b"null",
    "a list": b"[]",
    "a text": b'"x"',
    "a number": b"3",
    "an empty object": b"{}",
    "5000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "infinity": b'{"step": 1e999, "vocab_size": 1e999, "a": NaN}',
    "half a character": b'{"a": "\\ud800", "\\ud800": 1}',
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "a megabyte": b'{"a": "' + b"x" * (1 << 20) + b'"}',
    "many keys": ("{" + ",".join(f'"k{number}":{number}' for number in range(5000)) + "}").encode(),
    "wrong types": b'{"format": [], "config": [], "model_type": [], "weight_map": {"a": "../x"}, "step": "x"}',
    "cut": b'{"format": "megatron_tn.sha',
}
SLOWEST = 10  # seconds of a read, on a machine with other work


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("shards")
    make_text_shards(folder, documents=20)
    return Manifest.load(folder / "manifest.json")


def released(path: Path) -> None:
    (path.parent / "config.json").write_text(json.dumps(config_to_released(ModelConfig(vocab_size=401))))
    ReleasedWeights(path.parent).__enter__()


def with_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    TensorFile(path)


def status(path: Path) -> None:
    folder = RunFolder(path.parent)
    folder.status()
    folder.mark_failed(3, "error")
    folder.is_begun_by("1")


def journal(path: Path) -> None:
    file = RunFolder(path.parent).journal
    file.read()
    file.set_aside_after(3)


def prompts(path: Path) -> None:
    if problems := prompt_problems(str(path), "a", {"end"}):
        raise ConfigError(problems)
    list(read_prompts(str(path)))


def prefix_metadata(path: Path) -> None:
    """The content as each value of a prefix's metadata in turn."""
    text, model = path.read_bytes().decode("utf-8", "replace"), reference_model(TINY, 0)
    good = {"config": json.dumps(to_mapping(TINY)), "dtype": "torch.float64", "model": fingerprint(model)}
    good |= {"format": "megatron_tn prefix 1", "length": "1", "last": "5"}
    for name in good:
        save_file({"seen": torch.tensor([5], dtype=torch.int32)}, path, good | {name: text})
        refused(lambda: load_prefix(path, model))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": ("manifest.json", Manifest.load),
    "filter": ("filter.yaml", lambda path: ScoreFilter.load(str(path))),
    "state of the stream": ("x", lambda path: StreamState.from_json(path.read_bytes().decode("utf-8", "replace"))),
    "samples": ("samples.jsonl", Samples.load),
    "answers": ("answers.jsonl", lambda path: AnswersFile(path).all()),
    "tokenizer": ("tokenizer.json", lambda path: describe(str(path), TokenizerSettings())),
    "settings of rounds": ("settings.json", lambda path: keep_settings(str(path.parent), {"a": 1}, "rounds")),
    "record of a pipeline": ("pipeline.json", lambda path: _prepare(path.parent, {"version": 1}, False)),
    "jobs of a pipeline": ("slurm.json", lambda path: Queue(path.parent).jobs()),
    "frozen settings": ("config.json", lambda path: RunFolder(path.parent).frozen_config()),
    "ledger": ("ledger.json", lambda path: RunFolder(path.parent).ledger()),
    "status": ("status.json", status),
    "job": ("job.json", lambda path: RunFolder(path.parent).mark_begun()),
    "journal": ("log.jsonl", journal),
    "sign of life": ("0.json", Sign.read),
    "checkpoint": (MANIFEST, lambda path: CheckpointManifest.read(path.parent)),
    "glance at a checkpoint": (MANIFEST, lambda path: glance(path.parent)),
    "tensors": ("a.safetensors", TensorFile),
    "header of tensors": ("a.safetensors", with_header),
    "released config": ("config.json", lambda path: read_config(path.parent)),
    "released tokenizer": ("tokenizer.json", lambda path: tokenizer_files(path, ModelConfig())),
    "released index": ("model.safetensors.index.json", lambda path: weight_files(path.parent)),
    "released pickle": ("pytorch_model.bin", released),
    "released tensors": ("model.safetensors", released),
    "prompts": ("prompts.jsonl", prompts),
    "state of a prefix": ("prefix.safetensors", lambda path: load_prefix(path, reference_model(TINY, 0))),
    "metadata of a prefix": ("prefix.safetensors", prefix_metadata),
    "DeepSpeed's settings": ("ds.json", lambda path: from_mapping(EngineConfig, {"deepspeed_config": str(path)})),
}


def refused(work: Callable[[], object]) -> list[str]:
    """The problems that `work()` is refused with; none where it is not. Any other exception fails the test."""
    began = time.process_time()
    try:
        work()
        found = []
    except (InputError, ConfigError) as error:
        found = list(error.problems)
        assert found
    except FileNotFoundError:
        found = ["absent"]
    assert time.process_time() - began < SLOWEST
    assert len(found) <= MOST + 1
    for line in found:
        assert line.strip()
        assert "\n" not in line
        assert len(line) <= LONGEST + 3
    return found


@pytest.mark.parametrize(("name", "read"), READERS.values(), ids=READERS)
def test_hostile_content(tmp_path, name, read):
    for number, (what, content) in enumerate(CONTENTS.items()):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        try:
            refused(lambda path=path: read(path))
        except BaseException as error:
            error.add_note(f"content: {what}")
            raise


def test_hostile_counts_and_scores(manifest):
    band = ScoreFilter(scores="s")
    for name, read in (
        (counts_file(manifest, band), lambda: KeptCounts.load(manifest, band)),
        (scores_file(manifest.shards[0], "s"), lambda: band.kept(manifest.read, manifest.shards[0], None)),
    ):
        for content in CONTENTS.values():
            (manifest.directory / name).write_bytes(content)
            assert refused(read)
        (manifest.directory / name).unlink()


PREFIX = {
    "length": "3",
    "last": "1",
    "dtype": "torch.float32",
    "model": "mine",
    "config": json.dumps(to_mapping(ModelConfig())),
}
PREFIXES = {
    "no config": ({"config": None}, {}),
    "deep config": ({"config": "[" * 100_000}, {}),
    "a list for a config": ({"config": "[]"}, {}),
    "no length": ({"length": "many"}, {}),
    "a negative length": ({"length": "-1"}, {}),
    "a token beyond the vocabulary": ({"last": str(2**40)}, {}),
    "no layer": ({}, {}),
    "layers without a dimension": ({}, {f"layer.{n}": torch.zeros(()) for n in range(24)}),
    "layers of another shape": ({}, {f"layer.{n}": torch.zeros(1, 2, 3, 4) for n in range(24)}),
}


@pytest.mark.parametrize(("metadata", "tensors"), PREFIXES.values(), ids=PREFIXES)
def test_hostile_prefixes(tmp_path, monkeypatch, metadata, tensors):
    monkeypatch.setattr(prefix_file, "fingerprint", lambda model: "mine")
    metadata = {key: value for key, value in (PREFIX | metadata | {"format": prefix_file.FORMAT}).items() if value}
    save_file({"seen": torch.zeros(1, dtype=torch.int32)} | tensors, tmp_path / "a", metadata)
    model = build_model(ModelConfig(), None, "meta")
    assert refused(lambda: prefix_file.load_prefix(tmp_path / "a", model))


def header(name: str, kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


METADATA = header("a.json", tarfile.REGTYPE, 2) + b"{}".ljust(512, b"\0")
TARS = {
    "5000 long names": (header("x", tarfile.GNUTYPE_LONGNAME, 2) + b"a".ljust(512, b"\0")) * 5000 + METADATA,
    "5000 extended headers": (header("x", tarfile.XHDTYPE, 9) + b"9 path=a\n".ljust(512, b"\0")) * 5000 + METADATA,
    "a header of a terabyte": header("x", tarfile.XHDTYPE, 1 << 40) + METADATA,
    "a line of 10^20 bytes": header("x", tarfile.XHDTYPE, 30) + b"99999999999999999999 path=a\n".ljust(512, b"\0"),
    "a size of no number": header("x", tarfile.XHDTYPE, 12) + b"12 size=nan\n".ljust(512, b"\0") + METADATA,
    "metadata of 2 MB": header("a.json", tarfile.REGTYPE, 2 << 20) + b" " * (2 << 20),
    "deep metadata": header("a.json", tarfile.REGTYPE, 1 << 19) + b"[" * (1 << 19),
    "a sparse file": header("a.json", tarfile.GNUTYPE_SPARSE, 2) + b"{}".ljust(512, b"\0"),
    "no tar": b"\xff" * 5120,
}


@pytest.mark.parametrize("content", TARS.values(), ids=TARS)
def test_hostile_shards(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert refused(lambda: build_index(tmp_path / "a.tar", 2))


def test_a_filter_that_stands_for_gigabytes(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 30))]
    for text, why in (
        ("\n".join(lines), "an alias"),
        ("a: " + "[" * 100_000, "nested deeper than 8"),
        ("#" * (1 << 20), "1048576 bytes, more than"),
    ):
        (tmp_path / "f.yaml").write_text(text)
        assert why in refused(lambda: ScoreFilter.load(str(tmp_path / "f.yaml")))[0]


@pytest.mark.parametrize(
    "field", ["vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "glu_dim"]
)
@pytest.mark.parametrize("value", [0, -1, 10**9, 2**62])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(field, value):
    values = config_to_released(ModelConfig())
    del values["decay_rates"], values["linear_use_lrpe_list"]
    found = refused(lambda: config_from_released(values | {field: value}))
    assert found or (field, value) == ("vocab_size", 10**9)


def test_a_checkpoint_of_such_a_model(tmp_path):
    config = to_mapping(TrainConfig())
    config["model"] |= {"layers": 10**9}
    content = {"format": FORMAT, "version": VERSION, "step": 1, "optimizer_step": 1, "config": config, "layout": {}}
    content |= {"shapes": {}, "pieces": {}, "files": {}, "padded_vocab": 1}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    for problems in (refused(lambda: CheckpointWeights(tmp_path)), verify(tmp_path)):
        assert "model.layers=1000000000 must be from 1 to 2048" in "; ".join(problems)


@pytest.mark.parametrize("value", ["", "x", "-1", "1e3", "9" * 40, "$(touch marker)", "٣"])
def test_hostile_environment(monkeypatch, value):
    for name, read in (
        ("WORLD_SIZE", world.world_size),
        ("LOCAL_WORLD_SIZE", world.processes_here),
        ("SLURM_STEP_NUM_TASKS", world.world_size),
        ("SLURM_RESTART_COUNT", freeze.is_requeued),
        ("LOCAL_RANK", lambda: world.join_world(1)),
    ):
        for other in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        if value or name != "LOCAL_RANK":
            found = refused(read)
            assert not value or found == [
                f"{name}={value!r} in the environment must be a number of at least {found[0][-1]}"
            ]
        monkeypatch.delenv(name)
    assert "RANK" not in os.environ
