"""Progress over documents on standard error, in the words of training: on a terminal a bar, elsewhere a line every ten
seconds, with tokens per second and time left."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class DocumentProgress(contextlib.AbstractContextManager):
    """what: the first word of the line. documents, tokens: in all. hidden: shows nothing, as on ranks above 0.

    The bar counts tokens, since `document_nats` takes the longest documents first.
    """

    def __init__(self, what: str, documents: int, tokens: int, hidden: bool = False):
        self.what = what
        self.documents = documents
        self.tokens = tokens
        self.hidden = hidden
        self.done = self.done_tokens = self.passed_tokens = 0
        console = Console(stderr=True)
        columns = (TextColumn(f"[bold]{what}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=hidden or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=tokens, figures=self._figures(0.0))

    def __enter__(self) -> DocumentProgress:
        self._began = self._last_line = time.perf_counter()
        self._bar.start()
        return self

    def advance(self, documents: int, tokens: int) -> None:
        """Count `documents` more documents, of `tokens` tokens together, as done."""
        self.done += documents
        self.done_tokens += tokens
        now = time.perf_counter()
        speed = (self.done_tokens - self.passed_tokens) / (now - self._began)
        figures = self._figures(speed)
        self._bar.update(self._task, completed=self.done_tokens, figures=figures)
        due = now - self._last_line > LINE_EVERY_S or self.done == self.documents
        if not self.hidden and self._bar.disable and speed and due:
            self._last_line = now
            left = (self.tokens - self.done_tokens) / speed
            with contextlib.suppress(OSError):  # a closed pipe ends no evaluation
                print(f"{self.what} {figures}  {left:.0f} s left", file=self._bar.console.file, flush=True)

    def pass_over(self, documents: int, tokens: int) -> None:
        """So many documents need no more work; they do not count for the speed."""
        self.passed_tokens += tokens
        self.advance(documents, tokens)

    def _figures(self, speed: float) -> str:
        return f"{self.done}/{self.documents} documents  {speed:,.0f} tokens/s"

    def __exit__(self, *_) -> None:
        self._bar.stop()
