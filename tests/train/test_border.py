"""What a checkpoint of one stage becomes at the beginning of the next."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from src.metrics.incidents import skipped_samples, write_incident
from src.train.border import StageBorder
from src.train.stability.spikes import FEWEST, SpikeWatch
from src.train.state import TrainState


def loaded(step: int, border: StageBorder | None) -> TrainState:
    """A state with what a checkpoint of this step held: 24 samples, 8 of them to be skipped, and a run of equal
    losses.
    """
    state = TrainState(
        cast("Any", None), cast("Any", None), seed=0, spikes=SpikeWatch(4.0, 16, "rewind"), border=border
    )
    seen = [[number, 2.0, 1.0] for number in range(step - FEWEST, step + 1)]
    tree = {"step": step, "tokens": 768, "position": 24, "digest": "theirs", "rng": {"torch": torch.get_rng_state()}}
    state.adopt(tree | {"spikes": {"seen": seen, "skipped": [[40, 48]]}})
    return state


@pytest.mark.parametrize(
    ("border", "position", "skips", "new"),
    [
        (None, 24, True, False),
        (StageBorder(6, 0), 0, False, True),
        (StageBorder(6, None), 24, True, False),
        (StageBorder(5, 0), 24, True, False),  # a checkpoint in the middle of the stage
    ],
)
def test_samples_begin_anew_where_their_order_does(
    border: StageBorder | None, position: int, skips: bool, new: bool
) -> None:
    state = loaded(6, border)
    assert (state.step, state.tokens, state.position, state.at_new_samples) == (6, 768, position, new)
    assert state.spikes is not None
    assert state.spikes.skips(range(40, 44)) is skips


@pytest.mark.parametrize(("border", "spike"), [(None, "rewind"), (StageBorder(6, None), None)])
def test_a_border_is_no_spike(border: StageBorder | None, spike: str | None) -> None:
    """Longer sequences and other data have other losses."""
    state = loaded(6, border)
    assert state.spikes is not None
    assert state.spikes.decide(8, 3.0, 1.0, range(24, 28)) == spike


def test_samples_of_an_earlier_stage_are_not_skipped(tmp_path: Path) -> None:
    for step, first in ((3, 8), (7, 4)):
        write_incident(
            tmp_path, step=step, decision="skip_batch", loss=9.0, grad_norm=1.0, samples=range(first, first + 4)
        )
    assert skipped_samples(tmp_path) == [(8, 12), (4, 8)]
    assert skipped_samples(tmp_path, after=6) == [(4, 8)]
