"""A run with an optimizer other than AdamW is interrupted, and changes its layout, without a trace."""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.end_to_end.lives import WORLDS, Shot, contents, live, opened, series
from tests.ranks import RankError, RankPool

Straight = Callable[[str], Path]
LION = ("optim=lion", "optim.lr=3e-4", "task.steps=10", "checkpoint.every=4")
LAYOUTS = WORLDS | {"pp2": 2, "cp2": 2}


@pytest.fixture(scope="module")
def straight(text: tuple[str, ...], ranks: RankPool) -> Straight:
    """The folder of 10 undisturbed steps in a layout."""

    @cache
    def run(layout: str) -> Path:
        folder = opened(*text, *LION, f"parallel={layout}", "name=straight_lion")
        assert ranks(LAYOUTS[layout], live, folder) == [True] * LAYOUTS[layout]
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2"])
def test_killed_and_resumed_is_the_straight_run_to_the_last_bit(
    layout: str, text: tuple[str, ...], straight: Straight, ranks: RankPool
) -> None:
    world, argv = LAYOUTS[layout], (*text, *LION, f"parallel={layout}", "name=killed_lion")
    folder = opened(*argv)
    with pytest.raises(RankError, match="died of SIGKILL"):
        ranks(world, live, folder, Shot("step", signal.SIGKILL, at=7, rank=world - 1, saved=4, told=6))
    assert max(series(folder)) == 6
    assert opened(*argv) == folder
    assert ranks(world, live, folder) == [True] * world
    assert series(folder) == series(straight(layout))
    assert contents(folder, 10) == contents(straight(layout), 10)
    assert len(contents(folder, 10)) > world


def test_it_goes_on_in_other_layouts(text: tuple[str, ...], straight: Straight, ranks: RankPool) -> None:
    folder = opened(*text, *LION, "parallel=fsdp2", "name=moved_lion")
    layouts = ("fsdp2", "tp2", "pp2", "cp2", "hsdp2x2")
    for number, layout in enumerate(layouts, 1):
        assert opened(*text, *LION, f"parallel={layout}", "name=other", f"folder={folder}") == folder
        last = layout == layouts[-1]  # each life but the last does two steps: told in the first, it ends with the next
        shot = None if last else Shot("step", at=1, rank=LAYOUTS[layout] - 1)
        assert ranks(LAYOUTS[layout], live, folder, shot) == [last] * LAYOUTS[layout]
        assert max(series(folder)) == 2 * number
    for layout in ("fsdp2", "pp2"):
        assert series(folder) == pytest.approx(series(straight(layout)), abs=1e-5)
