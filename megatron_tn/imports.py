"""No garbage collection while a program imports its modules: searching their growing number of objects for garbage, of
which there is none, takes a fifth of the imports' time.

SIGUSR2 prints the process's Python stacks from the first import on: a slow shared file system shows there.

For programs alone. In a notebook, a failed import would leave the collection off, and objects of the notebook that are
garbage already would be kept for ever.
"""

import faulthandler
import gc
import signal

_begun = False


def begin() -> None:
    """Called before the other imports."""
    global _begun
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    _begun = gc.isenabled()
    gc.disable()


def done() -> None:
    """Collect garbage again, but never look at what has been imported: that would take 0.2 s each time. Without
    `begin` it does nothing."""
    global _begun
    if _begun:
        gc.freeze()
        gc.enable()
        _begun = False
