"""The simulated week: it adds up, agrees with Daly's formula where it may, and its decisions are the project's."""

from dataclasses import replace
from unittest.mock import patch

import pytest

from benchmarks.scale import operations
from benchmarks.scale.__main__ import auto, defaults, main
from benchmarks.scale.operations import week_of
from benchmarks.scale.site import HOUR, WEEK, Site
from benchmarks.scale.week import Week, shares
from src.planning.time.failures import goodput
from tests.scale.laws import ROWS

SITE = Site(nodes=512)
QUIET = replace(SITE, slow_node_hours=1e12, outage_hours=0.0, full_days=0.0, requeue_seconds=0.0, spares=1.0)


@pytest.mark.parametrize("every", [40, 120, 500])
def test_without_surprises_it_is_dalys_formula(every: int) -> None:
    """Interruptions alone: starts, saves and steps that are done again."""
    rules = replace(defaults(), every=every, minutes=1e9)
    site = replace(QUIET, nodes=2048, write_seconds=0.0)
    spent = Week(site, rules, seed=3, seconds=40 * WEEK).play().spent
    foretold = goodput(every * site.step_seconds, site.stall_seconds, site.start_seconds, site.interruption_seconds)
    hangs = spent.hang + spent.idle + spent.queue  # the formula knows of none
    assert spent.useful / (spent.total - hangs) == pytest.approx(foretold, rel=0.02)


@pytest.mark.parametrize("nodes", [1, 512, 2048])
def test_every_second_of_the_week_went_somewhere(nodes: int) -> None:
    site = replace(SITE, nodes=nodes)
    story = Week(site, defaults(), seed=1).play()
    assert story.spent.total == pytest.approx(WEEK, rel=1e-6)
    assert min(vars(story.spent).values()) >= 0.0
    assert Week(site, defaults(), seed=1).play() == story, "the same for the same seed"


def test_a_run_of_2048_nodes_comes_through_the_week() -> None:
    """An interruption in three hours: the default of 20 requeues in all would have ended it on the third day."""
    stories = [Week(replace(SITE, nodes=2048, full_days=0.0), defaults(), seed).play() for seed in range(4)]
    assert all(30 < len(story.requeued) < 110 for story in stories)
    assert max(story.requeued[20] for story in stories) < 4.5 * 24 * HOUR
    assert [story.stops for story in stories] == [[]] * 4
    assert min(story.spent.goodput for story in stories) > 0.6


def test_saving_as_often_as_is_best_pays(capsys: pytest.CaptureFixture[str]) -> None:
    site = replace(SITE, nodes=2048)
    seldom = shares([Week(site, defaults(), seed).play() for seed in range(6)])
    often = shares([Week(site, auto(defaults(), site), seed).play() for seed in range(6)])
    assert often["again"] < seldom["again"] / 2
    assert often["useful"] > seldom["useful"] + 0.02
    assert main(["--nodes", "2", "--weeks", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 nodes: an interruption every" in said
    assert "goodput 9" in said


def test_faults_of_the_disk_are_waited_out_or_told() -> None:
    """Short ones cost minutes. Those beyond the patience of a rank end a start, which is tried again; a full disk waits
    for a person.
    """
    brief = replace(QUIET, outage_hours=6.0, outage_minutes=0.5, mtbf_hours_per_gpu=1e9)
    story = Week(brief, defaults(), seed=0).play()
    assert (story.starts, story.stops) == (8, []), "time limits alone"
    assert story.faults > 20
    assert story.spent.disk / WEEK < 0.005
    long = Week(replace(brief, outage_minutes=10.0), defaults(), seed=0).play()
    assert long.verdicts["disk"] > 5
    assert long.stops == []
    full = Week(replace(QUIET, full_days=2.0), defaults(), seed=0).play()
    assert {words.partition(":")[0] for words in full.stops} == {"user"}
    assert full.spent.idle >= 4 * HOUR


def test_slow_nodes_are_left_out_where_starts_look_for_them() -> None:
    site = replace(SITE, nodes=2048, slow_node_hours=20_000.0)
    blind = shares([Week(site, defaults(), seed).play() for seed in range(4)])
    looking = shares([Week(site, replace(defaults(), preflight_gpus=True), seed).play() for seed in range(4)])
    assert looking["slow"] < blind["slow"] / 2


@pytest.mark.parametrize("wrong", [["--site", "speed=2"], ["--site", "spares=x"], ["--nodes", "0"], ["--weeks", "0"]])
def test_what_it_cannot_play_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as told:
        main(["--nodes", "2", *wrong])
    assert told.value.code == 2
    assert "numbers for" in capsys.readouterr().err or "at least 1" in capsys.readouterr().err or wrong[0] != "--site"


def test_the_laws_of_the_scale_test_hold_in_the_week(capsys: pytest.CaptureFixture[str]) -> None:
    """A world of eight nodes: what a start takes, as often as the week starts; twice the starts take twice as much."""
    site = replace(SITE, nodes=8)
    once = {"starts": 1.0, "saves": 1.0, "failures": 1.0, "logged": 1.0}
    week = week_of(site, once)
    assert week["operations of the store"] == 4 * 64
    assert week["lines of attempts.jsonl about failures"] == 8
    assert week_of(site, once | {"starts": 2.0})["operations of the store"] == 2 * 4 * 64
    assert main(["--nodes", "8", "--weeks", "1", "--operations"]) == 0
    assert "files of the shared disk opened for code and config" in capsys.readouterr().out
    wasteful = replace(next(row for row in ROWS if row.part == "metrics"), measure=lambda world: world)
    rest = [row for row in ROWS if row.what != wasteful.what]
    with patch.object(operations, "ROWS", (wasteful, *rest)), pytest.raises(AssertionError, match="the law O"):
        week_of(site, once)
