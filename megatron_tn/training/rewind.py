"""Load the checkpoint of a start, and of a rewind by the guard."""

import logging
from dataclasses import replace

import torch

from megatron_tn.checkpoint.load import load_checkpoint, load_checkpoint_weights, load_weights
from megatron_tn.checkpoint.manifest import step_of
from megatron_tn.config import ConfigError
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import initialize_engine
from megatron_tn.parallel.world import first_for_all
from megatron_tn.training.guard import Rewind
from megatron_tn.training.resume import Start, agree_on, leave_later_behind, named, newest_start, verified
from megatron_tn.training.run import Run
from megatron_tn.training.state import TrainingState

log = logging.getLogger(__name__)


def restore(run: Run, engine: Engine) -> TrainingState:
    """Load the checkpoint that `run.start` names, or give the engine its initial values. Collective.

    Newer checkpoints are renamed, so that a start after a crash before the next save does not resume from them.
    """
    state, config = run.state, run.config
    run.start = start = verified(run.start, run.folder, run.ahead, config.checkpoint.resume)
    _load(run, engine, start)
    if start.checkpoint is not None and run.is_first:
        log.info("resumed from %s at step %d", start.checkpoint, state.step)
        if state.step >= config.last_step:
            setting = "stop_after" if config.last_step < config.schedule.steps else "schedule.steps"
            log.info("the run is complete at %s=%d; a larger value continues it", setting, config.last_step)
    elif start.weights is not None and run.is_first:
        log.info("weights from %s", start.weights)
    state.add_ledger(start.ledger)
    if start.later:
        by, reason = "hand", f"checkpoint.resume={config.checkpoint.resume}"
        if start.damage:
            by, reason = "damage", _lines(start)
        state.note_rewind(start=step_of(start.later[-1]), batches=[], by=by, reason=reason)
    state.add_skip(config.data.skipped)

    def write() -> None:
        leave_later_behind(run.folder, start, config.checkpoint.resume)
        _write_ledger(run)
        run.folder.mark_begun()

    first_for_all(write)
    run.has_begun = True
    return state


def rewind(run: Run, engine: Engine, wanted: Rewind) -> None:
    """Load the newest undamaged checkpoint, or where the run has none yet what it began from: another run's checkpoint
    or initial values; and skip `wanted.batches` from then on. Collective.

    The ledger is written before training continues, so that the skipped batches and the rewind survive a crash.

    Raises:
        ConfigError: on every rank: all checkpoints are damaged, or some rank does not see the chosen one.
    """
    run.progress.at("start")  # the watchdog's limit for a step is too short for reading a checkpoint
    run.writer.join()

    def choose() -> Start:
        start = newest_start(run.folder)
        return start if start.checkpoint else replace(run.start, later=(), damage={})  # `restore` has renamed those

    start = verified(agree_on(choose), run.folder, run.ahead, run.config.checkpoint.resume)
    state, before = run.state, run.state.step
    earlier = state.ledger
    _load(run, engine, start)
    state.add_ledger(earlier)
    state.add_skip(wanted.batches)
    state.note_rewind(start=before, batches=wanted.batches, by="guard", reason=wanted.reason)

    def write() -> None:
        leave_later_behind(run.folder, start, "auto")
        _write_ledger(run)

    first_for_all(write)
    for hook in run.started:
        hook.on_rewind(state)
    line = f"rewound from step {before} to {state.step}; skipping batches {wanted.batches}"
    run.report(line, {"rewind/from": before, "rewind/skip": wanted.batches}, state.step)


def _load(run: Run, engine: Engine, start: Start) -> None:
    if start.checkpoint is None:
        torch.manual_seed(run.config.seed)
        if run.start.weights_fingerprint:
            load_checkpoint_weights(engine, run.start.weights)
        elif run.start.weights is not None:
            with run.open_weights(run.start.weights) as weights:
                load_weights(engine, weights)
        else:
            initialize_engine(engine, run.config.seed)
        run.state.become(TrainingState())
    else:
        try:
            with run.ahead.contents(start.checkpoint) as contents:
                manifest = load_checkpoint(engine, start.checkpoint, contents)
        except ConfigError as error:  # as with checkpoint.verify=false
            raise ConfigError(named(start, run.config.checkpoint.resume, error.problems)) from None
        run.ahead.forget()
        run.state.become(TrainingState.from_json(manifest.training))


def _write_ledger(run: Run) -> None:
    """Write the ledger if it changed. On a full disk, warn and continue."""
    ledger = run.state.ledger
    try:
        unchanged = run.folder.ledger() == ledger
    except ConfigError:
        unchanged = False  # damaged, and superseded by a start with checkpoint.resume=STEP
    try:
        if not unchanged:
            run.folder.write_ledger(ledger)
    except OSError as error:
        what = "until the next save, skipped batches and rewinds are in memory alone"
        log.error("%s cannot be written: %s; %s", run.folder.ledger_file, error.strerror, what)


def _lines(start: Start) -> str:
    return "; ".join(line for problems in start.damage.values() for line in problems)
