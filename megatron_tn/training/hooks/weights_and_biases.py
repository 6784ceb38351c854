"""Copies the journal to Weights & Biases. Training neither waits nor fails when wandb is slow, offline or down."""

import contextlib
import dataclasses
import logging
import re
import sys
import uuid
from collections.abc import Iterator
from html import escape
from typing import Any

from megatron_tn.config import ConfigError, TrainConfig, WandbConfig, replacing, storable, to_stored
from megatron_tn.training.hooks.figures import TEXTS, StepFigures
from megatron_tn.training.hooks.journal_copy import JournalCopy
from megatron_tn.training.hooks.wandb_file import last_step_in, mend_files
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.throughput import Work

log = logging.getLogger(__name__)

ANSWER_S = 30.0  # seconds within which wandb's server must answer at a start
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WeightsAndBiases(JournalCopy):
    """All starts of a run use one wandb run id, kept in run_dir/wandb_id.

    wandb cannot delete logged steps. So after a rewind, steps go to a new wandb run, ID-r1, ID-r2, ..., which begins
    with the journal's records up to the rewind; these wandb runs share a group.

    run_config: the run's settings, which the wandb run has as its config. must_reach: raise where the server does not
    answer; else the start logs offline.
    """

    name = "wandb"

    def __init__(
        self,
        config: WandbConfig,
        folder: RunFolder,
        run_config: dict[str, Any],
        figures: StepFigures,
        must_reach: bool = False,
    ):
        super().__init__(folder, figures)
        self.config = config
        self.run_config = run_config
        self.must_reach = must_reach

    def on_start(self, state: TrainingState) -> None:
        mend_files(self.folder.wandb)  # not in `push`: the run may go on, and write to its file
        super().on_start(state)

    def on_rewind(self, state: TrainingState) -> None:
        self.on_stop(state)
        super().on_start(state)  # nothing to mend: wandb's own process may still be writing the file of the part before

    def open(self, state: TrainingState) -> int:
        import wandb

        mode = self.config.mode
        if mode == "online" and (why := why_not_logged_in()):
            log.warning("wandb: %s, so it logs offline; `python -m launch.sync` uploads it later", why)
            mode = "offline"
        if mode == "online" and not self.must_reach:
            try:
                return self._open("online", state)
            except wandb.Error as error:
                why = str(error).partition("\n")[0]
                log.warning("wandb: %s; it logs offline; `python -m launch.sync` uploads it later", why)
                wandb.teardown()  # its process still has the run of this id
                mode = "offline"
        return self._open(mode, state)

    def _open(self, mode: str, state: TrainingState) -> int:
        import wandb

        part = f"-r{len(state.rewinds)}" if state.rewinds else ""
        first = self._id()
        told = last_step_in(self.folder.wandb, first + part) if mode == "offline" else 0
        with _command_line_without_credentials():
            self._run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                mode=mode,
                id=first + part,
                name=self.folder.path.name + part,
                group=first,
                dir=self.folder.path,
                resume="allow",
                config=self.run_config,
                settings=wandb.Settings(silent=True, console="off", init_timeout=ANSWER_S),
            )
        return told if mode == "offline" else max(self._run.starting_step - 1, 0)

    def show(self, values: dict[str, float], texts: list[dict[str, str]], step: int) -> None:
        media = {}
        if texts:
            import wandb

            # Not a wandb.Table: that is an artifact, which asks the server before it is logged.
            parts = (f"<pre><b>{escape(text['prompt'])}</b>{escape(text['text'])}</pre>" for text in texts)
            media[TEXTS] = wandb.Html("".join(parts), inject=False)
        self._run.log(values | media, step=step)

    def close(self) -> None:
        self._run.finish()

    @property
    def address(self) -> str:
        """Address of the wandb run's page."""
        return self._run.url

    def _id(self) -> str:
        """The content of run_dir/wandb_id, made anew where that is absent or, as after a full disk, empty."""
        file = self.folder.wandb_id
        if not file.is_file() or not RUN_ID.fullmatch(file.read_text(errors="replace").strip()):
            with replacing(file) as new:
                new.write(uuid.uuid4().hex[:8])
        return file.read_text().strip()


def log_in() -> None:
    """Raises ConfigError where `why_not_logged_in` says something."""
    if why := why_not_logged_in():
        raise ConfigError(f"wandb: {why}: `wandb login`, or set WANDB_API_KEY")


def why_not_logged_in() -> str:
    """Log in to wandb by WANDB_API_KEY, or by what `wandb login` left on the machine. Returns "", or why that fails."""
    import wandb

    try:
        return "" if wandb.login(prompt=False, verify=False) else "nobody is logged in here"
    except wandb.Error as error:  # WANDB_API_KEY is malformed
        return str(error).partition("\n")[0].rstrip(".")


def push(folder: RunFolder, config: TrainConfig) -> str:
    """Tell the wandb run of a training run, online, what it lacks of the journal; returns the address of its page.
    Raises what wandb raises."""
    online = dataclasses.replace(config.logging.wandb, mode="online")
    board = WeightsAndBiases(online, folder, to_stored(config), StepFigures(Work(0, 1, None)), must_reach=True)
    steps = [record["step"] for record in folder.records() if isinstance(record["step"], int)]
    board.catch_up(TrainingState(step=max(steps, default=0), rewinds=folder.ledger().rewinds))
    board.close()
    return board.address


@contextlib.contextmanager
def _command_line_without_credentials() -> Iterator[None]:
    """wandb stores the arguments of the process."""
    before = sys.argv
    sys.argv = storable(before)
    try:
        yield
    finally:
        sys.argv = before
