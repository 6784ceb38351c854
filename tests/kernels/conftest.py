"""Fixtures that put an operator on a machine: PyTorch on the CPU, Triton's interpreter, or Triton on a GPU."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch._dynamo  # before a test replaces torch.empty, which its tables list by identity
from torch.utils import _device

from kernels import dispatch
from tests.kernels.guard_page import guard_arguments

_device._device_constructors()  # the functions that `with torch.device(...)` places: a table of the same kind

# In the order of import: a copy finds the copies of those before it.
TRITON_MODULES = (
    "kernels.quantize.triton_quantize",
    "kernels.quantize.triton_many",
    "kernels.adamw.triton_adamw",
    "kernels.lightning.triton_sequences",
    "kernels.lightning.triton_scan",
    "kernels.lightning.triton_segments",
    "kernels.lightning.scan",
    "kernels.lightning.passes",
    "kernels.activations.triton_activations",
    "kernels.gla.triton_features",
    "kernels.gla.triton_gate",
    "kernels.gla.triton_step",
    "kernels.muon.triton_muon",
    "kernels.newton_schulz.triton_symmetric",
    "kernels.rmsnorm.triton_rmsnorm",
    "kernels.rope.triton_rope",
    "kernels.gla.triton_buffered",
    "kernels.gla.feature_map",
    "kernels.gla.passes",
    "kernels.cross_entropy.triton_exponentials",
    "kernels.cross_entropy.triton_gradient",
    "kernels.cross_entropy.exponentials",
    "kernels.embedding.triton_embedding",
    "kernels.float8_linear.triton_float8",
    "kernels.sampling.triton_sampling",
    "kernels.sglu.triton_sglu",
    "kernels.srmsnorm.triton_norm",
    "kernels.token.triton_token",
)


@functools.cache
def interpreted_module(name: str):
    """A private copy of a module of Triton kernels, whose kernels run in Triton's interpreter.

    Triton decides when a kernel is defined, from TRITON_INTERPRET; a copy leaves the real module as it is, for the
    tests that compile it.
    """
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def interpreted_language():
    """Let Triton's own library (tl.sum, tl.cdiv), written in Triton and defined for compilation, be interpreted.

    The interpreter replaces attributes of the language for every launch and every call of a function of a kernel, which
    takes as long as the arithmetic: here they are replaced once, and put back, since other tests compile. And it adds,
    subtracts and multiplies int32 once more in int64 to find overflows, of which tensors as small as here have none.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    parts = (tl, tl.core, tl.standard, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)
    saved = [dict(vars(part)) for part in parts]
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
    replaced = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing_more = functools.partial(lambda scope, function: scope, interpreter._LangPatchScope())
    builder = interpreter.interpreter_builder
    quick = dataclasses.replace(builder.options, sanitize_overflow=False)
    try:
        with (
            mock.patch.object(interpreter, "_patch_lang", nothing_more),
            mock.patch.object(builder, "options", quick),
        ):
            yield
    finally:
        replaced.restore()
        for part, attributes in zip(parts, saved, strict=True):
            for name, value in attributes.items():
                if vars(part)[name] is not value:
                    setattr(part, name, value)


def refuse_unknown_arguments(monkeypatch) -> None:
    """Have a launch in the interpreter refuse a keyword that the kernel does not have, as a launch on a GPU does."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def checked(self, *args, **kwargs):
        unknown = kwargs.keys() - set(self.arg_names) - {"num_warps", "num_stages"}
        assert not unknown, f"{self.fn.__name__} has no argument {unknown}"
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", checked)


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty and torch.empty_like hand out NaN, so that an element a kernel leaves unwritten shows."""

    def poison(empty):
        def poisoned_empty(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return poisoned_empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request, monkeypatch, poisoned):
    """Run every operator by its Triton kernel, on outputs filled with NaN; gives the device for the inputs."""
    pytest.importorskip("triton", reason="triton is not installed")
    with contextlib.ExitStack() as stack:
        if request.param == "cuda":
            require_cuda()
            device = "cuda"
        else:
            if torch.cuda.is_available():
                pytest.skip("the GPU runs these kernels itself")
            device = "cpu"
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            stack.enter_context(interpreted_language())
            refuse_unknown_arguments(monkeypatch)
            guard_arguments(monkeypatch)
            for name in TRITON_MODULES:
                package, leaf = name.rsplit(".", 1)
                monkeypatch.setitem(sys.modules, name, interpreted_module(name))
                monkeypatch.setattr(importlib.import_module(package), leaf, interpreted_module(name), raising=False)
        dispatch.set_backend("triton")
        stack.callback(dispatch.set_backend, "auto")
        yield device


@pytest.fixture
def cuda(poisoned):
    """For tests on a GPU alone."""
    require_cuda()
    return "cuda"


def require_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
