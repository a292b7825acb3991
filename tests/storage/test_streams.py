"""Output that nobody reads to its end."""

import os
import sys

import pytest

from src.storage.streams import ReaderMayLeave


def test_a_reader_that_left_ends_the_block_and_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out, into = os.pipe()
    os.close(out)
    done = []
    with os.fdopen(into, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with ReaderMayLeave():
            print("a line")
            stream.flush()
            done.append("more")
        print("another")  # to nowhere, as what Python flushes at its end
        stream.flush()
    assert not done


def test_other_errors_are_told() -> None:
    with pytest.raises(ConnectionResetError), ReaderMayLeave():
        raise ConnectionResetError
