"""Fragments and rounds, against the pipeline's split and against rounds written down by hand."""

import pytest

from src.distributed.pipeline.stages import modules, split
from src.fault_tolerance.fragments import Rounds, cut, problems
from tests.distributed.layouts import degrees


@pytest.mark.parametrize(("layers", "count"), [(6, 2), (32, 8), (27, 4), (2, 4), (5, 1)])
def test_fragments_are_cut_as_stages_are(layers: int, count: int) -> None:
    stages = split(degrees(f"pp{count}", pipeline_schedule="1F1B") if count > 1 else degrees("single"), layers)
    assert cut(layers, count, None) == stages


def test_more_fragments_than_modules_are_none() -> None:
    assert [len(fragment) for fragment in cut(2, 4, None)] == [1, 1, 1, 2]
    with pytest.raises(ValueError, match="5 stages for 4 units"):
        cut(2, 5, None)


def test_named_fragments_hold_each_module_once() -> None:
    named = (("tok_embeddings", "norm", "output"), ("layers.0", "layers.1"))
    assert cut(2, 7, named) == named
    assert problems(named, 2) == []
    assert problems((modules(2),), 3) == ["missing layers.2"]
    assert problems((*named, ("layers.1",)), 2) == ["twice layers.1"]
    assert problems((*named, ("layers.2",), ()), 2) == ["unknown layers.2", "a fragment without a module"]


# sync_steps, fragments, delay -> by step, from 1: s a fragment is sent, m one is merged, b both
BY_HAND = {
    (1, 1, 0): "b b b",
    (3, 1, 0): ". . b . . b",
    (4, 2, 0): ". b . b . b",
    (4, 2, 1): "s m s m s m",
    (5, 1, 2): ". . s . m . . s . m",
    (8, 2, 3): "s . . m s . . m",
}


@pytest.mark.parametrize(("sync_steps", "fragments", "delay"), BY_HAND)
def test_rounds(sync_steps: int, fragments: int, delay: int) -> None:
    rounds = Rounds(sync_steps, fragments, delay)
    assert rounds.problems() == []
    assert not any((rounds.leaves(0), rounds.arrives(0)))
    for step, sign in enumerate(BY_HAND[sync_steps, fragments, delay].split(), start=1):
        assert (rounds.leaves(step), rounds.arrives(step)) == (sign in "sb", sign in "mb"), step


def test_rounds_that_cannot_be_are_told_with_the_nearest_that_can() -> None:
    (told,) = Rounds(7, 2, 0).problems()
    assert "sync_steps=7" in told
    assert "6 or 8" in told
    (told,) = Rounds(1, 3, 0).problems()
    assert "(3 would do)" in told
    (told,) = Rounds(8, 2, 4).problems()
    assert "delay_steps=4" in told
    assert "at most 3" in told
