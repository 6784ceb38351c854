"""torchrun with the trainer's exit code: `python -m launch.torchrun OPTIONS -m megatron_tn.train OVERRIDES`.

torchrun always exits 1 when a worker fails; this launcher keeps 2 (bad configuration) apart. Of several failed workers
the first one's code is used, as it usually caused the others' failures; code 2 of any worker has priority.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

BAD_CONFIGURATION = 2


def exit_code(error: ChildFailedError) -> int:
    """The launcher's exit code for failed workers; 128 + n for a worker killed by signal n."""
    codes = [failure.exitcode for failure in error.failures.values()]
    _, first = error.get_first_failure()
    code = BAD_CONFIGURATION if BAD_CONFIGURATION in codes else first.exitcode
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        sys.exit(exit_code(error))
