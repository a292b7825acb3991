"""Stop with real signals to this process."""

import os
import signal

import pytest

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


def test_a_second_sigint_raises_at_once() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.seen == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
