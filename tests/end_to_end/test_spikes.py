"""Spikes: the score by hand, and whole runs with a poisoned batch, one for each choice."""

import json
import math
import signal
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest

from src.data.batches import Batch, Batches
from src.train.stability.spikes import FEWEST, SpikeWatch
from tests.end_to_end.lives import Shot, contents, live, opened, series
from tests.ranks import RankError, RankPool

POISONED = 13  # step
BATCH = 4  # sequences
SAMPLES = list(range((POISONED - 1) * BATCH, POISONED * BATCH))
WATCH = ("task.steps=16", "checkpoint.every=4", "task.spike_score=10", "task.spike_window=10", "optim.lr=1e-2")


def seen(watch: SpikeWatch, losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        watch.decide(step, loss, 1.0, range(4 * step - 4, 4 * step))


def test_the_score_is_of_medians_without_the_step_before() -> None:
    losses = [5.0, 4.0, 4.5, 3.9, 4.1, 3.0, 3.2, 2.9, 3.1, 3.3]
    watch = SpikeWatch(4.0, window=8, choice="note")
    seen(watch, losses)
    assert watch.limits(11, range(40, 44)) == (math.inf, math.inf), "a note does not hold the device back"
    assert watch.decide(11, 9.0, 1.0, range(40, 44)) == "note"
    known = losses[1:-1]
    deviation = 1.4826 * median(abs(loss - median(known)) for loss in known)
    assert watch.score == pytest.approx((9.0 - median(known)) / deviation)
    assert watch.decide(12, 3.0, 1.03, range(44, 48)) is None
    assert watch.decide(13, 3.0, 1.05, range(48, 52)) == "note", "norms that were all alike have 1 % of them"


def test_too_few_steps_have_no_spike() -> None:
    watch = SpikeWatch(4.0, window=32, choice="skip_batch")
    seen(watch, [1.0] * FEWEST)
    assert watch.limits(FEWEST + 1, range(99, 100)) == (math.inf, math.inf)
    assert watch.decide(FEWEST + 1, 1e6, 1e6, range(99, 100)) is None
    assert watch.limits(FEWEST + 2, range(100, 101)) == pytest.approx((1.04, 1.04))


def test_samples_stay_skipped_through_checkpoints_and_other_batches() -> None:
    watch, other = (SpikeWatch(4.0, window=8, choice="rewind") for _ in range(2))
    seen(watch, [2.0] * 10)
    watch.skip([(48, 52)])
    other.skip([(80, 84)])
    other.adopt(json.loads(json.dumps(watch.tree())))
    assert other.limits(7, range(48, 56)) == (-math.inf, -math.inf)
    assert [other.skips(range(first, first + 8)) for first in (40, 48, 56, 80)] == [False, True, False, True]
    assert other.decide(13, 9.0, 1.0, range(48, 52)) is None, "they are known"
    assert other.score > 4.0


# ---- whole runs


def poisoned(folder: Path, shot: Shot | None = None) -> Any:
    """A rank's life in which the labels of one step are a byte that no text has."""
    original = Batches.step

    def step(self: Batches, position: int, share: range | None = None) -> list[Batch]:
        made: list[Batch] = original(self, position, share)
        for batch in made if position == SAMPLES[0] else ():
            batch.labels.fill_(255)
        return made

    with patch.object(Batches, "step", step):
        return live(folder, shot)


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lived(text: tuple[str, ...], ranks: RankPool) -> dict[str, Path]:
    """A run folder of each choice."""
    folders = {}
    for choice in ("note", "skip_batch", "rewind"):
        folders[choice] = opened(*text, *WATCH, f"task.on_spike={choice}", "parallel=single", f"name=spike_{choice}")
        assert ranks(1, poisoned, folders[choice]) == [True]
    return folders


def test_each_choice_is_noted_with_its_samples(lived: dict[str, Path]) -> None:
    for choice, folder in lived.items():
        (incident,) = incidents(folder)
        assert (incident["step"], incident["decision"], incident["samples"]) == (POISONED, choice, SAMPLES)
        assert incident["score"] > 10
        assert series(folder, "spike_score")[POISONED] == pytest.approx(incident["score"])
        assert max(score for step, score in series(folder, "spike_score").items() if step < POISONED) < 10
    assert incidents(lived["rewind"])[0]["back_to"] == 12


def test_a_skipped_batch_changes_nothing(lived: dict[str, Path]) -> None:
    noted, skipped = series(lived["note"]), series(lived["skip_batch"])
    assert {step: skipped[step] for step in range(1, POISONED + 1)} == {s: noted[s] for s in range(1, POISONED + 1)}
    assert skipped[POISONED + 1] != noted[POISONED + 1]


def test_after_a_rewind_the_run_is_the_one_that_skipped(lived: dict[str, Path]) -> None:
    assert contents(lived["rewind"], 16) == contents(lived["skip_batch"], 16)
    assert series(lived["rewind"]) == series(lived["skip_batch"])


def test_what_was_skipped_stays_so_after_a_kill_and_on_another_layout(
    text: tuple[str, ...], lived: dict[str, Path], ranks: RankPool
) -> None:
    """Killed after the spike was told and before any checkpoint could know: incidents.jsonl does."""
    argv = (*text, *WATCH, "task.on_spike=rewind", "name=spike_killed")
    folder = opened(*argv, "parallel=single")
    with pytest.raises(RankError, match="died of SIGKILL"):
        ranks(1, poisoned, folder, Shot("step", signal.SIGKILL, at=POISONED + 1))
    assert len(incidents(folder)) == 1
    assert opened(*argv, "parallel=fsdp2", f"folder={folder}") == folder
    assert ranks(2, poisoned, folder) == [True] * 2
    assert len(incidents(folder)) == 1
    assert series(folder) == pytest.approx(series(lived["skip_batch"]), abs=1e-4)
