"""torchrun, but with the trainer's own exit code: `python -m launch.torchrun OPTIONS -m megatron_tn.train OVERRIDES`.

torchrun exits 1 whatever its workers exited with, and a bad configuration (2) must be told from a failure. Of several
failed workers the first counts, as the others usually fail because of it; a bad configuration counts before all.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

BAD_CONFIGURATION = 2


def exit_code(error: ChildFailedError) -> int:
    """What the failed workers make the launcher exit with; 128 + n for a worker that died of signal n."""
    codes = [failure.exitcode for failure in error.failures.values()]
    _, first = error.get_first_failure()
    code = BAD_CONFIGURATION if BAD_CONFIGURATION in codes else first.exitcode
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        sys.exit(exit_code(error))
