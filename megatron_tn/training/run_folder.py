"""A run's folder: names of its files, and all reading and writing of status, journal and ledger.

    run_dir/
      config.json            the resolved settings, as `config.load` reads them: what a requeued job runs
      submitted/             a folder for each submission of launch.submit, see `submission`
      requeues.log           a line for each time a job was requeued, or gave up (launch/requeue.py)
      job.json               the start that wrote config.json: {"job": SLURM job id or null, "begun": whether it has
                             loaded its checkpoint}
      status.json            {"state": "running" | "finished" | "preempted" | "failed", "step": steps done, "time": ...}
      log.jsonl              the journal, see `journal_file`; log.superseded.jsonl: records of repeated steps
      ledger.json            skipped batches, and rewinds, since the newest checkpoint was saved
      tokenizer.json         the data's tokenizer
      checkpoints/           see `checkpoint.manifest`
      tracebacks/            rank_N.txt: Python's traceback of a rank that failed
      ranks/ hang.txt stacks/    ranks' heartbeats; diagnosis of a hang; Python stacks during the hang
      profile/ wandb/ wandb_id tensorboard/    see `hooks`
      run.lock               locked by rank 0 during the run

Files are replaced atomically: readers see the old or the new content, also after a kill.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tn.checkpoint.files import sync_folder
from megatron_tn.checkpoint.manifest import MANIFEST, checkpoint_name, step_of, whole_checkpoints
from megatron_tn.config import (
    ConfigError,
    TrainConfig,
    from_mapping,
    load,
    open_new,
    read_mapping,
    redacted,
    regular,
    replacing,
    save,
)
from megatron_tn.training.journal_file import JournalFile, read_records
from megatron_tn.training.state import Ledger

BLOCK_BYTES = 4096  # file-system block: a status up to this size can be rewritten in place on a full disk
OPENINGS = 20  # of the lock's file, while other starts remove its folder

SUBMITTED = "MEGATRON_TN_SUBMITTED"  # environment variable: path of the settings that launch.submit froze


class RunFolder:
    """path: run_dir. The constructor creates nothing on disk."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.job_file = self.path / "job.json"
        self.submitted = self.path / "submitted"
        self.requeues = self.path / "requeues.log"
        self.status_file = self.path / "status.json"
        self.ledger_file = self.path / "ledger.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        self.ranks = self.path / "ranks"
        self.hang = self.path / "hang.txt"
        self.stacks = self.path / "stacks"
        self.tracebacks = self.path / "tracebacks"
        self.profile = self.path / "profile"
        self.wandb = self.path / "wandb"
        self.tensorboard = self.path / "tensorboard"
        self.wandb_id = self.path / "wandb_id"
        self._lock: int | None = None
        self._made: list[Path] = []  # by `claim`: the lock's file, the folder, its parents
        self._before: dict[Path, bytes | None] = {}  # file that a start replaces -> its content before, if any

    def __str__(self) -> str:
        return str(self.path)

    @property
    def journal(self) -> JournalFile:
        return JournalFile(self.path / "log.jsonl", self.path / "log.superseded.jsonl")

    @property
    def is_there(self) -> bool:
        """Whether a run has written to the folder."""
        return self.status_file.exists() or self.checkpoints.exists()

    def other_use(self) -> str | None:
        """What the folder is of, where it is not a run's and a run's files would be among its own; None otherwise."""
        if self.is_there:
            return None
        if (self.path / MANIFEST).is_file():
            return f"a checkpoint or of shards: it has a {MANIFEST}"
        weights = next(iter(sorted(self.path.glob("*.safetensors"))), None) if self.config_file.is_file() else None
        return None if weights is None else f"a released model: it has {self.config_file.name} and {weights.name}"

    def records(self, *keys: str) -> list[dict[str, Any]]:
        """The journal's records that have one of `keys`, by default "step", in the order of writing."""
        return self.journal.read(*keys or ("step",))

    def superseded(self, *keys: str) -> list[dict[str, Any]]:
        """The records with one of `keys`, by default "step", of steps that a resume or a rewind took back, in the order
        of taking back."""
        return read_records(self.journal.superseded, *keys or ("step",))

    def starts(self) -> list[float]:
        """When the processes of the starts began that reached training, those of superseded steps too, in order."""
        return starts_in([*self.records("start/began"), *self.superseded("start/began")])

    # Checkpoints

    def whole_checkpoints(self) -> list[Path]:
        """Checkpoints with a manifest, oldest first."""
        return whole_checkpoints(self.checkpoints)

    def saved(self) -> dict[int, Path]:
        """step -> its complete checkpoint, oldest first. Where both step_N and step_N-again exist, step_N-again (see
        `checkpoint.save.write_snapshot`)."""
        return {step_of(path): path for path in self.whole_checkpoints()}

    def keep_aside(self, checkpoint: Path, why: str) -> Path:
        """Rename a checkpoint to step_N.WHY-TIME, which readers and retention ignore."""
        name = f"{checkpoint_name(step_of(checkpoint))}.{why}-{time.time():.0f}"
        aside = self.checkpoints / name
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = self.checkpoints / f"{name}-{number}"
        checkpoint.rename(aside)
        sync_folder(self.checkpoints)
        return aside

    # The run's settings (config.json) and the SLURM job that froze them (job.json)

    def freeze(self, config: TrainConfig, job: str | None) -> None:
        """Write the settings to config.json and the SLURM job id `job` to job.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        replaced = (self.config_file, self.job_file, self.status_file)
        self._before = {path: path.read_bytes() if path.is_file() else None for path in replaced}
        begun = self.is_begun_by(job)
        if not self.is_frozen_by(job):
            _replace(self.job_file, {"job": None})  # a kill here must not assign the old settings to the new job
        save(config, self.config_file)
        _replace(self.job_file, {"job": job, "begun": begun})

    def is_frozen_by(self, job: str | None) -> bool:
        """Whether SLURM job `job` wrote config.json."""
        return job is not None and self.config_file.is_file() and _read(self.job_file).get("job") == job

    def job(self) -> str | None:
        """The SLURM job of the last start; None where it was none, or is not known."""
        return _read(self.job_file).get("job")

    def is_begun_by(self, job: str | None) -> bool:
        """Whether job `job` wrote config.json, loaded its checkpoint and renamed the newer checkpoints."""
        return self.is_frozen_by(job) and bool(_read(self.job_file).get("begun"))

    def mark_begun(self) -> None:
        """See `is_begun_by`. Raises OSError."""
        _replace(self.job_file, _read(self.job_file) | {"begun": True})

    def frozen_mapping(self) -> dict[str, Any] | None:
        """config.json as a dictionary; None where it is absent. Raises ConfigError when it is damaged."""
        if not self.config_file.is_file():
            return None
        try:
            return read_mapping(self.config_file)
        except ConfigError as error:
            message = f"{error}; move it away, and the run goes on with the settings of this command"
            raise ConfigError(message) from None

    def frozen_config(self) -> TrainConfig:
        """config.json as a config. Raises ConfigError when it is absent, damaged, or has unknown settings."""
        return load(self.config_file)

    def status(self) -> dict[str, Any]:
        """status.json; empty where it is absent or unreadable."""
        return _read(self.status_file)

    def write_status(self, state: str, step: int, **more: Any) -> None:
        """Replace status.json; on a full disk, rewrite it in place. Raises OSError if that fails, too."""
        values = {"state": state, "step": step, "time": time.time(), "config": self.config_file.name} | more
        if "error" in values:
            values["error"] = redacted(values["error"])
        try:
            _replace(self.status_file, values)
        except OSError:
            _rewrite_in_place(self.status_file, values)

    def write_traceback(self, rank: int, error: BaseException) -> Path | None:
        """The file; None where it cannot be written."""
        path = self.tracebacks / f"rank_{rank:05d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with open_new(path) as file:
                file.write(redacted("".join(traceback.format_exception(error))))
        except OSError:
            return None
        return path

    def mark_failed(self, step: int, error: str) -> None:
        """Write state "failed" on behalf of a dead or hanging rank 0. step: steps done, as this rank knows."""
        if before := self.status():
            done = before.get("step")
            self.write_status("failed", max(done, step) if isinstance(done, int) else step, error=error)

    # Ledger

    def ledger(self) -> Ledger:
        """ledger.json; empty where it is absent. Raises ConfigError when it is damaged."""
        if not self.ledger_file.is_file():
            return Ledger()
        try:
            return from_mapping(Ledger, read_mapping(self.ledger_file))
        except ConfigError as error:
            why = "; ".join(error.problems)
            message = f"{why}; move {self.ledger_file} away, and the run goes on with the ledger of its checkpoint"
            raise ConfigError(message) from None

    def write_ledger(self, ledger: Ledger) -> None:
        """Write and fsync ledger.json. Raises OSError."""
        _replace(self.ledger_file, asdict(ledger), sync=True)

    # The lock: one run at a time uses the folder

    def claim(self) -> str:
        """Lock the folder for this process until `release` or exit. Returns the current holder, "" on success.

        A POSIX record lock: forked reader processes do not inherit it, and on network file systems it holds across
        hosts. On a file system without locks every process succeeds.
        """
        lock = self.path / "run.lock"
        made = [path for path in (lock, self.path, *self.path.parents) if not path.exists()]
        descriptor = _open_in_folder(lock)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, BLOCK_BYTES).decode(errors="replace").strip()
            os.close(descriptor)
            return holder or "another run"
        except OSError:
            os.close(descriptor)  # the file system has no locks
            self._made = made
            return ""
        if not _is_at(lock, descriptor):  # a start that was refused has removed the file meanwhile: `put_back`
            os.close(descriptor)
            return self.claim()
        self._lock, self._made = descriptor, made
        with contextlib.suppress(OSError):  # full disk: locked, without the holder's name in the file
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"rank 0 (host {socket.gethostname()}, process {os.getpid()})\n".encode(), 0)
        return ""

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def put_back(self) -> None:
        """Leave the folder as `claim` found it, which has the lock still: the start was refused. Of an earlier run the
        signs of life are gone. A file that cannot be put back, as on a full disk, stays as it is."""
        for path, content in self._before.items():
            with contextlib.suppress(OSError):
                if content is None:
                    path.unlink()
                else:
                    with replacing(path, "xb") as file:
                        file.write(content)
        if self._made:
            shutil.rmtree(self.ranks, ignore_errors=True)
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()

    def keep_tokenizer(self, tokenizer: Path) -> None:
        """Copy tokenizer.json to the folder, so that a copied run folder can still decode tokens. A resume, perhaps on
        a full disk, has it there already."""
        if not tokenizer.is_file():
            return
        content, kept = tokenizer.read_bytes(), self.tokenizer
        if kept.is_symlink() or not kept.is_file() or kept.read_bytes() != content:
            with replacing(kept, "xb") as file:
                file.write(content)


def starts_in(records: Iterable[dict[str, Any]]) -> list[float]:
    """When the processes of the starts among a run's records began, each once, in order."""
    return sorted({record["start/began"] for record in records if "start/began" in record})


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint `path`, or the newest whole one of a run, of its folder checkpoints/ or of checkpoints/latest."""
    if (path / MANIFEST).is_file():
        return path
    folder = path.parent if path.name == "latest" else path
    return next((there[-1] for place in (folder, folder / "checkpoints") if (there := whole_checkpoints(place))), None)


def _open_in_folder(lock: Path) -> int:
    """A descriptor of the lock's file, which is made where it is missing, and so is its folder."""
    for left in reversed(range(OPENINGS)):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # a start that was refused has removed the folder meanwhile
            if not left:
                raise


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is absent or unreadable."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(regular(path).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _replace(path: Path, values: dict[str, Any], *, sync: bool = False) -> None:
    with replacing(path, sync=sync) as file:
        file.write(json.dumps(values) + "\n")
    if sync:
        sync_folder(path.parent)


def _rewrite_in_place(path: Path, values: dict[str, Any]) -> None:
    """Overwrite the file's allocated block, for a full disk without a free block for a new file."""
    content = json.dumps(values).encode() + b"\n"
    while len(content) > BLOCK_BYTES and values.get("error"):
        values = values | {"error": values["error"][:-100]}
        content = json.dumps(values).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)
