"""Output that nobody reads to its end."""

import os
import sys
from pathlib import Path

import pytest

from src.storage.streams import ReaderMayLeave, broken, to_stderr


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


WARNING = (
    "warning: tokenizer: 258 ids under model.vocab_size=128256: 127,998 rows of the embedding and of the head stand "
    "for no token; pass tokenizer=file tokenizer.path=<tokenizer.json of the model>, or model.vocab_size=258"
)
OPTION = "  fineweb_edu  A million documents of FineWeb-Edu's 10 billion tokens, from the hub, and some more of them"
COMMAND = "  stop       Ctrl-C saves; to go on: python launch.py experiment=own_text data.files=my/texts " + "x=1 " * 30


def test_what_follows_goes_on_below_its_column() -> None:
    assert broken(OPTION, 200) == OPTION
    first, second = broken(OPTION, 80).split("\n")
    assert first.endswith("tokens, from the")
    assert second == 15 * " " + "hub, and some more of them"
    assert broken("word " * 30, 80).split("\n")[1].startswith("  word")
    assert broken("x" * 90, 80) == "x" * 90, "a path stays whole"


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_a_line_breaks_between_words_on_a_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal itself breaks in the middle of `model.vocab_size`; a command stays one line, to be copied."""
    monkeypatch.setenv("COLUMNS", str(columns))
    to_stderr([WARNING])
    assert capsys.readouterr().err == f"{WARNING}\n", "a log has a line for each"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    to_stderr([WARNING, COMMAND])
    *drawn, command = capsys.readouterr().err.splitlines()
    assert max(map(len, drawn)) <= columns
    assert len(drawn) == {80: 3, 100: 3, 160: 2}[columns]
    assert " ".join(line.strip() for line in drawn) == WARNING
    assert command == COMMAND


def test_no_refusal_is_printed_but_by_to_stderr() -> None:
    """Which breaks its lines for a terminal; launch.py's own names the rank that tells."""
    files = (Path(__file__).parents[2] / "src").rglob("*.py")
    assert [file.name for file in files if "*error.problems, sep" in file.read_text(encoding="utf-8")] == []
