"""Batches on their way to an accelerator: pinned, and copied while the step before is computed."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from data_pipeline.stream.sample import Batch

TENSORS = ("tokens", "targets", "cu_seqlens")


class Sent(NamedTuple):
    """A step's microbatches, and the event after which their tensors are there; None where they need not travel."""

    microbatches: list[Batch]
    copied: "torch.cuda.Event | None"


def send(steps: Iterator[list[Batch]], device: torch.device | None) -> Iterator[Sent]:
    """The same steps with their tensors on their way to `device`.

    A copy from memory that is not pinned waits for all that the device has to do, and the host with it. So tensors are
    pinned and copied on a stream of their own; the consumer's stream waits for the copy (`receive`), the host never.
    On a CPU, or without a device, steps pass as they are. May be iterated in another thread than the consumer's.
    """
    if device is None or device.type != "cuda":
        for step in steps:
            yield Sent(step, None)
        return
    torch.cuda.set_device(device)  # this thread's: pinning would open a context on the first GPU otherwise
    copies = torch.cuda.Stream(device)
    for step in steps:
        with torch.cuda.stream(copies):
            yield Sent([_moved(batch, device) for batch in step], copies.record_event())


def receive(sent: Sent) -> list[Batch]:
    """The microbatches, for use on the current stream."""
    if sent.copied is None:
        return sent.microbatches
    stream = torch.cuda.current_stream()
    stream.wait_event(sent.copied)
    for batch in sent.microbatches:
        for name in TENSORS:
            if (tensor := getattr(batch, name)) is not None:
                tensor.record_stream(stream)  # or its memory could be given to the next copy while it is in use
    return sent.microbatches


def _moved(batch: Batch, device: torch.device) -> Batch:
    present = {name: tensor for name in TENSORS if (tensor := getattr(batch, name)) is not None}
    # The allocator of pinned memory keeps a block until copies from it are done.
    copied = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in present.items()}
    return dataclasses.replace(batch, **copied)
