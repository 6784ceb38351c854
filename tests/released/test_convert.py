"""`python -m megatron_tn.convert export | import`: both ways, at any layout, in bounded memory."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_tn import load_pretrained
from megatron_tn.checkpoint.verify import verify
from megatron_tn.config import ConfigError
from megatron_tn.convert import main as convert
from megatron_tn.model.registry import build_model
from megatron_tn.released import write
from megatron_tn.released.weights import ReleasedWeights
from megatron_tn.released.write import alone_in, save_pretrained, write_released
from tests.helpers.checkpoints import load_model
from tests.helpers.golden import golden
from tests.helpers.models import TINY, random_batch, reference_model
from tests.helpers.ranks import layout, run_shared
from tests.helpers.training import call

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"


def export_of(folder: Path, seed: int = 1, **options) -> Path:
    """TINY in the released layout."""
    model = reference_model(TINY, seed, torch.float32)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    write_released(folder, TINY, shapes, dict.fromkeys(values, torch.float32), values.__getitem__, **options)
    return folder


def test_released_to_checkpoint_and_back_is_the_same_model(tmp_path):
    released, run, again = golden("heads4").directory, tmp_path / "run", tmp_path / "again"
    assert call(convert, "import", f"checkpoint={released}", f"output={run}") == 0
    checkpoint = run / "checkpoints" / "step_00000000"
    assert verify(checkpoint) == []
    assert call(convert, "export", f"checkpoint={run}", f"output={again}") == 0
    wanted, found = (load_file(folder / "model.safetensors") for folder in (released, again))
    wanted.pop("lm_head.weight", None)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert (again / "generation_config.json").is_file()
    assert not (again / "tokenizer.json").exists()


def save_at(tp: int, folder: Path) -> bool:
    """Export at one layout and read back at it. What rank 0 refuses, or fails to write, is raised on every rank. A rank
    writes a model of its own without the others."""
    context = layout(tp)
    model = load_pretrained(golden("heads4").directory, context)
    with pytest.raises(ConfigError, match="holds files that are no export"):
        save_pretrained(model, folder.parent)
    full = mock.patch.object(write, "_write_weights", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder)
    save_pretrained(model, folder)
    torch.distributed.barrier()
    with mock.patch("torch.distributed.broadcast_object_list", side_effect=AssertionError("the others are not here")):
        save_pretrained(load_pretrained(folder), folder / f"own_{context.rank}")
    again = dict(load_pretrained(folder, context).named_parameters())
    return all(torch.equal(again[name], parameter) for name, parameter in model.named_parameters())


def test_tensor_parallel_ranks_write_and_read_one_export(tmp_path):
    assert run_shared(2, save_at, 2, tmp_path) == [True, True]
    wanted = load_pretrained(golden("heads4").directory)
    again = dict(load_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in wanted.named_parameters())


def test_large_models_are_written_in_shards_with_an_index(tmp_path):
    export_of(tmp_path, shard_bytes=60_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 8)]
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for file in files for t in load_file(file).values())
    for file in files:
        assert set(load_file(file)) == {name for name, place in index["weight_map"].items() if place == file.name}
    tokens, _ = random_batch(1, 9)
    wanted = reference_model(TINY, 1, torch.float32)(tokens).logits
    assert torch.equal(load_pretrained(tmp_path)(tokens).logits, wanted)


@pytest.mark.parametrize(("old", "new"), [(60_000, 1 << 30), (1 << 30, 60_000), (60_000, 90_000)])
def test_an_export_leaves_no_file_of_the_one_it_replaces(tmp_path, old, new):
    export_of(tmp_path / "fresh", seed=2, shard_bytes=new)
    folder = export_of(tmp_path / "used", seed=1, shard_bytes=old, texts={"tokenizer.json": "{}", "README.md": "old"})
    for name in ("pytorch_model.bin", "configuration_old.py", "special_tokens_map.json"):
        (folder / name).write_text("old")
    (folder / ".git").mkdir()
    (folder / ".export-killed").mkdir()
    for name in ("LICENSE", "adapter_model.safetensors"):
        (folder / name).write_text("mine")
    export_of(folder, seed=2, shard_bytes=new)
    assert {path.name for path in folder.iterdir()} == {
        *(path.name for path in (tmp_path / "fresh").iterdir()),
        ".git",
        "LICENSE",
        "adapter_model.safetensors",
    }
    for path in (tmp_path / "fresh").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    export_of(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(name):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_released(tmp_path, TINY, {"a": (2,)}, {"a": torch.float32}, broken)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "files",
    [{"README.md": "of my project"}, {"config.json": '{"model_type": "transnormer"}', "pytorch_model.bin": "mine"}],
    ids=["files", "another's model"],
)
@pytest.mark.parametrize("action", ["export", "import"])
def test_a_folder_of_other_files_is_not_written_to(tmp_path, capsys, files, action):
    released, mine = export_of(tmp_path / "released"), tmp_path / "mine"
    mine.mkdir()
    for name, content in files.items():
        (mine / name).write_text(content)
    assert call(convert, action, f"checkpoint={released}", f"output={mine}") == 2
    assert f"output={mine} holds files" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in mine.iterdir()} == files


def test_two_exports_do_not_write_to_one_folder(tmp_path, capsys):
    released = export_of(tmp_path / "released", seed=1)
    before = {path.name: path.read_bytes() for path in released.iterdir()}
    other = export_of(tmp_path / "other", seed=2)
    with alone_in(released):
        assert call(convert, "export", f"checkpoint={other}", f"output={released}") == 2
    assert capsys.readouterr().err == f"error: output={released} is being written by another process\n"
    assert {path.name: path.read_bytes() for path in released.iterdir()} == before


def test_an_export_that_was_killed_while_it_replaced_another_is_made_again(tmp_path):
    """A kill after config.json of the older export is gone, and before the new one is there."""
    folder = export_of(tmp_path / "export", seed=1)
    (folder / "config.json").unlink()
    (folder / ".export-killed").mkdir()
    export_of(folder, seed=2)
    export_of(tmp_path / "fresh", seed=2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()
    }


def test_an_import_that_was_killed_is_made_again_by_one_process(tmp_path, capsys):
    run = tmp_path / "run"
    partial = run / "checkpoints" / "step_00000000.tmp"
    partial.mkdir(parents=True)
    (partial / "rank_00000.safetensors").write_text("half")
    words = (f"checkpoint={golden('heads4').directory}", f"output={run}")
    assert call(convert, "export", *words) == 2
    with alone_in(run):
        assert call(convert, "import", *words) == 2
    assert "is being written by another process" in capsys.readouterr().err
    assert partial.is_dir()
    assert call(convert, "import", *words) == 0
    assert verify(run / "checkpoints" / "step_00000000") == []
    assert call(convert, "import", *words) == 2


@pytest.mark.parametrize(
    "place", ["megatron_tn.convert.RunFolder.keep_tokenizer", "megatron_tn.convert.write_checkpoint"]
)
def test_an_import_onto_a_full_disk_leaves_nothing_in_the_way_of_the_next(tmp_path, capsys, place):
    released, run = export_of(tmp_path / "released"), tmp_path / "run"
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.save(str(released / "tokenizer.json"))
    words = (f"checkpoint={released}", f"output={run}")
    with mock.patch(place, side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert call(convert, "import", *words) == 2
    assert f"error: output={run} cannot be written: No space left on device" in capsys.readouterr().err
    assert list(run.iterdir()) == []
    partial = run / "checkpoints" / "step_00000000.tmp"  # a kill leaves both
    partial.mkdir(parents=True)
    (run / "tokenizer.json").write_text("older")
    assert call(convert, "import", *words) == 0
    assert (run / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()


def as_pickle(folder: Path, split: bool, dtype: torch.dtype = torch.float32, **options) -> Path:
    """The export in `folder` with its weights as torch.save writes them, in one file or by an index."""
    file = folder / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(file).items()}
    file.unlink()
    parts = {"pytorch_model.bin": list(weights)}
    if split:
        names = list(weights)
        parts = {"pytorch_model-1-of-2.bin": names[::2], "pytorch_model-2-of-2.bin": names[1::2]}
        index = {"weight_map": {name: place for place, part in parts.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for place, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / place, **options)
    return folder


@pytest.mark.parametrize("split", [False, True], ids=["whole", "index"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_old_weight_files_are_read(tmp_path, capsys, split, zipped, dtype):
    """As fp32, into which fp64 tensors are rounded."""
    folder = as_pickle(export_of(tmp_path / "old"), split, dtype, _use_new_zipfile_serialization=zipped)
    tokens, _ = random_batch(1, 9)
    wanted = reference_model(TINY, 1, torch.float32)(tokens).logits
    assert torch.equal(load_pretrained(folder)(tokens).logits, wanted)
    assert call(convert, "export", f"checkpoint={folder}", f"output={tmp_path / 'new'}") == 0
    assert torch.equal(load_pretrained(tmp_path / "new")(tokens).logits, wanted)
    assert {weight.dtype for weight in load_file(tmp_path / "new/model.safetensors").values()} == {torch.float32}


class Harm:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_code_in_an_old_weight_file_does_not_run(tmp_path, zipped):
    folder = export_of(tmp_path / "old")
    (folder / "model.safetensors").unlink()
    harm = {"model.embed_tokens.weight": Harm(tmp_path / "harm")}
    torch.save(harm, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is refused: .*mkdir"):
        load_pretrained(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is damaged"), (b"no pickle", "is refused")],
    ids=["empty", "text"],
)
def test_damaged_old_files_are_named(tmp_path, content, message):
    folder = export_of(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "minimax"}, "model_type='minimax' is not one of transnormer"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, capsys, change, message):
    folder = export_of(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert call(convert, "import", f"checkpoint={folder}", f"output={tmp_path / 'run'}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    folder = export_of(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        ReleasedWeights(folder)


@pytest.mark.parametrize("precision", ["trained", "fp32"])
def test_half_precision_weights_keep_their_values(tmp_path, precision):
    save_pretrained(reference_model(TINY, 1, torch.float32), tmp_path / "half", torch.bfloat16)
    words = (f"checkpoint={tmp_path / 'half'}", f"precision={precision}")
    assert call(convert, "import", *words, f"output={tmp_path / 'run'}") == 0
    assert call(convert, "export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'again'}") == 0
    dtype = torch.bfloat16 if precision == "trained" else torch.float32
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "again"))
    assert all(
        torch.equal(found[name], value.to(dtype)) and found[name].dtype == dtype for name, value in wanted.items()
    )
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    model = load_model(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert next(model.parameters()).dtype == dtype


MEMORY = """
import sys
from pathlib import Path
from megatron_tn.convert import main
from tests.helpers.training import call

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def both_ways(source, work):
    assert call(main, "import", f"checkpoint={source}", f"output={work}/run") == 0
    assert call(main, "export", f"checkpoint={work}/run", f"output={work}/export", "shard_mib=16") == 0

small, large, work = sys.argv[1:]
both_ways(small, work + "/small")  # what every conversion needs: modules and buffers
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
both_ways(large, work + "/large")
print(memory("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Both ways, 4 and 40 layers: 170 MB of weights, 2.9 MB the largest tensor."""
    for layers in (4, 40):
        config = dataclasses.replace(TINY, embed_dim=320, glu_dim=768, layers=layers)
        shapes = {name: spec.shape for name, spec in build_model(config, None, "meta").shard_specs().items()}
        dtypes = dict.fromkeys(shapes, torch.float32)
        write_released(tmp_path / str(layers), config, shapes, dtypes, lambda name, s=shapes: torch.ones(s[name]))
    size = sum(path.stat().st_size for path in (tmp_path / "40").glob("*.safetensors"))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "4"), str(tmp_path / "40"), str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert grown < 16 << 20 < size / 8, f"the peak grew by {grown} bytes for {size} bytes of weights"


@pytest.mark.parametrize(("action", "place"), [("import", "to_checkpoint"), ("export", "write")])
def test_a_full_disk_is_one_line_and_the_next_try_works(tmp_path, monkeypatch, capsys, action, place):
    words = (action, f"checkpoint={golden('heads4').directory}", f"output={tmp_path / 'new'}")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(f"megatron_tn.released.{place}.stream_tensors", full)
        assert call(convert, *words) == 2
    said = capsys.readouterr().err
    assert said == f"error: output={tmp_path / 'new'} cannot be written: No space left on device\n"
    assert call(convert, *words) == 0
