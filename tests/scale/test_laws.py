"""A world of thousands costs a rank what its law says, counted on fakes that play every rank."""

import pytest

from tests.scale.laws import HUGE, PAGE, ROWS, WORLDS, Row, broken, page


def named(row: Row) -> str:
    return f"{row.part}: {row.what}"


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_nothing_grows_faster_than_its_law(row: Row) -> None:
    first = row.measure(WORLDS[0])
    found = [broken(row, world, first, row.measure(world)) for world in WORLDS[:3]]
    assert [each for each in found if each] == []


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_nor_does_it_in_the_largest_worlds(row: Row) -> None:
    first = row.measure(WORLDS[0])
    found = [broken(row, world, first, row.measure(world)) for world in (WORLDS[-1], HUGE)]
    assert [each for each in found if each] == []


def test_a_law_is_broken_by_what_was_there_before() -> None:
    """Of each row that was mended: its old numbers would fail."""
    mended = [row for row in ROWS if row.before and row.law.words != "O(n)" and row.what[:5] != "dumps"]
    mended.remove(next(row for row in mended if row.part == "stop"))  # whose old number breaks the limit everywhere
    assert len(mended) == 13
    assert all(broken(row, 4096, row.before[8], row.before[4096]) for row in mended)


def test_the_page_has_every_row() -> None:
    """`python -m tests.scale.laws --write` makes it."""
    written = PAGE.read_text()
    assert [row for row in ROWS if f"| {row.part} | {row.what} | {row.law.words} | " not in written] == []


@pytest.mark.slow
def test_the_page_is_what_is_measured() -> None:
    """But for memory that grows with each rank, which is another one with each Python: its laws are what holds."""
    written, measured = (
        [line for line in text.splitlines() if "KiB a rank |" not in line] for text in (PAGE.read_text(), page())
    )
    assert written == measured
