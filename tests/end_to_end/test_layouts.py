"""What must not depend on how ranks share the work, or on whether anybody looks."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.end_to_end.lives import WORLDS, live, opened, records, series, values
from tests.ranks import RankPool

Straight = Callable[[str], Path]
VALIDATED = ("task.validate_every=4", "task.validate_samples=7")  # 7 do not divide by 2 or 4 ranks


def run(ranks: RankPool, layout: str, *argv: str) -> Path:
    folder = opened(*argv, f"parallel={layout}")
    assert ranks(WORLDS[layout], live, folder) == [True] * WORLDS[layout]
    return folder


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2", "hsdp2x2", "tp2", "tp2_fsdp2"])
def test_every_layout_trains_alike(layout: str, straight: Straight) -> None:
    found, alone = straight(layout), straight("single")
    assert series(found) == pytest.approx(series(alone), abs=1e-5)
    assert series(found, "grad_norm") == pytest.approx(series(alone, "grad_norm"), rel=1e-4)
    assert series(found, "tokens") == series(alone, "tokens")
    assert values(found, 12)["digest"] == values(alone, 12)["digest"]


@pytest.mark.slow
def test_validation_leaves_no_trace_and_is_equal_everywhere(
    text: tuple[str, ...], straight: Straight, ranks: RankPool
) -> None:
    alone: dict[int, float] = {}
    for layout in ("single", "fsdp2", "hsdp2x2", "tp2_fsdp2"):
        folder = run(ranks, layout, *text, *VALIDATED, "name=validated")
        assert series(folder) == series(straight(layout)), layout
        losses = series(folder, "validation_loss")
        alone = alone or losses
        assert losses == pytest.approx(alone, abs=1e-6), layout
    assert list(alone) == [4, 8, 12]
    assert alone[12] < alone[4]


def test_unequal_counts_of_valid_tokens(text: tuple[str, ...], ranks: RankPool) -> None:
    """Labels at document starts do not count, and short rows of documents have many of them."""
    argv = (*text, "data.mask_document_starts=true", "task.steps=6", "name=masked")
    alone = run(ranks, "single", *argv)
    counts = [line["tokens"] for line in records(alone) if "loss" in line]
    assert 5 * 4 * 32 < counts[-1] < 6 * 4 * 32
    assert len({after - before for before, after in pairwise(counts)}) > 1
    for layout in ("fsdp2", "tp2_fsdp2"):
        found = run(ranks, layout, *argv)
        assert series(found) == pytest.approx(series(alone), abs=1e-6)
        assert series(found, "tokens") == series(alone, "tokens")


@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_micro_batches_add_up(layout: str, text: tuple[str, ...], ranks: RankPool) -> None:
    argv = (*text, "task.steps=6", "data.mask_document_starts=true")
    whole = run(ranks, layout, *argv, "task.global_batch=8", f"task.micro_batch={8 // WORLDS[layout]}", "name=whole")
    for sync in ("true", "false"):
        pieces = ("task.global_batch=8", "task.micro_batch=1", f"parallel.sync_each_micro_batch={sync}")
        found = run(ranks, layout, *argv, *pieces, f"name=pieces_{sync}")
        assert series(found) == pytest.approx(series(whole), abs=1e-6)
        assert series(found, "grad_norm") == pytest.approx(series(whole, "grad_norm"), rel=1e-5)
