"""Copies the journal to an event file of TensorBoard, run_dir/tensorboard (the package tensorboard, an extra)."""

import json
from typing import Any

from megatron_tn.training.hooks.figures import TEXTS, StepFigures
from megatron_tn.training.hooks.journal_copy import JournalCopy
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState

FLUSH_S = 10  # seconds that events may lie in memory
QUEUE = 1000  # events that may wait for the writing thread before training waits for it


class TensorBoard(JournalCopy):
    """Every start and every rewind write the event file anew from the journal: readers of event files do not agree on
    what a start at an earlier step takes back. run_config: the run's settings, shown as a text."""

    name = "TensorBoard"

    def __init__(self, folder: RunFolder, run_config: dict[str, Any], figures: StepFigures):
        super().__init__(folder, figures)
        self.run_config = run_config

    def open(self, state: TrainingState) -> int:
        try:
            from torch.utils.tensorboard import FileWriter
        except ImportError as error:
            raise ImportError(f"it needs the extra tensorboard, pip install -e '.[tensorboard]': {error}") from None
        for old in self.folder.tensorboard.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = FileWriter(str(self.folder.tensorboard), max_queue=QUEUE, flush_secs=FLUSH_S)
        self._say("config", "```json\n" + json.dumps(self.run_config, indent=1) + "\n```", 0)
        return 0

    def show(self, values: dict[str, float], texts: list[dict[str, str]], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        seconds = values.pop("time", None)  # Unix time of the step, also of a record from an earlier start
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_summary(Summary(value=found), step, seconds)
        if texts:
            self._say(TEXTS, "\n\n".join(_quoted(text["prompt"], text["text"]) for text in texts), step)

    def close(self) -> None:
        self._writer.close()

    def _say(self, tag: str, markdown: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text

        self._writer.add_summary(text(tag, markdown), step)


def _quoted(prompt: str, text: str) -> str:
    """Markdown of a prompt and its continuation as a block of code, which shows every character as it is."""
    return "\n".join("    " + line for line in (prompt + text).splitlines())
