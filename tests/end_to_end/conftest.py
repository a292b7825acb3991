"""One text for every test here, and runs that several tests look at."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.end_to_end.lives import TINY, WORLDS, live, opened, write_text
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of a tiny run: model, steps, data and a root that keeps the tokens of all tests."""
    folder = tmp_path_factory.mktemp("end_to_end")
    return (*TINY, *write_text(folder), f"root={folder / 'runs'}")


@pytest.fixture(scope="session")
def straight(text: tuple[str, ...], ranks: RankPool) -> Callable[[str], Path]:
    """The folder of 12 undisturbed steps in a layout."""

    @cache
    def run(layout: str) -> Path:
        folder = opened(*text, f"parallel={layout}", "name=straight")
        assert ranks(WORLDS[layout], live, folder) == [True] * WORLDS[layout]
        return folder

    return run
