"""Memory that is free, and the errors of what does not fit into it."""

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # folder of the control group, version 2, that limits this container
# Texts of PyTorch's errors of too little memory that have no type of their own: from a CPU's allocator, and for sizes
# beyond 64 bits.
MESSAGES = ("can't allocate memory", "Storage size calculation overflowed")


def free_bytes(device: torch.device | None = None) -> int | None:
    """Memory that this process can still take: of a GPU, with what the allocator has cached, or of the machine, or of
    this container where that is less. None where that is not known."""
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # `used` has the page cache of files too, which the kernel gives up where a process needs the memory.
        found.append(limit - used + int(parts["active_file"]) + int(parts["inactive_file"]))
    except (OSError, KeyError, ValueError):
        pass  # no container, or no limit
    return min(found)


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch raised `error` because a tensor does not fit into memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in MESSAGES)
