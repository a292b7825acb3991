"""Ctrl-C while a process of ours still imports, seconds of it: entries ask for it before they import the rest."""

import signal


def end_at_once() -> None:
    """A SIGINT ends this process without a traceback; one that is ignored, as in a background job, stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """A SIGINT raises KeyboardInterrupt, as it did before `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
