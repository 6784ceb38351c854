"""Asynchronous copies of batches to an accelerator: from pinned memory, during the previous step."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from data_pipeline.stream.sample import Batch

TENSORS = ("tokens", "targets", "cu_seqlens")


class Sent(NamedTuple):
    """A step's microbatches, and the CUDA event after which their copies are complete; None without copies."""

    microbatches: list[Batch]
    copied: "torch.cuda.Event | None"


def send(steps: Iterator[list[Batch]], device: torch.device | None) -> Iterator[Sent]:
    """The same steps, with copies of their tensors to `device` started.

    A copy from unpinned memory blocks the host until the device is idle. So tensors are pinned and copied on a side
    CUDA stream; the consumer's stream waits for the copy (`receive`), the host never does. On a CPU, or without a
    device, steps are unchanged. Can be iterated in another thread than the consumer's.
    """
    if device is None or device.type != "cuda":
        for step in steps:
            yield Sent(step, None)
        return
    torch.cuda.set_device(device)  # per thread; otherwise pinning creates a context on GPU 0
    copies = torch.cuda.Stream(device)
    for step in steps:
        with torch.cuda.stream(copies):
            yield Sent([_moved(batch, device) for batch in step], copies.record_event())


def receive(sent: Sent) -> list[Batch]:
    """The microbatches; the current CUDA stream waits for their copies."""
    if sent.copied is None:
        return sent.microbatches
    stream = torch.cuda.current_stream()
    stream.wait_event(sent.copied)
    for batch in sent.microbatches:
        for name in TENSORS:
            if (tensor := getattr(batch, name)) is not None:
                tensor.record_stream(stream)  # keeps its memory from reuse by the next copy
    return sent.microbatches


def _moved(batch: Batch, device: torch.device) -> Batch:
    present = {name: tensor for name in TENSORS if (tensor := getattr(batch, name)) is not None}
    # The pinned-memory allocator does not reuse a block before its copies are complete.
    copied = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in present.items()}
    return dataclasses.replace(batch, **copied)
