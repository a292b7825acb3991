"""Who writes what of a checkpoint is agreed on once, and again when the tensors change."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from src.checkpoint.state import Snapshot
from src.checkpoint.store import Store
from src.checkpoint.stored import FILE, read_stored
from src.checkpoint.writer import SavePlans
from tests.checkpoint.options import options
from tests.checkpoint.states import bits, blank, equals, state
from tests.ranks import RankPool


def saves(folder: Path) -> dict[str, Any]:
    planned: list[int] = []
    plan = SavePlans._plan

    def counted(self: SavePlans, *given: Any) -> Any:
        planned.append(1)
        return plan(self, *given)

    counts, loaded = [], []
    with patch.object(SavePlans, "_plan", counted):
        store = Store(folder, options(keep=None))
        for step in (10, 20, 30):
            store.save(step, state(step), {}, wait=True)
            counts.append(len(planned))
        more = state(40)
        more["model"]["extra"] = torch.arange(5.0)
        store.save(40, more, {}, wait=True)
        counts.append(len(planned))
        store.save(50, state(50), {}, wait=True)
        counts.append(len(planned))
    for step in (10, 20, 30, 50):
        loaded.append(equals(store.load(folder / f"step_000000{step}", blank()), step))
    wide = blank()
    wide["model"]["extra"] = torch.zeros(5)
    tree = store.load(folder / "step_00000040", wide)
    loaded.append(equals(tree, 40) and bits(tree["model"]["extra"]) == bits(torch.arange(5.0)))
    return {"counts": counts, "loaded": loaded}


def test_a_plan_is_made_once_and_anew_for_other_tensors(ranks: RankPool, tmp_path: Path) -> None:
    first, second, third = ranks(3, saves, tmp_path)
    assert first["counts"] == [1, 1, 1, 2, 3]
    assert second["counts"] == third["counts"] == [0] * 5, "rank 0 plans for all"
    assert first["loaded"] == second["loaded"] == third["loaded"] == [True] * 5
    places = [read_stored(tmp_path / f"step_000000{step}" / FILE).chunks for step in (10, 20, 50)]
    assert places[0] == places[1] == places[2]


def asked() -> list[str]:
    """Tensors that a rank would write."""
    tensors = {"optimizer.a.step": torch.zeros(()), "optimizer.b.step": torch.zeros(()), "rng": torch.zeros(3)}
    tensors["optimizer.a.moment"] = state(1)["optimizer"]["a.weight"]["moment"]
    plan = Snapshot(tensors, coordinator=False, copy=False).create_local_plan()
    return sorted(item.index.fqn for item in plan.items)


def test_one_rank_writes_the_count_of_steps_of_a_tensor_that_is_cut(ranks: RankPool) -> None:
    """Of one that nobody cuts, only the plan of all knows who has it."""
    first, *others = ranks(3, asked)
    assert first == ["optimizer.a.moment", "optimizer.a.step", "optimizer.b.step", "rng"]
    assert others == [["optimizer.a.moment", "optimizer.b.step", "rng"]] * 2
