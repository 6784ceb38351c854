"""`python -m megatron_tn.convert describe | verify`: what a checkpoint holds, and every kind of damage by name."""

import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from megatron_tn.checkpoint.files import write_tensors
from megatron_tn.checkpoint.manifest import MANIFEST, MOMENTS, Piece
from megatron_tn.checkpoint.verify import times_covered, verify, whole_from
from megatron_tn.convert import main as convert
from tests.checkpoint.engines import save_after_two_steps
from tests.checkpoint.test_reshard import random_piece
from tests.engine.test_parity import ZERO
from tests.helpers.ranks import run_shared
from tests.helpers.training import call

NORM = "exp_avg/model.final_norm.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of tensor parallel 2 x ZeRO 1."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_shared(4, save_after_two_steps, folder, 2, ZERO[1])
    return folder / "step_00000002"


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def edit(copy: Path, change) -> None:
    values = json.loads((copy / MANIFEST).read_text())
    change(values)
    (copy / MANIFEST).write_text(json.dumps(values))


def flip_a_bit(copy: Path) -> None:
    path = copy / "rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def cut(copy: Path) -> None:
    path = copy / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(copy: Path) -> None:
    (copy / "rank_00000.safetensors").unlink()


def spoil_the_manifest(copy: Path) -> None:
    (copy / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (cut, "rank_00001.safetensors has "),
        (lose_a_file, "rank_00000.safetensors is missing"),
        (spoil_the_manifest, "manifest.json is damaged"),
    ],
)
def test_what_shows_without_reading_a_tensor(copy, harm, problem):
    """So a start passes over a damaged checkpoint, and takes an older one."""
    assert whole_from(copy.parent) == (copy, {})
    newer = Path(shutil.copytree(copy, copy.with_name("step_00000003")))
    harm(newer)
    found, damage = whole_from(copy.parent)
    assert found == copy
    assert list(damage) == [newer]
    assert problem in damage[newer][0]
    harm(copy)
    assert whole_from(copy.parent)[0] is None


def swap_files(copy: Path) -> None:
    one, other = copy / "rank_00000.safetensors", copy / "rank_00003.safetensors"
    one.rename(copy / "x")
    other.rename(one)
    (copy / "x").rename(other)


def rewrite_shorter(copy: Path) -> None:
    write_tensors(copy / "rank_00002.safetensors", {"rng/cpu": torch.zeros(8, dtype=torch.uint8)})


def forget(values: dict) -> None:
    """A tensor that the manifest does not mention at all."""
    del values["shapes"]["model.final_norm.weight"]
    for kind in ("param", *MOMENTS):
        del values["pieces"][f"{kind}/model.final_norm.weight"]


def piece_of(values: dict) -> dict:
    return values["pieces"][NORM][0]


DAMAGE = {
    "a flipped bit": (flip_a_bit, ["rank_00001.safetensors is damaged: its sha256 is"]),
    "a cut file": (cut, ["rank_00001.safetensors is damaged: its tensors end at byte"]),
    "a missing file": (lambda c: (c / "rank_00002.safetensors").unlink(), ["rank_00002.safetensors is missing"]),
    "swapped files": (
        swap_files,
        ["rank_00000.safetensors: ", "rank_00003.safetensors: ", " were written"],
    ),
    "another file": (rewrite_shorter, ["rank_00002.safetensors: param/", "is missing", " were written"]),
    "a stranger": (lambda c: (c / "notes.txt").write_text("x"), ["notes.txt is not part of the checkpoint"]),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), [f"it has no {MANIFEST}"]),
    "no JSON": (lambda c: (c / MANIFEST).write_text("{"), ["is damaged"]),
    "no object": (lambda c: (c / MANIFEST).write_text("[]"), ["is damaged"]),
    "a field too many": (lambda c: edit(c, lambda v: v.update(extra=1)), ["is damaged", "extra"]),
    "a negative step": (lambda c: edit(c, lambda v: v.update(step=-1)), ["is damaged: step: "]),
    "shapes of words": (lambda c: edit(c, lambda v: v["shapes"].update(a="many")), ["is damaged: shapes.a: "]),
    "a lost tensor": (lambda c: edit(c, forget), ["model.final_norm.weight: shape None, but the model has [64]"]),
    "another step": (lambda c: edit(c, lambda v: v.update(step=7)), ["step=7, but training.step=2"]),
    "a bad config": (lambda c: edit(c, lambda v: v["config"].update(seed="x")), ["config: seed='x'"]),
    "a lost piece": (lambda c: edit(c, lambda v: v["pieces"].pop(NORM)), [f"{NORM}: 64 of 64 elements are in none"]),
    "a repeated piece": (
        lambda c: edit(c, lambda v: v["pieces"][NORM].append(piece_of(v))),
        [f"{NORM}: ", "elements are stored more than once"],
    ),
    "a piece outside": (lambda c: edit(c, lambda v: piece_of(v).update(stop=65)), [f"{NORM}: a piece in rank_0000"]),
    "a negative box": (lambda c: edit(c, lambda v: piece_of(v).update(box=[[-1, 63]])), ["lies outside shape [64]"]),
    "an unknown tensor": (
        lambda c: edit(c, lambda v: v["pieces"].update({"param/x": []})),
        ["param/x: no such tensor in shapes"],
    ),
    "a path": (lambda c: edit(c, lambda v: piece_of(v).update(file="../a.safetensors")), ["in its own folder"]),
    "an absolute path": (
        lambda c: edit(c, lambda v: v["files"].update({"/etc/a.safetensors": {"size": 1, "sha256": ""}})),
        ["in its own folder"],
    ),
    "a pickle": (lambda c: edit(c, lambda v: piece_of(v).update(file="rank_00000.pt")), ["is not a safetensors file"]),
    "another layout": (lambda c: edit(c, lambda v: v["layout"].update(dp=8)), ["is of 16 ranks, but 4 files"]),
}


@pytest.mark.parametrize(("harm", "messages"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(copy, harm, messages):
    harm(copy)
    said = "\n".join(verify(copy))
    for message in messages:
        assert message in said


def test_a_whole_one_is_whole(checkpoint, capsys):
    assert verify(checkpoint) == []
    assert call(convert, "verify", f"checkpoint={checkpoint}") == 0
    assert capsys.readouterr().out == f"{checkpoint} is whole\n"


def test_a_digest_of_the_file_as_one_is_checked_as_well(copy):
    """Older checkpoints have it."""

    def change(values):
        for name, record in values["files"].items():
            record["sha256"] = hashlib.sha256((copy / name).read_bytes()).hexdigest()

    edit(copy, change)
    assert verify(copy) == []
    flip_a_bit(copy)
    assert [problem.partition(": ")[0] for problem in verify(copy)] == [f"{copy / 'rank_00001.safetensors'} is damaged"]


def test_damage_makes_the_exit_code(copy, capsys):
    flip_a_bit(copy)
    assert call(convert, "verify", f"checkpoint={copy}", "json=true") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["whole"]
    assert len(found["problems"]) == 1


def test_describe_says_what_is_there(checkpoint, capsys):
    assert call(convert, "describe", f"checkpoint={checkpoint}", "json=true") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["tokens"], facts["saved_by"]["tp"], facts["saved_by"]["dp"]) == (2, 1, 2, 2)
    assert facts["bytes"] == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert sum(math.prod(tensor["shape"]) for tensor in facts["tensors"].values()) == facts["parameters"]
    assert call(convert, f"checkpoint={checkpoint}") == 0
    said = capsys.readouterr().out
    assert "model.final_norm.weight" in said
    assert "tp 2" in said


def test_describe_names_what_was_edited_away(copy, capsys):
    def change(values):
        del values["config"]["engine"]["zero_stage"], values["config"]["data"]["manifest"]

    edit(copy, change)
    assert call(convert, "describe", f"checkpoint={copy}") == 2
    assert "manifest.json: config has no engine.zero_stage, data.manifest" in capsys.readouterr().err


def test_export_needs_an_output(checkpoint, capsys):
    assert call(convert, "export", f"checkpoint={checkpoint}") == 2
    assert "output is not set" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(17,), (7, 5), (4, 1, 3)], ids=str)
def test_coverage_is_counted_element_by_element(shape):
    draw = random.Random(2)
    for _ in range(100):
        pieces: list[Piece] = [random_piece(shape, draw) for _ in range(draw.randrange(5))]
        whole = torch.zeros(shape, dtype=torch.int64)
        for piece in pieces:
            mask = torch.zeros_like(whole[tuple(slice(*edge) for edge in piece.box)]).flatten()
            mask[piece.start : piece.stop] = 1
            box = whole[tuple(slice(*edge) for edge in piece.box)]
            box += mask.view(box.shape)
        expected = tuple(int(n) for n in ((whole == 0).sum(), (whole == 1).sum(), (whole > 1).sum()))
        assert times_covered(pieces, shape) == expected
