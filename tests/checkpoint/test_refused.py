"""A checkpoint that is damaged, or of another model, is refused by name on every rank."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tn.checkpoint.load import load_checkpoint, load_checkpoint_weights
from megatron_tn.checkpoint.manifest import MANIFEST
from megatron_tn.config import ConfigError
from megatron_tn.engine.build import build_engine
from megatron_tn.parallel.context import ParallelContext
from tests.checkpoint.engines import CPU, make_engine, save_after_two_steps
from tests.engine.test_parity import LOCAL, ZERO
from tests.helpers.models import TINY, tiny_config
from tests.helpers.ranks import run_shared


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def damage_file(copy: Path) -> None:
    file = copy / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_file(copy: Path) -> None:
    (copy / "rank_00000.safetensors").unlink()


def edit(copy: Path, **changes) -> None:
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_piece(copy: Path) -> None:
    pieces = json.loads((copy / MANIFEST).read_text())["pieces"]
    pieces["exp_avg/model.final_norm.weight"] = []
    edit(copy, pieces=pieces)


def name_a_file_elsewhere(copy: Path) -> None:
    pieces = json.loads((copy / MANIFEST).read_text())["pieces"]
    pieces["exp_avg/model.final_norm.weight"][0]["file"] = "../outside.safetensors"
    edit(copy, pieces=pieces)


def name_a_pickle(copy: Path) -> None:
    pieces = json.loads((copy / MANIFEST).read_text())["pieces"]
    pieces["exp_avg/model.final_norm.weight"][0]["file"] = "rank_00000.pt"
    edit(copy, pieces=pieces)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_file, "rank_00000.safetensors is damaged"),
        (remove_file, "rank_00000.safetensors is missing"),
        (lambda copy: (copy / MANIFEST).unlink(), "is not a checkpoint"),
        (lambda copy: (copy / MANIFEST).write_text("{"), "is damaged"),
        (lambda copy: edit(copy, version=99), "format and version"),
        (remove_piece, "64 elements of exp_avg/model.final_norm.weight are in none"),
        (name_a_file_elsewhere, "not a safetensors file in its own folder"),
        (name_a_pickle, "not a safetensors file in its own folder"),
    ],
    ids=["truncated", "missing", "no manifest", "bad json", "version", "incomplete", "traversal", "pickle"],
)
def test_damage_is_named(copy, harm, message):
    harm(copy)
    _, engine = make_engine(1, LOCAL)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(engine, copy)


def load_damaged(checkpoint: Path, load: Callable[..., object]) -> str:
    _, engine = make_engine(1, ZERO[1])
    with pytest.raises(ConfigError) as caught:
        load(engine, checkpoint)
    return str(caught.value)


@pytest.mark.parametrize("load", [load_checkpoint, load_checkpoint_weights], ids=["all", "weights"])
def test_damage_that_one_rank_meets_ends_all_with_its_line(tmp_path, load):
    """Of a layout in which each rank reads a file of its own."""
    run_shared(2, save_after_two_steps, tmp_path, 1, ZERO[1])
    file = tmp_path / "step_00000002" / "rank_00001.safetensors"
    os.truncate(file, 7)
    assert run_shared(2, load_damaged, file.parent, load) == [f"{file} is damaged: it ends at byte 7"] * 2


def test_another_model_is_refused(checkpoint):
    engine = build_engine(tiny_config(), ParallelContext(), CPU)  # norm=simplermsnorm: fewer parameters, same shapes
    load_checkpoint(engine, checkpoint)
    engine = build_engine(tiny_config(model=dataclasses.replace(TINY, glu_dim=95)), ParallelContext(), CPU)
    with pytest.raises(
        ConfigError, match=r"channel_mixer.l1.weight has shape \[96, 64\], but the model needs \[95, 64\]"
    ):
        load_checkpoint(engine, checkpoint)
