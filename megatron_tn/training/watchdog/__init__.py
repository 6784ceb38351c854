"""A hang or a death names its rank, leaves stacks, and ends the run with a non-zero exit code.

signs.py     where a rank is, written by it every few seconds to run_dir/ranks/START/NNNNN.json: its sign of life
stack.py     what a thread does, by its Python stack: whether it waits for other ranks
detect.py    which ranks are silent, behind, or failed first, from the signs of all
explain.py   that in words
observe.py   which rank reads the signs of all: the first that comes
watch.py     the threads of a rank that write its sign, notice that it stands still, and end it

Files, because they still answer when the network does not.
"""

from megatron_tn.training.watchdog.signs import Progress, living_run
from megatron_tn.training.watchdog.watch import HANG_EXIT, Watchdog

__all__ = ["HANG_EXIT", "Progress", "Watchdog", "living_run"]
