"""Batches on their way to an accelerator: pinned, and copied while the step before is computed."""

import dataclasses
from collections import deque
from collections.abc import Iterator

import torch

from data_pipeline.stream.sample import Batch

TENSORS = ("tokens", "targets", "cu_seqlens")


def on_device(steps: Iterator[list[Batch]], device: torch.device | None, *, ahead: int = 1) -> Iterator[list[Batch]]:
    """The same steps with their tensors on `device`, `ahead` of them copied before they are asked for.

    A copy from memory that is not pinned waits for all that the device has to do, and the host with it. So tensors are
    pinned and copied on a stream of their own; the consumer's stream waits for the copy, the host never. On a CPU, or
    without a device, steps pass as they are.
    """
    if device is None or device.type != "cuda":
        yield from steps
        return
    copies = torch.cuda.Stream(device)
    sent: deque[tuple[list[Batch], torch.cuda.Event]] = deque()
    try:
        for step in steps:
            with torch.cuda.stream(copies):
                sent.append(([_moved(batch, device) for batch in step], copies.record_event()))
            if len(sent) > ahead:
                yield _arrived(*sent.popleft())
        while sent:
            yield _arrived(*sent.popleft())
    finally:
        steps.close()


def _moved(batch: Batch, device: torch.device) -> Batch:
    present = {name: tensor for name in TENSORS if (tensor := getattr(batch, name)) is not None}
    # The allocator of pinned memory keeps a block until copies from it are done.
    copied = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in present.items()}
    return dataclasses.replace(batch, **copied)


def _arrived(step: list[Batch], copied: "torch.cuda.Event") -> list[Batch]:
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for batch in step:
        for name in TENSORS:
            if (tensor := getattr(batch, name)) is not None:
                tensor.record_stream(stream)  # or its memory could be given to the next copy while it is in use
    return step
