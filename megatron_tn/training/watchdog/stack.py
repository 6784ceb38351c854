"""What a thread does, read off its Python stack: the line it stands at, and whether it waits for other ranks."""

from __future__ import annotations

import linecache
import sys
import threading
from pathlib import Path
from types import FrameType

OWN = Path(__file__).parents[3]  # the checkout
# Source text of lines at which Python stands while it waits for the GPU, and so for whatever the GPU waits for.
GPU_WAITS = (".item()", ".tolist()", "synchronize(", ".cpu()", ".wait()")


def where_is(frame: FrameType) -> tuple[bool, str]:
    """(whether a thread waits in a collective or for the GPU, the innermost line of this project on its stack)."""
    waiting, place = False, ""
    step: FrameType | None = frame
    while step is not None:
        # A thread that runs on may be between lines: f_lineno is None there.
        path, line = step.f_code.co_filename, step.f_lineno or step.f_code.co_firstlineno
        waiting |= "torch/distributed/distributed_c10d" in path and step.f_code.co_name != "__init__"
        if not place:
            text = linecache.getline(path, line).strip()
            waiting |= any(word in text for word in GPU_WAITS)
            if "site-packages" not in path and Path(path).is_relative_to(OWN):
                place = f"{Path(path).relative_to(OWN)}:{line} in {step.f_code.co_name}: {text}"
        step = step.f_back
    return waiting, place


def where_this_process_is() -> tuple[bool, str]:
    """(whether the process waits for others, the line of its main thread)."""
    frames, main = sys._current_frames(), threading.main_thread().ident
    waiting, place = where_is(frames[main]) if main in frames else (False, "")
    # Backward passes on a GPU run in threads that Python did not start.
    started = {thread.ident for thread in threading.enumerate()}
    waiting |= any(where_is(frame)[0] for thread, frame in frames.items() if thread not in started)
    return waiting, place
