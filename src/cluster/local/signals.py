"""Signal forwarding and unbuffered messages, shared by all supervisors of ranks on this machine. No torch here."""

import os
import signal

POLL_SECONDS = 0.1
# A closed terminal asks for the same as a polite kill.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGUSR2,
}


def tell(text: str) -> None:
    """To stderr, past Python's buffers, which the code that a signal interrupted may hold; fine without a terminal."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:  # the terminal is gone
        return
