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


def test_hands_over_to_the_handler_that_was_there() -> None:
    met: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, _: met.append(number))
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert met == [], "not before the save"
            stop.hand_over()
            assert met == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)
