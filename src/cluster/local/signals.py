"""Signal forwarding and unbuffered messages, shared by all supervisors of ranks on this machine. No torch here."""

import _thread
import os
import signal
import sys
import time
from pathlib import Path

from src.checkpoint.folder import complete, step_of
from src.runs.folder import Ended, end
from src.runs.records import ATTEMPTS_FILE
from src.storage.streams import FEWEST_COLUMNS, readable

POLL_SECONDS = 0.1
# A Ctrl-C that a wrapper such as `timeout` passes on beside the terminal comes twice at once, and is meant once.
SAME_SIGNAL_SECONDS = 1.0
LOST_SECONDS = 0.2  # until an interrupt that was lost comes again: by then the callback that lost it has returned
# A closed terminal asks for the same as a polite kill.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGUSR2,
}


def keep_interrupts() -> None:
    """Send a Ctrl-C once more that fell into a callback whose errors Python ignores, such as those of weak references
    while modules are imported: else the run would start as if nobody had asked it to stop.
    """
    before = sys.unraisablehook

    def hook(ignored: "sys.UnraisableHookArgs") -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(_interrupt_later, ())  # of threading, start() waits, and would be interrupted
        else:
            before(ignored)

    sys.unraisablehook = hook


def _interrupt_later() -> None:
    time.sleep(LOST_SECONDS)
    os.kill(os.getpid(), signal.SIGINT)


def tell(text: str) -> None:
    """To stderr, past Python's buffers, which the code that a signal interrupted may hold; fine without a terminal. A
    line by itself is broken between words.
    """
    try:
        if "\n" not in text and os.isatty(2):
            text = readable(text, max(FEWEST_COLUMNS, os.get_terminal_size(2).columns))
        os.write(2, f"{text}\n".encode())
    except OSError:  # the terminal is gone
        return


def goes_on(folder: Path) -> str:
    """What the same command does with the run of this folder, after an end that was no failure."""
    saved = complete(folder / "checkpoints")
    if not saved:
        return f"nothing was saved, so the same command starts anew: {folder}"
    return f"the same command continues from step {step_of(saved[-1])}: {folder}"


def record_end(folder: Path, ended: Ended, detail: str, *, overrule: bool = False) -> None:
    """In attempts.jsonl; a folder that cannot be written, or is gone, is told and changes nothing else."""
    try:
        end(folder, ended, detail, overrule=overrule)
    except (OSError, LookupError) as error:
        tell(f"warning: {folder / ATTEMPTS_FILE}: the end of this attempt cannot be noted: {error}")
