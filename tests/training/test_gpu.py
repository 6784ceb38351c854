"""What a step costs the host, on a CUDA device: `make test-gpu`."""

import threading
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from data_pipeline.stream import BatchLoader, build_stream
from megatron_tn.training.step import train_step
from tests.data_pipeline.shard_factory import batches_hash, make_shards
from tests.helpers.models import TINY, tiny_config
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.gpu
LENGTH = 24


def plan(step: int) -> tuple[int, int] | None:
    return (step * 4, 4) if step < 12 else None


def make_stream(folder, **options):
    manifest = make_shards(folder, documents=80, vocab_size=TINY.vocab_size)
    return build_stream(manifest, sequence_length=LENGTH, seed=1, **options)


def on_host(batch):
    moved = {name: getattr(batch, name).cpu() for name in ("tokens", "targets")}
    return type(batch)(cu_seqlens=None, indices=batch.indices, target_tokens=batch.target_tokens, **moved)


@pytest.mark.parametrize("isolate", [False, True], ids=["cut", "isolated"])
@pytest.mark.parametrize("workers", [0, 1], ids="workers={}".format)
def test_batches_reach_the_device_unchanged_and_the_host_waits_for_none(tmp_path, workers, isolate):
    stream, device = make_stream(tmp_path, isolate_documents=isolate), torch.device("cuda", 0)
    expected = [stream.read(range(first, first + 2)) for first in range(0, 48, 2)]
    busy, found = torch.randn(2048, 2048, device=device), []
    with BatchLoader(stream, plan, micro_batch=2, workers=workers, device=device) as loader, no_waits() as waits:
        for step in loader:
            busy = busy @ busy.T / 2048  # work that a copy could be made to wait for
            found += step
    assert not [str(wait.message) for wait in waits]
    assert all(batch.tokens.device == device for batch in found)
    assert batches_hash(map(on_host, found)) == batches_hash(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert batch.target_tokens == int((batch.targets != -100).sum())
        assert not isolate or batch.cu_seqlens.cpu().equal(wanted.cu_seqlens)


class no_waits(warnings.catch_warnings):
    """Collects the operations that make the host wait for the device, as torch names them."""

    def __init__(self):
        super().__init__(record=True)

    def __enter__(self):
        found = super().__enter__()
        warnings.simplefilter("ignore")  # among others, that this debug mode is a prototype
        warnings.filterwarnings("always", message="called a synchronizing")
        torch.cuda.set_sync_debug_mode("warn")
        return found

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*error)


def waits_of_a_step(folder: str) -> list[list[str]]:
    from megatron_tn.engine.build import build_engine, initialize_engine
    from megatron_tn.parallel.context import ParallelContext

    device = torch.device("cuda", 0)
    context = ParallelContext.create(1, 1)
    engine = build_engine(tiny_config(), context, device)
    initialize_engine(engine, 0)
    busy = torch.randn(8192, 8192, device=device)
    found, events, wait_for = [], [], torch.cuda.Event.synchronize

    def synchronize(event: torch.cuda.Event) -> None:  # torch does not name these
        if threading.current_thread() is threading.main_thread() and not event.query():  # and not the loader's
            events.append("for an event")
        wait_for(event)

    with BatchLoader(make_stream(Path(folder)), plan, micro_batch=2, device=device) as loader:
        for number, step in enumerate(loader):
            if number < 3:  # kernels check and compile themselves
                train_step(engine, step, 1e-3, device)
                continue
            with no_waits() as waits, mock.patch.object(torch.cuda.Event, "synchronize", synchronize):
                events.clear()
                for _ in range(8):  # so that what the host waits for is not there yet
                    busy = busy @ busy.T / 8192
                report = train_step(engine, step, 1e-3, device)
            assert report.applied
            found.append([f"{wait.message} at {wait.filename}:{wait.lineno}" for wait in waits] + events)
    return found


def test_a_step_of_the_local_engine_waits_once(tmp_path):
    (found,) = run_ranks(1, waits_of_a_step, str(tmp_path), device="cuda")
    assert found == [["for an event"]] * 9  # the norm's
