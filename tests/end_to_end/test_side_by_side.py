"""Points of a sweep share this machine, as a person types it."""

from pathlib import Path

import pytest

from src.runs.folder import attempts
from tests.end_to_end.commands import command


@pytest.mark.slow
def test_points_of_a_sweep_run_side_by_side(text: tuple[str, ...], tmp_path: Path) -> None:
    """The second is begun before the first has ended; the third takes the place of one that has."""
    argv = (*text, f"root={tmp_path}", "cluster.at_once=2", "parallel=single", "seed=0,1,2", "task.steps=3")
    code, told = command("-m", *argv, "name=beside_${seed}")
    assert code == 0, told
    lines = [line.partition(" ") for line in told.splitlines() if line.startswith("beside_")]
    order = [(name.partition("-")[0], "on" if said.startswith("on slots") else "end") for name, _, said in lines]
    assert order[:2] == [("beside_0", "on"), ("beside_1", "on")], told
    assert order[2][1] == "end", told
    assert sorted(order[3:]) == sorted(
        {(f"beside_{n}", "end") for n in range(3)} - {order[2]} | {("beside_2", "on")}
    ), told
    folders = list(tmp_path.glob("beside_*"))
    assert len(folders) == 3
    assert [[each.ended for each in attempts(folder)] for folder in folders] == [["finished"]] * 3
    assert all((folder / "pack.json").exists() for folder in folders)
