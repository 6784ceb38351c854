"""Watchdog: after a hang or a death, names the rank, dumps stacks, and ends the run with a non-zero exit code.

signs.py     signs of life (heartbeats): each rank writes its phase and line to run_dir/ranks/START/NNNNN.json
stack.py     from a thread's Python stack: whether it waits for other ranks
detect.py    from all ranks' signs: the ranks that are silent, behind, or failed first
explain.py   the message about them
observe.py   the first rank to notice reads all ranks' signs; the others read its result
watch.py     the threads of a rank that write its sign, detect a hang, and end the process

Signs are files, because the file system may still work when the network does not.
"""

from megatron_tn.training.watchdog.signs import Progress, living_run
from megatron_tn.training.watchdog.watch import HANG_EXIT, Watchdog

__all__ = ["HANG_EXIT", "Progress", "Watchdog", "living_run"]
