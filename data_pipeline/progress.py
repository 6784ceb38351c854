"""Progress bars of a run: a line per stage, counting completed tasks."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_pipeline.stages import Stage

POLL_SECONDS = 0.3


class Display:
    """Shows one stage at a time; without a terminal, prints a line when a stage is done."""

    def __init__(self, progress: Progress, width: int):
        self.progress = progress
        self.width = width

    @contextlib.contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Follows `stage` while the body runs it."""
        began, fresh = time.perf_counter(), stage.tasks - stage.completed()
        bar = self.progress.add_task(stage.name.ljust(self.width), total=stage.tasks, completed=stage.completed())
        stop = threading.Event()

        def follow() -> None:
            while not stop.wait(POLL_SECONDS):
                self.progress.update(bar, completed=stage.completed())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.progress.update(bar, completed=stage.completed())
            self.progress.stop_task(bar)
        if not self.progress.console.is_terminal:
            done = f"{stage.tasks} tasks" if fresh else "already complete"
            self.progress.console.print(f"{stage.name:{self.width}}  {done}, {time.perf_counter() - began:.1f} s")

    def tell(self, line: str) -> None:
        """Shows a line above the bars."""
        self.progress.console.print(line, markup=False)


@contextlib.contextmanager
def show(stages: list[Stage]) -> Iterator[Display]:
    # The original stderr: it is redirected while stages run.
    console = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stderr=False, disable=not console.is_terminal) as progress:
        yield Display(progress, max(len(stage.name) for stage in stages))
