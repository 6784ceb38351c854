"""torchrun with the trainer's exit code: `python -m launch.torchrun OPTIONS -m megatron_tn.train OVERRIDES`.

torchrun always exits 1 when a worker fails; this launcher keeps 2 (bad configuration) apart. Of several failed workers
the first one's code is used, as it usually caused the others' failures; code 2 of any worker has priority.

After a failure torchrun sends the other workers SIGTERM, and SIGKILL 30 s later. A worker that is stopped (SIGSTOP)
cannot react to SIGTERM: it gets SIGKILL at once.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

BAD_CONFIGURATION = 2


def exit_code(error: ChildFailedError) -> int:
    """The launcher's exit code for failed workers; 128 + n for a worker killed by signal n."""
    codes = [failure.exitcode for failure in error.failures.values()]
    _, first = error.get_first_failure()
    code = BAD_CONFIGURATION if BAD_CONFIGURATION in codes else first.exitcode
    return code if code > 0 else 128 - code


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:  # it has ended, or there is no /proc
        return False


close_workers = PContext.close


def close(workers: PContext, *args, **more) -> None:
    """`PContext.close`, which ends the workers, but for those that are stopped."""
    for pid in filter(is_stopped, workers.pids().values()):
        os.kill(pid, signal.SIGKILL)
    close_workers(workers, *args, **more)


if __name__ == "__main__":
    PContext.close = close
    try:
        # torchrun leaves a folder of its own in /tmp: one a start, on every node of a job that starts again for months
        with tempfile.TemporaryDirectory(prefix="torchrun_") as logs:
            main([f"--log-dir={logs}", *sys.argv[1:]])
    except ChildFailedError as error:
        sys.exit(exit_code(error))
