"""A run that was interrupted is the run that was not."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.lives import WORLDS, Shot, contents, live, opened, series, values
from tests.ranks import RankError, RankPool

Straight = Callable[[str], Path]
STEPS = list(range(1, 13))


@pytest.mark.parametrize("layout", ["single", "fsdp2", "tp2_fsdp2"])
def test_killed_and_resumed_is_the_straight_run_to_the_last_bit(
    layout: str, text: tuple[str, ...], straight: Straight, ranks: RankPool
) -> None:
    argv = (*text, f"parallel={layout}", "name=killed")
    world, folder = WORLDS[layout], opened(*argv)
    with pytest.raises(RankError, match="died of SIGKILL"):
        ranks(world, live, folder, Shot("step", signal.SIGKILL, at=9, rank=world - 1, saved=6, told=8))
    assert max(series(folder)) == 8
    assert opened(*argv) == folder
    assert ranks(world, live, folder) == [True] * world
    again = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["attempt"] == 2]
    assert [line["step"] for line in again if "loss" in line] == list(range(7, 13))
    assert series(folder) == series(straight(layout))
    assert series(folder, "grad_norm") == series(straight(layout), "grad_norm")
    assert list(series(folder)) == STEPS
    assert contents(folder, 12) == contents(straight(layout), 12)
    assert len(contents(folder, 12)) > world


def test_a_run_changes_its_layout_three_times(text: tuple[str, ...], straight: Straight, ranks: RankPool) -> None:
    folder = opened(*text, "parallel=fsdp2", "name=moved")
    for number, layout in enumerate(("fsdp2", "tp2", "single", "hsdp2x2")):
        assert opened(*text, f"parallel={layout}", "name=other", f"folder={folder}") == folder
        # Told in the second of its steps, the rank's vote is counted in the third.
        shot = None if layout == "hsdp2x2" else Shot("step", at=2, rank=WORLDS[layout] - 1)
        assert ranks(WORLDS[layout], live, folder, shot) == [layout == "hsdp2x2"] * WORLDS[layout]
        assert values(folder, 3 * number + 3)["position"] == 4 * (3 * number + 3)
    assert list(series(folder)) == STEPS
    for layout in ("fsdp2", "single"):
        whole = straight(layout)
        assert series(folder) == pytest.approx(series(whole), abs=1e-5)
        assert series(folder, "tokens") == series(whole, "tokens")
        for key in ("step", "tokens", "position", "digest"):
            assert values(folder, 12)[key] == values(whole, 12)[key]
