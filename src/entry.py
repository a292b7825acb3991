"""What an entry does before it imports the rest, which takes seconds.

Ctrl-C ends a process that still imports without a traceback; and Python's garbage collector does not walk again and
again over what imports have made.
"""

import atexit
import gc
import signal

# Objects made until the youngest are looked at, and rounds of that until older ones are. By Python's own (700, 10, 10)
# a process that imports torch and its compiler takes 3.0 s to its end; by these 2.1, without any collection 1.9. By
# 50,000 it is no faster, and 400 points of a sweep take a tenth longer: what composing them leaves is reused too late.
THRESHOLDS = (10_000, 20, 50)


def begin() -> None:
    """The first call of an entry."""
    end_at_once()
    collect_seldom()


def collect_seldom() -> None:
    """For the life of this process; at its end nothing is collected, since all of its memory goes at once."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)


def end_at_once() -> None:
    """A SIGINT ends this process without a traceback; one that is ignored, as in a background job, stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """A SIGINT raises KeyboardInterrupt, as it did before `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
