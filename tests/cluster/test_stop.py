"""Stop with real signals to this process."""

import os
import signal
import sys
import time
import weakref

import pytest

from src.cluster.local.signals import keep_interrupts
from src.train.stop import Stop


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR2"])
def test_remembers_the_first_and_restores(name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    with Stop() as stop:
        assert stop.seen is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.seen == name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.seen == name, "the first one is the reason"
    assert signal.getsignal(signal.Signals[name]) is before


def test_a_second_sigint_raises_at_once_unless_it_is_the_first_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper may pass on what the terminal has sent to everybody."""
    now = 50.0
    monkeypatch.setattr("src.train.stop.time.monotonic", lambda: now)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.seen == "SIGINT"
        now += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Module:
    """Something that weak references may know."""


def test_an_interrupt_that_python_would_ignore_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it did to a launcher that imported: the run then trained to its end."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    keep_interrupts()

    def fall(error: type[BaseException]) -> None:
        def callback(_: object) -> None:
            raise error

        module = Module()
        reference = weakref.ref(module, callback)
        del module
        assert reference() is None

    fall(ValueError)
    assert [each.exc_type for each in ignored] == [ValueError], "others are none of its business"
    fall(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(60)
    assert len(ignored) == 1
