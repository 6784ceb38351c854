"""From a thread's Python stack: its source line, and whether it waits for other ranks."""

import linecache
import sys
import threading
from pathlib import Path
from types import FrameType

OWN = Path(__file__).parents[3]  # the checkout
# Source text of lines that wait for the GPU, and so for the collectives on the GPU.
GPU_WAITS = (".item()", ".tolist()", "synchronize(", ".cpu()", ".wait()")


def where_is(frame: FrameType) -> tuple[bool, str]:
    """(whether a thread waits in a collective or for the GPU, the innermost line of this project on its stack)."""
    waiting, place = False, ""
    step: FrameType | None = frame
    while step is not None:
        # f_lineno of a running thread may be None.
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
    """(whether the process waits for other ranks or the GPU, the source line of its main thread)."""
    frames, main = sys._current_frames(), threading.main_thread().ident
    waiting, place = where_is(frames[main]) if main in frames else (False, "")
    # Backward passes on a GPU run in autograd's own threads.
    started = {thread.ident for thread in threading.enumerate()}
    waiting |= any(where_is(frame)[0] for thread, frame in frames.items() if thread not in started)
    return waiting, place
