"""Groups that die, come back, wait and disagree take the steps of one undisturbed run, sample for sample."""

import shutil
import time
from pathlib import Path

import pytest

from src.checkpoint.folder import complete
from tests.end_to_end.lives import records, series
from tests.fault_tolerance.life import Trouble
from tests.fault_tolerance.lives import Fleet, audited, fleet, last, losses, seen

STEPS, BATCH = 24, 4
ARGV = (f"task.steps={STEPS}", f"task.global_batch={BATCH}", "checkpoint.every=10")
BAND = 1e-4  # relative: sums over groups are made in another order


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one group that has all the data."""
    with fleet(tmp_path_factory.mktemp("alone"), *ARGV, groups=1) as alone:
        alone.start(0)
        alone.wait()
        return losses(alone.folder, 1)


def check(found: Fleet, groups: int, undisturbed: dict[int, float]) -> None:
    """All that must hold whatever happened."""
    curve = losses(found.folder, groups)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve == pytest.approx(undisturbed, rel=BAND)
    ends = [last(found.folder, group) for group in range(groups)]
    assert ends == [ends[0]] * groups
    assert (ends[0]["end"], ends[0]["position"]) == (STEPS, STEPS * BATCH)
    assert audited(found.folder, STEPS, BATCH)


def test_groups_take_the_steps_of_one_run(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV, groups=3, min_groups=3) as found:  # 4 micro-batches: shares of 2, 1 and 1
        found.start(0, 1, 2)
        found.wait()
        check(found, 3, undisturbed)


def test_a_group_killed_in_a_step_heals(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV) as found:
        found.start(0, troubles=[Trouble(3, "hold"), Trouble(18, "hold")])
        found.reach(3, 0)
        found.start(1, troubles=[Trouble(12, "kill")])
        found.one_asks()
        found.go(3)
        found.died(1)
        found.reach(18, 0)
        found.start(1)
        found.one_asks()
        found.go(18)
        found.wait()
        check(found, 2, undisturbed)


def test_killed_while_it_heals_then_all_killed_then_more_groups(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV) as found:
        found.start(0, troubles=[Trouble(3, "hold"), Trouble(14, "hold"), Trouble(19, "kill")])
        found.reach(3, 0)
        found.start(1, troubles=[Trouble(0, "heal")])
        found.one_asks()
        found.go(3)
        found.died(1)
        found.reach(14, 0)
        found.start(1, troubles=[Trouble(19, "kill")])
        found.one_asks()
        found.go(14)
        found.died(0)
        found.died(1)
        assert (found.folder / "checkpoints/step_00000010/COMPLETE.json").exists()
        found.start_together(0, 1, 2)
        found.wait()
        check(found, 3, undisturbed)
        told = [line["groups/commit_failures"] for line in records(found.folder) if "loss" in line]
        assert told == sorted(told), "totals of the run: the last life knows of the first"
        assert told[-1] > 0


def test_the_group_that_gives_its_state_away_is_killed(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV, groups=3) as found:
        found.start(0, troubles=[Trouble(2, "hold"), Trouble(5, "hold"), Trouble(6, "give")])
        found.reach(2, 0)
        found.start(1, troubles=[Trouble(13, "hold")])
        found.one_asks()
        found.go(2)
        found.reach(5, 0, 1)
        found.start(2)
        found.one_asks()
        found.go(5)
        found.died(0)
        found.reach(13, 1, 2)
        found.start(0)
        found.one_asks()
        found.go(13)
        found.wait()
        check(found, 3, undisturbed)


def test_the_next_leader_saves_what_a_dead_one_could_not(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV) as found:
        found.start(0, troubles=[Trouble(3, "hold"), Trouble(13, "hold"), Trouble(14, "kill")])
        found.reach(3, 0)
        found.start(1)
        found.one_asks()
        found.go(3)
        found.reach(13, 0, 1)
        checkpoints = found.folder / "checkpoints"
        shutil.rmtree(checkpoints / "step_00000010")  # as if the leader had died while it wrote it
        found.go(13)
        found.died(0)
        found.wait(1)
        saved = [path.name for path in complete(checkpoints)]
        assert saved == ["step_00000013", "step_00000020", "step_00000024"]
        assert losses(found.folder, 2) == pytest.approx(undisturbed, rel=BAND)


@pytest.mark.slow
def test_three_groups_to_one_to_three(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """A starved group that misses heartbeats for so long counts as dead, and the next would not wait for it."""
    with fleet(tmp_path, *ARGV, groups=3, heartbeat_seconds=2.0) as found:
        found.start(1, troubles=[Trouble(step, "hold") for step in (1, 4, 11, 14)])
        kill = (Trouble(8, "kill"),)
        for held, group, troubles in ((1, 0, kill), (4, 2, kill), (11, 0, ()), (14, 2, ())):
            found.reach(held, 1)
            found.start(group, troubles=troubles)
            found.one_asks()
            found.go(held)
        found.wait()
        check(found, 3, undisturbed)


def test_restarted_groups_wait_for_the_one_that_has_the_state(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    """Two deaths in a row: those two are more than half, and the survivor does not ask while it waits for the dead."""
    with fleet(tmp_path, *ARGV, groups=3, heartbeat_seconds=2.0) as found:
        found.start(0, troubles=[Trouble(8, "hold")])
        found.reach(8, 0)
        found.start(1, 2)
        found.until(lambda: all("does not begin without group 0" in found.log(group) for group in (1, 2)))
        found.go(8)
        found.wait()
        for group in (1, 2):
            assert min(seen(found.folder, group)) >= 8, "nobody goes back while a group lives"
        check(found, 3, undisturbed)


def test_a_group_told_to_stop_leaves_and_all_told_to_stop_save(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV, groups=2) as found:
        found.start(0, troubles=[Trouble(step, "hold") for step in (3, 8, 14, 17)])
        found.reach(3, 0)
        found.start(1)
        found.one_asks()
        found.go(3)
        found.reach(8, 0, 1)
        found.stop(1)
        found.go(8)
        found.wait(1)
        saved = {path.name.partition(".")[0] for path in (found.folder / "checkpoints").iterdir()}  # or their drafts
        assert saved <= {"step_00000010"}, "who leaves others behind need not save"
        found.reach(14, 0)
        found.start(1)
        found.one_asks()
        found.go(14)
        found.reach(17, 0, 1)
        found.stop(0)
        found.stop(1)
        found.go(17)
        found.wait()
        assert [last(found.folder, group)["position"] for group in range(2)] == [19 * BATCH] * 2
        assert (found.folder / "checkpoints/step_00000019/COMPLETE.json").exists()
        found.start_together(0, 1)
        found.wait()
        check(found, 2, undisturbed)


@pytest.mark.parametrize("groups", [3, 1])
def test_a_run_goes_on_with_another_number_of_groups(
    tmp_path: Path, undisturbed: dict[int, float], groups: int
) -> None:
    with fleet(tmp_path, *ARGV, min_groups=2) as found:
        found.stopped_together(7)
    with fleet(tmp_path, *ARGV, f"folder={found.folder}", groups=groups, min_groups=groups) as again:
        again.start(*range(groups))
        again.wait()
        assert "goes on after step 9, " in again.log(0)
        check(again, groups, undisturbed)


def test_groups_told_to_stop_while_they_wait_for_a_lighthouse_save(tmp_path: Path) -> None:
    with fleet(tmp_path, *ARGV, min_groups=2) as found:
        found.start(0, troubles=[Trouble(6, "hold")])
        found.start(1)
        found.reach(6, 0, 1)
        found.lighthouse.kill()
        found.go(6)
        found.until(lambda: "step 7: waits for the lighthouse" in found.log(0))
        found.stop(0)
        found.stop(1)
        found.wait()
        assert [path.name for path in (found.folder / "checkpoints").iterdir()] == ["step_00000006"]


def test_groups_follow_a_lighthouse_that_moves(tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with fleet(tmp_path, *ARGV, min_groups=2) as found:
        found.lighthouse.move(tmp_path / "lighthouse.url")
        found.start(0, troubles=[Trouble(6, "hold")])
        found.start(1)
        found.reach(6, 0, 1)
        found.lighthouse.move(tmp_path / "lighthouse.url")
        found.go(6)
        found.wait()
        check(found, 2, undisturbed)
        assert f"step 7: the lighthouse is at {found.lighthouse.address} now" in found.log(0)


def test_slow_not_finite_without_a_lighthouse_and_of_another_mind(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    with fleet(tmp_path, *ARGV, min_groups=2) as found:
        found.start(0, troubles=[Trouble(4, "nan")])
        found.start(1, troubles=[Trouble(7, "hold"), Trouble(10, "hold"), Trouble(15, "deny")])
        found.reach(7, 0, 1)
        time.sleep(1.5)  # several of the lighthouse's limits
        found.go(7)
        found.reach(10, 0, 1)
        found.lighthouse.kill()
        found.go(10)
        found.until(lambda: "step 11: waits for the lighthouse: nothing answers" in found.log(0))
        assert max(seen(found.folder, 0)) == 10
        found.lighthouse.start()
        found.wait()
        check(found, 2, undisturbed)
        told = found.log(0) + found.log(1)
        assert told.count("step 4: this step was not finite: it is tried once more") == 2
        assert "step 16: quorum" in found.log(1), "alone with its vote, it was healed into the next step"


def test_a_leader_alone_with_its_vote_leaves_the_log_to_who_took_the_step(
    tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """It is healed into the next step, and knows no number of the one that it refused."""
    with fleet(tmp_path, *ARGV, min_groups=2) as found:
        found.start(0, troubles=[Trouble(5, "deny")])
        found.start(1, troubles=[Trouble(9, "deny"), Trouble(13, "deny")])
        found.wait()
        check(found, 2, undisturbed)
    assert sorted(series(found.folder)) == list(range(1, STEPS + 1))
