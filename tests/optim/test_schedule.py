"""The vectors of the schedule, computed by hand, and its edges."""

import pytest
from pydantic import ValidationError

from src.optim.schedule import Schedule


def schedule(**changes: object) -> Schedule:
    fields = {"shape": "linear", "warmup_steps": 2, "decay_ratio": 0.8, "min_factor": 0.0, "total_steps": None}
    return Schedule.model_validate(fields | changes)


def factors(one: Schedule, steps: int = 10) -> list[float]:
    return [one.multiplier(step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        ({"shape": "sqrt"}, [0.5, 1, 1, 0.6464, 0.5, 0.3876, 0.2929, 0.2094, 0.134, 0.0646, 0]),
        ({"shape": "cosine"}, [0.5, 1, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0]),
        (
            {"decay_ratio": None, "min_factor": 0.1},
            [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1],
        ),
        ({"shape": "cosine", "decay_ratio": 0.2, "min_factor": 0.1}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.55, 0.1]),
        ({"decay_ratio": 0.0}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 0, "decay_ratio": None}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
    ],
)
def test_vectors(changes: dict[str, object], expected: list[float]) -> None:
    assert factors(schedule(**changes)) == pytest.approx(expected, abs=5e-5)


def test_beyond_the_end_stays_at_the_minimum() -> None:
    assert schedule(min_factor=0.1).multiplier(1000, 10) == pytest.approx(0.1)
    assert schedule(shape="cosine").multiplier(1000, 10) == 0.0
    assert schedule(decay_ratio=0.0).multiplier(1000, 10) == 1.0


def test_own_total_replaces_the_task_steps() -> None:
    assert [schedule(total_steps=10).multiplier(step, 500) for step in range(11)] == factors(schedule())


def test_warmup_longer_than_the_run_is_cut_and_said() -> None:
    long = schedule(warmup_steps=200)
    assert factors(long, 4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert long.multiplier(100, 4) == 1.0
    (warmup, decay) = long.warnings(4)
    assert warmup == "schedule.warmup_steps=200 is cut to the 4 steps there are"
    assert decay == "schedule.decay_ratio=0.8 asks for 3 of 4 steps; the warm-up of 4 leaves 0"


def test_decay_that_meets_the_warmup_is_cut_and_said() -> None:
    crowded = schedule(warmup_steps=4)
    assert factors(crowded) == pytest.approx([0.25, 0.5, 0.75, 1, 1, *[1 - n / 6 for n in range(1, 7)]])
    assert crowded.warnings(10) == ["schedule.decay_ratio=0.8 asks for 8 of 10 steps; the warm-up of 4 leaves 6"]
    assert schedule().warnings(10) == []


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValidationError, match="shape"):
        schedule(shape="step")


def test_what_follows_the_decay_is_told() -> None:
    assert schedule(total_steps=10).rests(500)
    assert not schedule(total_steps=10).rests(10)
    assert not schedule(total_steps=10, decay_ratio=0.0).rests(500)  # constant
    low = schedule(total_steps=10, min_factor=0.1)
    assert not low.rests(500)
    (line,) = low.warnings(500)
    assert line == (
        "schedule.total_steps=10 ends before task.steps=500: from there on it is schedule.min_factor=0.1 of the peak"
    )


def test_the_first_step_below_the_peak_is_the_first_of_the_decay() -> None:
    for one in (schedule(), schedule(decay_ratio=0.3), schedule(decay_ratio=None), schedule(decay_ratio=0.0)):
        below = [step for step, factor in enumerate(factors(one)) if step >= 2 and factor < 1]
        assert [step for step in range(11) if one.decayed(step, 10)] == below
