"""The page says what was measured, and nothing that was measured is broken; the rest is for --check."""

import pytest

from benchmarks import support_matrix
from benchmarks.support_matrix import PAGE, SAMPLE, Cell, composed, page, read, stale, told, verdict, wanted
from src.errors import UserError


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text() == page(read())


def test_nothing_is_broken() -> None:
    assert [f"{name}: {cell['broken']}" for name, cell in read().items() if "broken" in cell] == []


def test_the_sample_is_wanted() -> None:
    assert set(SAMPLE) <= dict(wanted()).keys()


def test_a_cell_is_out_of_date_when_a_source_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = support_matrix.fingerprint()
    cells: dict[str, Cell] = {name: {"sources": now} for name, _ in wanted()}
    assert stale(cells) == []
    cells["tp2 | plain"]["sources"] = "00000000"
    del cells["pp2 | plain"]
    assert set(stale(cells)) == {"tp2 | plain", "pp2 | plain"}
    monkeypatch.setattr(support_matrix, "SOURCES", ("src/distributed/*.py",))
    assert support_matrix.fingerprint() != now


def test_cells_in_words() -> None:
    notes: dict[str, int] = {}
    assert told({"loss": 1.2e-7, "gradient": 3e-6}, notes) == "ok 1e-07 / 3e-06"
    assert told({"refused": ["b", "a"]}, notes) == "refused (1, 2)"
    assert told({"refused": ["a"]}, notes) == "refused (2)"
    assert told({"broken": "c"}, notes) == "**broken** (3)"
    assert told(None, notes) == "not measured"
    assert notes == {"b": 1, "a": 2, "c": 3}
    assert [verdict(cell) for cell in ({"loss": 1.0, "gradient": 1.0}, {"refused": []}, {"broken": ""}, {})] == [
        "ok",
        "refused",
        "broken",
        "not measured",
    ]


def test_what_is_refused_is_refused_in_the_plans_words() -> None:
    commands = dict(wanted())
    (first, *_) = (name for name, cell in read().items() if "refused" in cell)
    with pytest.raises(UserError) as caught:
        composed(*commands[first])
    assert list(caught.value.problems) == read()[first]["refused"]
