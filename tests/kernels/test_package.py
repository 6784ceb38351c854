"""The package as others find it: dispatch, its import without triton, and transformers' look at its name."""

import importlib.metadata
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import dispatch

OLDEST_ACCEPTED = (0, 4)  # under every version of its `kernels` package that transformers has ever accepted


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    yield
    kernels.set_backend("auto")


def norm():
    return kernels.simple_rms_norm(torch.ones(1, 4))


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.DEBUG, logger="kernels.dispatch"):
        norm()
        norm()
    lines = [r.getMessage() for r in caplog.records if "simple_rms_norm" in r.getMessage()]
    assert len(lines) == 1
    assert "simple_rms_norm on cpu runs with torch" in lines[0]


def test_triton_by_name_refuses_what_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.set_backend("triton")
    with pytest.raises(ValueError, match="backend 'triton' was asked for and cannot run simple_rms_norm"):
        norm()


def test_environment_variable_chooses_and_set_backend_overrides(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert dispatch.requested_backend() == "triton"
    kernels.set_backend("torch")
    assert dispatch.requested_backend() == "torch"
    kernels.set_backend("auto")
    assert dispatch.requested_backend() == "triton"


def test_unknown_backends_are_named(monkeypatch):
    with pytest.raises(ValueError, match="name='cuda' is not one of the backends"):
        kernels.set_backend("cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="MEGATRON_TN_KERNELS='fast' is not one of"):
        norm()


def test_gpus_older_than_the_tiles_get_pytorch(monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: device.index)
    devices = (torch.device("cuda", index) for index in (7, 8))
    volta, ampere = (SimpleNamespace(is_cuda=True, device=device, dtype=torch.bfloat16) for device in devices)
    assert dispatch.choose("an operator", volta) == "torch"
    assert dispatch.choose("an operator", ampere) == "triton"
    kernels.set_backend("triton")
    with pytest.raises(ValueError, match=r"compute capability 7.x is older than 8.x"):
        dispatch.choose("an operator", volta)


def test_float64_never_reaches_triton():
    kernels.set_backend("triton")
    with pytest.raises(ValueError, match="cannot serve float64"):
        kernels.simple_rms_norm(torch.ones(1, 4, dtype=torch.float64))


def test_works_without_triton():
    """In a process where importing triton fails, as on a machine that has none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "x = torch.ones(1, 5, 1, 4, requires_grad=True)\n"
        "kernels.lightning_attention(x, x, x, torch.zeros(1)).sum().backward()\n"
        "assert x.grad.isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def test_version_is_none_that_transformers_accepts():
    """It asks the metadata of the distributions that hold a package `kernels`, and __version__ where none does."""
    holders = importlib.metadata.packages_distributions().get("kernels", [])
    versions = [kernels.__version__, *(importlib.metadata.version(name) for name in holders)]
    assert all(numbers(version) < OLDEST_ACCEPTED for version in versions), (versions, holders)


def test_transformers_leaves_us_alone():
    import_utils = pytest.importorskip("transformers.utils.import_utils", reason="transformers is not installed")
    assert not import_utils.is_kernels_available()
    from transformers import PreTrainedModel

    assert PreTrainedModel.__name__ == "PreTrainedModel"
